"""Model, data, training and test: what is no matter of federated learning."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

RunConfig = Mapping[str, Any]
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


class Classifier(nn.Module):
    """A sentence encoder with LoRA or a prefix, mean pooling, and a linear head."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        # The stock pooler is untrained in sentence encoders and takes no part in mean pooling.
        dropout = {} if config["backbone-dropout"] else dict.fromkeys(DROPOUTS, 0.0)
        encoder = AutoModel.from_pretrained(config["model-path"], add_pooling_layer=False, **dropout)
        adapter = prefix_of(config) if config["adapter"] == "prefix" else lora_of(config, encoder)
        self.encoder = get_peft_model(encoder, adapter)
        self.head = nn.Linear(encoder.config.hidden_size, config["num-labels"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(dim=1) / mask.sum(dim=1))


def lora_of(config: RunConfig, encoder: nn.Module) -> PeftConfig:
    """LoRA on every linear of the blocks."""
    return LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=config["lora-r"],
        lora_alpha=config["lora-alpha"],
        target_modules=["query", "key", "value", "dense"],
        layers_to_transform=list(range(config["first-layer"], encoder.config.num_hidden_layers)),
    )


def prefix_of(config: RunConfig) -> PeftConfig:
    """P-tuning v2: trained keys and values before the text, at every layer."""
    return PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=config["prefix-tokens"])


def get_state(model: Classifier) -> dict[str, torch.Tensor]:
    """What is federated: the adapter and the head."""
    adapter = get_peft_model_state_dict(model.encoder)
    state = {f"adapter.{name}": tensor for name, tensor in adapter.items()}
    state |= {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def set_state(model: Classifier, state: Mapping[str, torch.Tensor]) -> None:
    set_peft_model_state_dict(model.encoder, _part(state, "adapter."))
    model.head.load_state_dict(_part(state, "head."))


def _part(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_data(path: str | Path, config: RunConfig, *, seed: int | None = None) -> DataLoader[Any]:
    """JSON lines of `text` and `label`, tokenised once and padded batch by batch; shuffled if there is a seed."""
    tokenizer = AutoTokenizer.from_pretrained(config["model-path"])
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer(
        [row["text"] for row in rows], truncation=True, max_length=config["max-length"], return_token_type_ids=False
    )
    examples = [
        {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]
    collate = DataCollatorWithPadding(tokenizer)
    sampler = None if seed is None else RandomSampler(examples, generator=torch.Generator().manual_seed(seed))
    return DataLoader(examples, batch_size=config["batch-size"], sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


def train(model: Classifier, loader: DataLoader[Any], config: RunConfig, device: torch.device) -> float:
    """Local epochs; returns the mean loss of a step."""
    model.to(device)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["learning-rate"], weight_decay=config["weight-decay"])
    losses = []
    for _ in range(config["local-epochs"]):
        for batch in loader:
            optimizer.zero_grad()
            logits = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            loss = nn.functional.cross_entropy(logits, batch["labels"].to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def test(model: Classifier, loader: DataLoader[Any], device: torch.device) -> tuple[float, float]:
    """Mean loss of an example, and accuracy."""
    model.to(device)
    model.eval()
    loss, n_right, n = 0.0, 0, 0
    for batch in loader:
        labels = batch["labels"].to(device)
        logits = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        n_right += int((logits.argmax(dim=-1) == labels).sum())
        n += len(labels)
    return loss / n, n_right / n


def start(config: RunConfig, *, offset: int = 0) -> torch.device:
    """Seed, threads and device of this process."""
    torch.manual_seed(config["seed"] + offset)
    if config["num-threads"]:
        torch.set_num_threads(config["num-threads"])
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
