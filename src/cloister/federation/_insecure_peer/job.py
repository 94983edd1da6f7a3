"""What the unprotected peer is asked to train."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STATE_FILE, RESULT_FILE = "final_model.pt", "result.json"
"""What the ServerApp leaves in its result folder; the result comes last."""


def round_file(folder: Path, n_round: int) -> Path:
    """An empty file of that folder, there from the end of the round on."""
    return folder / f"round-{n_round}.done"


@dataclass(frozen=True)
class InsecurePeerJob:
    """What is trained in the clear, on whose data. Nothing of it is protected.

    Files are JSON lines: `text` and `label` (an index), for sequence-classification with a sentence encoder; or tokens
    that are there already, `input_ids` with `label` or, for causal-lm, `labels` (-100 where there is no loss), and
    `token_type_ids` where the model tells the texts of a pair apart. The defaults are those of Flower's tutorial.

    Attributes:
        model: the backbone's folder.
        train: one file for each client.
        test: the common test set.
        n_labels: number of classes; 0 for causal-lm.
        max_length: most tokens of a text; without effect on tokens.
        layers: "all", as a user would have it; "upper" puts LoRA on the blocks from `cut_layer` on only.
        epochs: in all; each round has `epochs / rounds` local ones.
        rounds: None means one for each epoch.
        evaluate_every_round: also have the clients evaluate the global model after every round, as the tutorial does.
        num_threads: of torch in each app process; 0 leaves the choice to torch, as a user would.
        adapter: LoRA, or the prefix of P-tuning v2.
        backbone_dropout: train with the dropout of the model's configuration.
        initial: a state of `task`'s own names to begin with; None lets the app draw one.
        task: what the model learns to do.
        pooling: what the classification head reads.
        targets: names of LoRA's linears with commas between, or "all-linear".
        dropout, use_rslora: of LoRA.
        schedule, warmup_ratio: of the learning rate, anew in every round.
        max_grad_norm: 0 clips nothing.
    """

    model: Path
    train: tuple[Path, ...]
    test: Path
    n_labels: int
    max_length: int = 128
    layers: Literal["all", "upper"] = "all"
    cut_layer: int = 3
    r: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 32
    epochs: int = 3
    rounds: int | None = None
    seed: int = 0
    evaluate_every_round: bool = False
    num_threads: int = 0
    adapter: Literal["lora", "prefix"] = "lora"
    prefix_tokens: int = 16
    backbone_dropout: bool = True
    initial: Path | None = None
    task: Literal["sequence-classification", "causal-lm"] = "sequence-classification"
    pooling: Literal["mean", "cls", "last"] = "mean"
    targets: str = "query,key,value,dense"
    dropout: float = 0.0
    use_rslora: bool = False
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    warmup_ratio: float = 0.0
    max_grad_norm: float = 0.0

    def config(self, result_dir: Path) -> dict[str, str | int | float | bool]:
        """The keys of the app's `[tool.flwr.app.config]`.

        Raises:
            ValueError: the epochs do not divide into the rounds.
        """
        rounds = self.rounds or self.epochs
        if self.epochs % rounds:
            raise ValueError(f"{self.epochs} epochs do not divide into {rounds} rounds")
        return {
            "num-server-rounds": rounds,
            "local-epochs": self.epochs // rounds,
            "fraction-evaluate": float(self.evaluate_every_round),
            "num-clients": len(self.train),
            "model-path": str(self.model),
            "task": self.task,
            "pooling": self.pooling,
            "num-labels": self.n_labels,
            "max-length": self.max_length,
            "adapter": self.adapter,
            "prefix-tokens": self.prefix_tokens,
            "backbone-dropout": self.backbone_dropout,
            "initial-path": str(self.initial or ""),
            "lora-r": self.r,
            "lora-alpha": float(self.alpha),
            "lora-dropout": float(self.dropout),
            "lora-targets": self.targets,
            "use-rslora": self.use_rslora,
            "first-layer": self.cut_layer if self.layers == "upper" else 0,
            "learning-rate": self.lr,
            "weight-decay": self.weight_decay,
            "schedule": self.schedule,
            "warmup-ratio": float(self.warmup_ratio),
            "max-grad-norm": float(self.max_grad_norm),
            "batch-size": self.batch_size,
            "seed": self.seed,
            "num-threads": self.num_threads,
            "test-path": str(self.test),
            "result-dir": str(result_dir),
        }

    def run_config(self, result_dir: Path) -> str:
        """The same for `flwr run --run-config`."""
        return " ".join(f"{name}={json.dumps(value)}" for name, value in self.config(result_dir).items())
