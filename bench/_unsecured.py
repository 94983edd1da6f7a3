"""Method 2's numbers with none of its security: near side, training and questions in this process, nothing sealed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

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
    open_dataset,
    predict,
)

if TYPE_CHECKING:
    from cloister.config import Job


def boundary_features(encoder: NearEncoder, dataset: Dataset) -> list[Feature]:
    """Every example quantised at the boundary and back, as the enclave sees it, in the order of the data."""
    found: dict[int, Feature] = {}
    for batch in encoder.window(list(dataset), dataset.place):
        for item, block in zip(batch, encoder.blocks(batch), strict=True):
            labels = None if item.labels is None else torch.tensor(item.labels)
            found[item.index] = Feature(item.index, dequantize(block), label=item.label, labels=labels)
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

    def complete(self, prompt: str, limit: int) -> str:
        """Greedily, as `predict` asks an enclave: the near side over the growing text, one token at a time."""
        made: list[int] = []
        while len(made) < limit and (question := self.encoder.continued(prompt, made)) is not None:
            body = decode_shard(question, hidden_size=self.info.hidden_size, task=self.task, labelled=False)
            token = int(predict(self.far, [body.example(0)], self.task)[0])
            if token == self.tokenizer.eos_token_id:
                break
            made.append(token)
        return self.tokenizer.decode(made, skip_special_tokens=True)


def train_unsecured(job: Job) -> Trained:
    """A job of Method 2, without enclaves, relay, store and evidence."""
    info, task = inspect_backbone(job.model.path), job.task_spec()
    tokenizer, cut = load_tokenizer(info), resolve_cut(info, job.model.cut_layer)
    encoder = NearEncoder(
        load_near(info, cut), tokenizer, task, boundary=job.method.boundary, batch_size=job.method.near_batch_size,
        model_max_length=info.max_length,
    )  # fmt: skip
    source = MemoryFeatures({client.name: _features_of(encoder, client) for client in job.clients})
    far = load_far(info, cut, task=task.name, n_labels=len(task.labels) or None, pooling=task.pooling,
                   seed=job.training.seed)  # fmt: skip
    FarTrainer(far, job.train_spec(), job.far_adapter_spec(), task, source).train()
    return Trained(info, encoder, tokenizer, far, task, source)


def _features_of(encoder: NearEncoder, client: Any) -> dict[str, Sequence[Feature]]:
    return {
        split: boundary_features(
            encoder,
            open_dataset(data.path, columns=client.column_map(), task=encoder.task, split=data.split,
                         where=data.where or None),
        )
        for split, data in client.datasets.items()
    }  # fmt: skip
