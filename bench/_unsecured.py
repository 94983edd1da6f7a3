"""Method 2's numbers with none of its security: near side, training and questions in this process, nothing sealed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cloister.api._compare_data import client_datasets
from cloister.api._predict import _complete
from cloister.slicing import BackboneInfo, FarSide, inspect_backbone, load_far, load_near, load_tokenizer, resolve_cut
from cloister.train import (
    Dataset,
    FarTrainer,
    Feature,
    MemoryFeatures,
    NearEncoder,
    TaskSpec,
    decode_shard,
    dequantize,
    evaluate,
    predict,
)
from cloister.train._encoder import label_tensor

if TYPE_CHECKING:
    from cloister.config import Job


def boundary_features(encoder: NearEncoder, dataset: Dataset) -> list[Feature]:
    """Every example quantised at the boundary and back, as the enclave sees it, in the order of the data."""
    found: dict[int, Feature] = {}
    for batch in encoder.window(list(dataset), dataset.place):
        for item, block in zip(batch, encoder.blocks(batch), strict=True):
            found[item.index] = Feature(item.index, dequantize(block), label=item.label, labels=label_tensor(item))
    return [found[i] for i in sorted(found)]


@dataclass(frozen=True)
class Trained:
    """Both halves of a model that was trained in this process."""

    info: BackboneInfo
    encoder: NearEncoder
    tokenizer: Any
    far: FarSide
    task: TaskSpec
    source: MemoryFeatures

    @property
    def metric(self) -> float:
        """Of all clients' held-out examples."""
        return evaluate(self.far, self.source, self.task).value

    def ask(self, question: bytes) -> list[dict[str, int]]:
        """What an enclave would answer: the next token."""
        body = decode_shard(question, hidden_size=self.info.hidden_size, task=self.task, labelled=False)
        return [{"next_token": int(predict(self.far, [body.example(0)], self.task)[0])}]

    def complete(self, prompt: str, limit: int) -> str:
        """Greedily, by the loop of `cloister predict`."""
        asked: Any = self
        return _complete(prompt, self.encoder, asked, self.tokenizer, limit)["completion"]


def train_unsecured(job: Job) -> Trained:
    """A job of Method 2, without enclaves, relay, store and evidence."""
    info, task = inspect_backbone(job.model.path), job.task_spec()
    tokenizer, cut = load_tokenizer(info), resolve_cut(info, job.model.cut_layer)
    encoder = NearEncoder(
        load_near(info, cut), tokenizer, task, boundary=job.method.boundary, batch_size=job.method.near_batch_size,
        model_max_length=info.max_length,
    )  # fmt: skip
    source = MemoryFeatures(
        {
            name: {split: boundary_features(encoder, data) for split, data in client_datasets(job, name).items()}
            for name in job.client_names
        }
    )
    far = load_far(info, cut, task=task.name, n_labels=len(task.labels) or None, pooling=task.pooling,
                   seed=job.training.seed)  # fmt: skip
    FarTrainer(far, job.train_spec(), job.far_adapter_spec(), task, source).train()
    return Trained(info, encoder, tokenizer, far, task, source)
