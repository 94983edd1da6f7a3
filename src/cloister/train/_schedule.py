"""What a training run does at each step: how many steps, which examples, which learning rate. Pure arithmetic.

Everything here is a function of the specification and the number of examples, so that a run that was interrupted
anywhere continues with the same examples at the same rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cloister.errors import ConfigError, Problem
from cloister.train._precision import Wanted

Schedule = Literal["cosine", "linear", "constant"]

MAX_HELD_OUT = 0.5
_MAX_SEED = 2**63


@dataclass(frozen=True)
class TrainSpec:
    """How the far side is trained. Public: every party of a run agrees on it.

    Attributes:
        epochs: passes over all training examples.
        batch_size: examples that are on the machine at once.
        grad_accumulation: batches per optimiser step.
        lr: peak learning rate.
        weight_decay: of AdamW, on matrices; biases are not decayed.
        warmup_ratio: share of all steps over which the rate rises from near 0 to `lr`.
        schedule: what the rate does afterwards: fall to 0 along a cosine or a line, or stay.
        max_grad_norm: the gradient's norm is clipped to this.
        seed: of the order of examples, the new head and the adapter.
        checkpoint_every_steps: how often the state is sealed to disk; always also at the end.
        client_weights: how much one example of a client counts, by name; 1 for a client that is not listed. The
            weights are scaled so that the mean over all examples is 1, so they do not change the learning rate.
        max_steps: stop after so many optimiser steps, if that is sooner.
        precision: "fp32"; "bf16" for products and activations in bfloat16, with float32 for what trains; or "auto",
            which is bf16 where the processor has it.
        patience: stop after so many epochs in a row without a lower held-out loss, and keep the state of the lowest;
            None trains all epochs and keeps the last.
        held_out: share of every client's training examples that is held out for that (`Features.hold_out`); without
            effect where patience is None.
    """

    epochs: int = 3
    batch_size: int = 16
    grad_accumulation: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    schedule: Schedule = "cosine"
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoint_every_steps: int = 50
    client_weights: tuple[tuple[str, float], ...] | None = None
    max_steps: int | None = None
    precision: Wanted = "fp32"
    patience: int | None = None
    held_out: float = 0.1

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "batch_size", "grad_accumulation", "checkpoint_every_steps")
        problems = [Problem(f"training.{key}", "must be at least 1") for key in at_least_one if getattr(self, key) < 1]
        for key in ("max_steps", "patience"):
            if (given := getattr(self, key)) is not None and given < 1:
                problems.append(Problem(f"training.{key}", "must be at least 1"))
        if self.precision not in get_args(Wanted):
            problems.append(Problem("training.precision", f"{self.precision!r} is not fp32, bf16 or auto"))
        if not 0 < self.held_out <= MAX_HELD_OUT:
            problems.append(Problem("training.held_out", f"must be above 0 and at most {MAX_HELD_OUT}"))
        problems += [
            Problem(f"training.{key}", "must be a positive number")
            for key in ("lr", "max_grad_norm")
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0)
        ]
        if not 0 <= self.warmup_ratio <= 1:
            problems.append(Problem("training.warmup_ratio", "must be between 0 and 1"))
        if not 0 <= self.seed < _MAX_SEED:
            problems.append(Problem("training.seed", "must be between 0 and 2**63 - 1"))
        if any(not (math.isfinite(weight) and weight > 0) for _, weight in self.client_weights or ()):
            problems.append(Problem("training.client_weights", "must be positive numbers"))
        if problems:
            raise ConfigError(problems)

    @property
    def examples_per_step(self) -> int:
        """Examples that one optimiser step sees (the last step of an epoch may see fewer)."""
        return self.batch_size * self.grad_accumulation


@dataclass(frozen=True)
class StepPlan:
    """The steps of one run over `n_examples` training examples."""

    spec: TrainSpec
    n_examples: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.n_examples / self.spec.examples_per_step)

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the whole run."""
        total = self.steps_per_epoch * self.spec.epochs
        return total if self.spec.max_steps is None else min(total, self.spec.max_steps)

    @property
    def n_warmup_steps(self) -> int:
        return math.ceil(self.n_steps * self.spec.warmup_ratio)

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        warmup = self.n_warmup_steps
        if step < warmup:
            return self.spec.lr * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.n_steps - warmup)
        if self.spec.schedule == "cosine":
            return self.spec.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if self.spec.schedule == "linear":
            return self.spec.lr * (1 - progress)
        return self.spec.lr

    def epoch_of(self, step: int) -> int:
        """Epoch of a step, both counted from 0."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last of its epoch, or of the run."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.n_steps

    def batches(self, epoch: int) -> list[list[int]]:
        """The examples of each step of an epoch (counted from 0), as positions in the canonical order.

        A global shuffle: one permutation over all clients' examples, drawn from the seed and the epoch alone.
        """
        generator = torch.Generator().manual_seed((self.spec.seed + epoch) % _MAX_SEED)
        order: list[int] = torch.randperm(self.n_examples, generator=generator).tolist()
        size = self.spec.examples_per_step
        return [order[i : i + size] for i in range(0, len(order), size)]
