"""Training the far side over all clients' features, inside the server enclave."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from cloister.adapters import add_lora
from cloister.errors import AdapterError, DataError, StateMismatchError
from cloister.train._batching import micro_batches, overhead_tokens
from cloister.train._checkpoint import Checkpointer, TrainState, load_trained, trained_tensors
from cloister.train._lora_kernel import accelerate_lora
from cloister.train._loss import backward, n_targets
from cloister.train._schedule import StepPlan, TrainSpec

if TYPE_CHECKING:
    from cloister.adapters import LoraSpec
    from cloister.slicing import FarSide
    from cloister.train._data import TaskSpec
    from cloister.train._features import ExampleKey, Features

_MOMENTS = ("exp_avg", "exp_avg_sq")
_RNG = "rng"


@dataclass(frozen=True)
class StepInfo:
    """One optimiser step as its observers see it. The loss is *secret* unless the job declares `live_metrics`.

    Attributes:
        step: steps done, this one included.
        n_steps: of the whole run.
        epoch: counted from 1.
        loss: mean over the step's labels, or over the tokens that carry loss.
        lr: learning rate of this step.
        n_tokens: boundary vectors that it read.
        examples_per_s: since this process began to train.
        elapsed_s: training time so far, in all processes of this run.
    """

    step: int
    n_steps: int
    epoch: int
    loss: float
    lr: float
    n_tokens: int
    examples_per_s: float
    elapsed_s: float


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        n_steps: steps done, earlier processes' included.
        losses: of each step. *secret*, as in StepInfo.
        elapsed_s: training time, in all processes of this run.
        resumed_at: steps that were done before this process; 0 for a fresh run.
        stopped: whether it was asked to stop before the end.
    """

    n_steps: int
    losses: tuple[float, ...] = field(repr=False)
    elapsed_s: float = 0.0
    resumed_at: int = 0
    stopped: bool = False


class FarTrainer:
    """AdamW over a global shuffle of all clients' examples; adapter and head train, the backbone does not.

    The same specification, features and machine give the same bits, also when the run was killed in between and
    continues from its checkpoint. The backbone's own dropout is off: its frozen blocks are one fixed function.

    Args:
        far: *secret* once it trains. Gets the adapter here if it has none yet.
        spec: steps, rates and seed.
        lora: the adapter; None where the caller has attached one.
        task: decides the loss.
        source: every client's features.
        checkpoint: where to seal the state; None trains without.
        regulariser: added to the loss of every step, such as FedProx's proximal term.
        on_step: told after every step.
        on_epoch: told (counted from 1) after every epoch; may evaluate.
        stop: when set, training seals its state after the current step and returns.

    Raises:
        DataError: there is nothing to train on.
    """

    def __init__(
        self,
        far: FarSide,
        spec: TrainSpec,
        lora: LoraSpec | None,
        task: TaskSpec,
        source: Features,
        *,
        checkpoint: Checkpointer | None = None,
        regulariser: Callable[[], Tensor] | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        on_epoch: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._far, self._spec, self._source = far, spec, source
        self._regulariser = regulariser
        self._checkpoint, self._on_step, self._on_epoch, self._stop = checkpoint, on_step, on_epoch, stop
        self._keys = source.split("train")
        if not self._keys:
            raise DataError("no client has a training example", hint="look at the clients' `train` files and `where`")
        if lora and not any(isinstance(module, BaseTunerLayer) for module in far.blocks.modules()):
            add_lora(far, lora, seed=spec.seed)
        accelerate_lora(far.blocks)
        self._plan = StepPlan(spec, len(self._keys))
        self._weights = _example_weights(spec, self._keys)
        self._overhead = overhead_tokens(far.blocks, len(far.blocks))
        self._named = {name: p for name, p in far.named_parameters() if p.requires_grad}
        self._optimizer = _adamw(list(self._named.values()), spec)
        self._fingerprint = _fingerprint(far, spec, lora, task, source)

    def train(self) -> TrainResult:
        """Trains to the end, or until `stop` is set; continues from the checkpoint if there is one.

        Raises:
            StateMismatchError: the checkpoint is of another job, adapter or data.
            DecryptionError, StoreError: it does not open, or cannot be read or written.
            AdapterError: the loss is not finite any more.
        """
        # LoRA's dropout draws from torch's global generator, so the run gets that for itself, with its own seed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._spec.seed)
            state = self._checkpoint.load(self._fingerprint) if self._checkpoint else None
            if state:
                self._restore(state)
            _set_modes(self._far, training=True)
            try:
                return self._run(state)
            finally:
                _set_modes(self._far, training=False)

    def _run(self, state: TrainState | None) -> TrainResult:
        first, losses = (state.step, list(state.losses)) if state else (0, [])
        elapsed_before = state.elapsed_s if state else 0.0
        began, n_done, saved = time.monotonic(), 0, first
        step, epoch, batches = first, -1, []
        while step < self._plan.n_steps and not (self._stop and self._stop.is_set()):
            if self._plan.epoch_of(step) != epoch:
                epoch = self._plan.epoch_of(step)
                batches = self._plan.batches(epoch)
            batch = batches[step % self._plan.steps_per_epoch]
            lr = self._plan.lr_at(step)
            loss, n_tokens = self._step(batch, lr)
            if not math.isfinite(loss):
                raise AdapterError(f"the loss is {loss} at step {step + 1}", hint="lower training.lr")
            step, n_done = step + 1, n_done + len(batch)
            losses.append(loss)
            elapsed = elapsed_before + time.monotonic() - began
            if step % self._spec.checkpoint_every_steps == 0:
                self._save(step, losses, elapsed)
                saved = step
            if self._on_step:
                rate = n_done / max(time.monotonic() - began, 1e-9)
                self._on_step(StepInfo(step, self._plan.n_steps, epoch + 1, loss, lr, n_tokens, rate, elapsed))
            if self._on_epoch and self._plan.ends_epoch(step - 1):
                self._tell_epoch(epoch + 1)
        elapsed = elapsed_before + time.monotonic() - began
        if step > saved:
            self._save(step, losses, elapsed)
        return TrainResult(step, tuple(losses), elapsed, first, stopped=step < self._plan.n_steps)

    def _step(self, batch: Sequence[int], lr: float) -> tuple[float, int]:
        """One optimiser step over the examples at these positions. Returns its loss and tokens."""
        features = [self._source.get(self._keys[i]) for i in batch]
        lengths = [len(feature.hidden) for feature in features]
        denominator = max(1, sum(n_targets(feature) for feature in features))
        weights = [self._weights[i] / denominator for i in batch]
        loss = 0.0
        for piece in micro_batches(lengths, overhead=self._overhead, max_examples=self._spec.batch_size):
            loss += backward(self._far, [features[i] for i in piece], [weights[i] for i in piece])
        if self._regulariser is not None:
            self._regulariser().backward()
        torch.nn.utils.clip_grad_norm_(self._named.values(), self._spec.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss, sum(lengths)

    def _tell_epoch(self, epoch: int) -> None:
        assert self._on_epoch is not None  # noqa: S101 - for the type checker
        _set_modes(self._far, training=False)
        self._on_epoch(epoch)
        _set_modes(self._far, training=True)

    def _save(self, step: int, losses: list[float], elapsed_s: float) -> None:
        if self._checkpoint is None:
            return
        tensors: dict[str, Tensor] = trained_tensors(self._far)
        for name, parameter in self._named.items():
            moments = self._optimizer.state[parameter]
            tensors |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        tensors[_RNG] = torch.get_rng_state()
        self._checkpoint.save(
            TrainState(step, self._plan.n_steps, self._fingerprint, tensors, tuple(losses), elapsed_s)
        )

    def _restore(self, state: TrainState) -> None:
        load_trained(self._far, state)
        for name, parameter in self._named.items():
            try:
                moments = {moment: state.tensors[f"{moment}/{name}"] for moment in _MOMENTS}
            except KeyError:
                raise StateMismatchError(f"the checkpoint has no optimiser state of {name}") from None
            # Copied into memory of torch's own, whose alignment the kernels' rounding may depend on.
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                **{moment: torch.empty_like(parameter).copy_(tensor) for moment, tensor in moments.items()},
            }
        torch.set_rng_state(state.tensors[_RNG].clone())


def _adamw(parameters: list[torch.nn.Parameter], spec: TrainSpec) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=spec.lr, fused=True)


def _example_weights(spec: TrainSpec, keys: Sequence[ExampleKey]) -> list[float]:
    if not spec.client_weights:
        return [1.0] * len(keys)
    given = dict(spec.client_weights)
    raw = [given.get(key.client, 1.0) for key in keys]
    mean = sum(raw) / len(raw)
    return [weight / mean for weight in raw]


def _set_modes(far: FarSide, *, training: bool) -> None:
    far.eval()
    for module in far.blocks.modules():
        if training and isinstance(module, BaseTunerLayer):
            module.lora_dropout.train()  # type: ignore[union-attr,operator]


def _fingerprint(far: FarSide, spec: TrainSpec, lora: LoraSpec | None, task: TaskSpec, source: Features) -> str:
    """Hex SHA-256 of everything that the course of training depends on."""
    told = asdict(spec)
    del told["checkpoint_every_steps"]  # how often the state is saved changes nothing about it
    shapes = {name: list(p.shape) for name, p in far.named_parameters() if p.requires_grad}
    of_adapter = asdict(lora) if lora else {}
    parts = [told, of_adapter, asdict(task), source.fingerprint, far.info.family, far.cut_layer, shapes]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
