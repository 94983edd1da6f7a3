"""One round of DP-SGD in a client's enclave (Method 1): drawn batches, clipped examples, exact noise, AdamW.

What leaves the enclave of it is the adapter alone, and that is what epsilon speaks of. Losses are of the very examples,
and no noise is added to them; times and sizes tell of the draws.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from cloister.errors import AdapterError, ConfigError, Problem
from cloister.train._dp_sgd import DpSgdSpec, PrivateTraining, check_private, make_private
from cloister.train._far import StepInfo, TrainResult, _adamw, _set_modes
from cloister.train._loss import backward, n_targets
from cloister.train._privacy import gaussian_epsilon
from cloister.train._schedule import StepPlan

if TYPE_CHECKING:
    from cloister.slicing import WholeSide
    from cloister.train._features import MemoryFeatures
    from cloister.train._schedule import TrainSpec
    from cloister.train._shards import Feature


def check_private_rounds(side: WholeSide, n_examples: int, dp: DpSgdSpec) -> None:
    """What `private_round` would refuse, before anything is trained.

    Raises:
        ConfigError: the extra `dp` is not installed, or delta says nothing of so few examples.
        UnsupportedLayerError: Opacus cannot take this model apart by example; names the layers.
    """
    if dp.delta * n_examples >= 1:
        problem = Problem(
            "training.privacy.delta",
            f"{dp.delta:g} is not below 1/{n_examples}, one over the number of training examples",
            "lower it: with such a delta a whole example may be published",
        )
        raise ConfigError([problem], hint=problem.hint)
    check_private(side)
    side.eval()


def rounds_epsilon(spec: TrainSpec, n_examples: int, dp: DpSgdSpec, n_rounds: int) -> float:
    """Epsilon that so many rounds spend on each example, at the spec's delta: an upper bound. *Public*."""
    n_steps = n_rounds * StepPlan(spec, n_examples).n_steps
    rate = min(1.0, spec.examples_per_step / n_examples)
    return gaussian_epsilon(dp.noise_multiplier, n_steps, delta=dp.delta, sample_rate=rate)


def private_round(
    side: WholeSide,
    source: MemoryFeatures,
    spec: TrainSpec,
    dp: DpSgdSpec,
    *,
    on_step: Callable[[StepInfo], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Trains what trains in `side`, in place. Each batch is computed at once, whatever its size.

    Every example counts alike: of its tokens' losses the mean is taken. As many steps as without privacy; in each an
    example is by itself with the probability `examples_per_step / n`. No seed decides that, so a round that is done
    again gives another adapter.

    Args:
        side: the backbone with its adapter; *secret*. Without LoRA that was replaced by `accelerate_lora`, of which
            Opacus sees nothing.
        source: the client's tokens; *secret*.
        spec: steps, rates, mean size of a batch. Neither its seed nor its `max_grad_norm` is read.
        dp: clipping and noise.
        on_step: told after every step, also of one that nobody was drawn for; its loss is *secret*.
        stop: when set, ends after the current step.

    Raises:
        AdapterError: the loss is not finite any more.
        ConfigError, UnsupportedLayerError, DataError: as `make_private`.
        OffloadError, PadError: a masked layer failed.
    """
    examples = [source.get(key) for key in source.split("train")]
    trained = [parameter for parameter in side.parameters() if parameter.requires_grad]
    loader: DataLoader[Feature] = DataLoader(examples, batch_size=spec.examples_per_step, collate_fn=list)  # type: ignore[arg-type]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # torch says so of the first layers with Opacus's hooks; what these compute there is right.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        # Which dropout an example gets depends on who else is in its batch: nobody may know it, so no seed of the job.
        torch.manual_seed(int.from_bytes(os.urandom(8), "big"))
        private = make_private(side, _adamw(trained, spec), loader, dp)
        try:
            _train_adapter(side)
            return _run(private, side, StepPlan(spec, len(examples)), on_step, stop)
        finally:
            private.close()
            side.eval()


def _train_adapter(side: WholeSide) -> None:
    """The backbone stays one fixed function, without dropout; Opacus passes over layers that are not in training."""
    _set_modes(side, training=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # it has what a far side has
    for module in side.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True


def _run(
    private: PrivateTraining,
    side: WholeSide,
    plan: StepPlan,
    on_step: Callable[[StepInfo], None] | None,
    stop: threading.Event | None,
) -> TrainResult:
    losses: list[float] = []
    began, n_seen = time.monotonic(), 0
    while len(losses) < plan.n_steps and not (stop and stop.is_set()):
        step, lr = len(losses), plan.lr_at(len(losses))
        for group in private.optimizer.param_groups:
            group["lr"] = lr
        batch: Sequence[Feature] = private.draw() or ()
        loss = _step(private, side, batch)
        if not math.isfinite(loss):
            raise AdapterError(f"the loss is {loss} at step {step + 1}", hint="lower training.lr")
        losses.append(loss)
        n_seen += len(batch)
        if on_step:
            elapsed = time.monotonic() - began
            n_tokens = sum(len(feature.hidden) for feature in batch)
            info = StepInfo(step + 1, plan.n_steps, plan.epoch_of(step) + 1, loss, lr, n_tokens,
                            n_seen / max(elapsed, 1e-9), elapsed)  # fmt: skip
            on_step(info)
    return TrainResult(len(losses), tuple(losses), time.monotonic() - began, stopped=len(losses) < plan.n_steps)


def _step(private: PrivateTraining, side: WholeSide, batch: Sequence[Feature]) -> float:
    """One step, and the batch's mean loss. Who has no token with loss has no gradient, and takes part all the same."""
    counts = [n_targets(feature) for feature in batch]
    if not any(counts):
        private.step_on_noise()
        return 0.0
    private.optimizer.zero_grad(set_to_none=True)
    weights = [1 / (len(batch) * max(1, n)) for n in counts]
    loss = backward(side, batch, weights)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    if math.isfinite(loss):
        private.optimizer.step()
    return loss
