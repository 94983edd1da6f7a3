"""Model, data, training and test of the unprotected peer: what is no matter of federated learning.

Plain transformers, PEFT and torch, written as Flower's tutorial would have it, and not with cloister's trainer: what
both come to is compared, so they must not share their mistakes. Everything is in the clear.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from cloister.slicing import pool
from cloister.train import StepPlan, TrainSpec

RunConfig = Mapping[str, Any]
Batch = dict[str, torch.Tensor]
IGNORED = -100
DROPOUTS = (
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "hidden_dropout",
    "hidden_dropout_prob", "resid_pdrop",
)  # fmt: skip


class PlainModel(nn.Module):
    """A whole backbone with LoRA or a prefix; for classification with pooling and a linear head."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.is_causal = config["task"] == "causal-lm"
        self.pooling = config["pooling"]
        backbone = load_backbone(config)
        adapter = prefix_of(config) if config["adapter"] == "prefix" else lora_of(config, backbone)
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers by a name that transformers 5 calls old.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            self.encoder: Any = get_peft_model(backbone, adapter)
        self.head = None if self.is_causal else nn.Linear(backbone.config.hidden_size, config["num-labels"])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits: one row per token for causal-lm, one per text for classification."""
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more)
        if self.head is None:
            return out.logits
        return self.head(pool(out.last_hidden_state, attention_mask, self.pooling))


def load_backbone(config: RunConfig) -> Any:
    """The backbone in float32; with a language-model head for causal-lm, and else without any head."""
    path = config["model-path"]
    known: Any = AutoConfig.from_pretrained(path)
    if not config["backbone-dropout"]:
        for name in DROPOUTS:
            if hasattr(known, name):
                setattr(known, name, 0.0)
    options: dict[str, Any] = {"config": known, "dtype": torch.float32}
    if getattr(known, "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # the fused kernels cannot cap attention logits
    if config["task"] == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(path, **options)
    if known.model_type == "bert":
        # The stock pooler is untrained in sentence encoders and takes no part in pooling.
        options["add_pooling_layer"] = False
    return AutoModel.from_pretrained(path, **options)


def lora_of(config: RunConfig, backbone: Any) -> PeftConfig:
    """LoRA on the linears that are named, or on every one of the blocks."""
    targets: Any = config["lora-targets"]
    first, last = config["first-layer"], backbone.config.num_hidden_layers
    return LoraConfig(
        task_type="CAUSAL_LM" if config["task"] == "causal-lm" else "FEATURE_EXTRACTION",
        r=config["lora-r"],
        lora_alpha=config["lora-alpha"],
        lora_dropout=config["lora-dropout"],
        use_rslora=config["use-rslora"],
        target_modules=targets if targets == "all-linear" else targets.split(","),
        layers_to_transform=list(range(first, last)) if first else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in backbone.modules()),
    )


def prefix_of(config: RunConfig) -> PeftConfig:
    """P-tuning v2: trained keys and values before the text, at every layer."""
    return PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=config["prefix-tokens"])


def get_state(model: PlainModel) -> dict[str, torch.Tensor]:
    """What is federated: the adapter and the head."""
    adapter = get_peft_model_state_dict(model.encoder)
    state = {f"adapter.{name}": tensor for name, tensor in adapter.items()}
    if model.head is not None:
        state |= {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def set_state(model: PlainModel, state: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `get_state` gave."""
    set_peft_model_state_dict(model.encoder, _part(state, "adapter."))
    if model.head is not None:
        model.head.load_state_dict(_part(state, "head."))


def _part(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# --- data -------------------------------------------------------------------------------------------------------------


def load_data(
    paths: str | Path | Sequence[str | Path], config: RunConfig, *, seed: int | None = None
) -> DataLoader[Any]:
    """JSON lines of texts, tokenised once, or of tokens; padded batch by batch, shuffled if there is a seed."""
    files = [paths] if isinstance(paths, (str, Path)) else paths
    rows = [json.loads(line) for path in files for line in Path(path).read_text(encoding="utf-8").splitlines()]
    examples = rows if "input_ids" in rows[0] else _tokenised(rows, config)
    sampler = None if seed is None else RandomSampler(examples, generator=torch.Generator().manual_seed(seed))
    return DataLoader(examples, batch_size=config["batch-size"], sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


def _tokenised(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(config["model-path"])
    texts = [row["text"] for row in rows]
    options = {"max_length": config["max-length"], "return_token_type_ids": False}
    encoded = tokenizer(texts, truncation=True, **options)["input_ids"]
    return [{"input_ids": ids, "label": row["label"]} for ids, row in zip(encoded, rows, strict=True)]


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows as tensors [batch, tokens], padded on the right with 0, which is never attended to."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(columns: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*column, *[fill] * (width - len(column))] for column in columns])

    batch = {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
    if "labels" in rows[0]:
        return batch | {"labels": padded([row["labels"] for row in rows], IGNORED)}
    return batch | {"labels": torch.tensor([row["label"] for row in rows])}


# --- training and test ------------------------------------------------------------------------------------------------


def train(
    model: PlainModel,
    loader: DataLoader[Any],
    config: RunConfig,
    device: torch.device,
    *,
    on_step: Callable[[int, int, float], None] | None = None,
) -> float:
    """Local epochs; returns the mean loss of a step. `on_step` gets steps done, all steps, and the loss."""
    model.to(device)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["learning-rate"], weight_decay=config["weight-decay"])
    plan = _plan(config, len(loader.dataset))  # type: ignore[arg-type]
    losses: list[float] = []
    for _ in range(config["local-epochs"]):
        for batch in loader:
            optimizer.param_groups[0]["lr"] = plan.lr_at(len(losses))
            optimizer.zero_grad()
            logits, targets = _scored(model, batch, device)
            loss = cross_entropy(logits, targets)
            loss.backward()
            if config["max-grad-norm"]:
                nn.utils.clip_grad_norm_(trained, config["max-grad-norm"])
            optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(len(losses), plan.n_steps, losses[-1])
    return sum(losses) / len(losses)


def _plan(config: RunConfig, n_examples: int) -> StepPlan:
    """The learning rate of each step, the same curve as ours."""
    spec = TrainSpec(
        epochs=config["local-epochs"],
        batch_size=config["batch-size"],
        lr=config["learning-rate"],
        warmup_ratio=config["warmup-ratio"],
        schedule=config["schedule"],
    )
    return StepPlan(spec, n_examples)


def _scored(model: PlainModel, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [targets, classes] and targets: of every text, or of every token that carries loss."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**inputs)
    if not model.is_causal:
        return logits, labels
    logits, labels = logits[:, :-1], labels[:, 1:]  # a token is predicted by those before it
    told = labels != IGNORED
    return logits[told], labels[told]


@torch.inference_mode()
def test(model: PlainModel, loader: DataLoader[Any], device: torch.device) -> tuple[float, float]:
    """Mean loss of a text (causal-lm: of a token), and the share that is right."""
    model.to(device)
    model.eval()
    loss, n_right, n = 0.0, 0, 0
    for batch in loader:
        logits, targets = _scored(model, batch, device)
        loss += cross_entropy(logits, targets, reduction="sum").item()
        n_right += int((logits.argmax(dim=-1) == targets).sum())
        n += len(targets)
    return loss / n, n_right / n


@torch.inference_mode()
def predict(model: PlainModel, loader: DataLoader[Any], device: torch.device) -> list[int]:
    """The most likely class of each text, in the loader's order."""
    model.to(device)
    model.eval()
    found: list[int] = []
    for batch in loader:
        found += _scored(model, batch, device)[0].argmax(dim=-1).tolist()
    return found


@torch.inference_mode()
def complete(
    model: PlainModel, ids: Sequence[int], *, end: int | None, limit: int, max_length: int, device: torch.device
) -> list[int]:
    """Greedy completion of a prompt, without its end token; every token is computed over the whole text."""
    model.to(device)
    model.eval()
    made: list[int] = []
    while len(made) < limit and len(ids) + len(made) < max_length:
        text = torch.tensor([[*ids, *made]], device=device)
        token = int(model(text, torch.ones_like(text))[0, -1].argmax())
        if token == end:
            break
        made.append(token)
    return made


def start(config: RunConfig, *, offset: int = 0) -> torch.device:
    """Seed, threads and device of this process."""
    torch.manual_seed(int(config["seed"]) + offset)
    if config["num-threads"]:
        torch.set_num_threads(int(config["num-threads"]))
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
