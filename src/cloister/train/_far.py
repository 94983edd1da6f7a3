"""Training the far side over all clients' features, inside the server enclave."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from cloister.adapters import LoraSpec, load_trainable_state, trainable_state
from cloister.errors import AdapterError, DataError, StateMismatchError
from cloister.train._batching import micro_batches, overhead_tokens
from cloister.train._checkpoint import Checkpointer, TrainState, load_trained, trained_tensors
from cloister.train._evaluate import EvalResult, evaluate_sums, merge_sums
from cloister.train._features import HELD_OUT
from cloister.train._importance import place_adapter
from cloister.train._lora_kernel import accelerate_lora
from cloister.train._loss import backward, n_targets
from cloister.train._precision import set_precision
from cloister.train._read_ahead import ReadAhead
from cloister.train._schedule import StepPlan, TrainSpec
from cloister.train._stopping import EarlyStopping, trained_features

if TYPE_CHECKING:
    from cloister.adapters import FarAdapterSpec
    from cloister.slicing import FarSide
    from cloister.train._data import TaskSpec
    from cloister.train._features import ExampleKey, Features
    from cloister.train._shards import Feature

_MOMENTS = ("exp_avg", "exp_avg_sq")
_RNG = "rng"
_BEST = "best/"
"""Prefix of the parameters of the epoch with the lowest held-out loss."""


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
        held_out_losses: after each epoch, with early stopping; else empty. *secret*, as `losses`.
        best_epoch: the epoch whose state was kept, counted from 1; None without early stopping.
        stopped_at_epoch: the epoch after which patience had run out; None where it did not.
    """

    n_steps: int
    losses: tuple[float, ...] = field(repr=False)
    elapsed_s: float = 0.0
    resumed_at: int = 0
    stopped: bool = False
    held_out_losses: tuple[float, ...] = field(default=(), repr=False)
    best_epoch: int | None = None
    stopped_at_epoch: int | None = None


@dataclass
class _Course:
    """How far a training has come: in this process, and in those before it."""

    step: int
    losses: list[float]
    elapsed_before_s: float
    began: float = field(default_factory=time.monotonic)
    n_examples: int = 0
    saved: int = 0

    @classmethod
    def behind(cls, state: TrainState | None) -> _Course:
        if state is None:
            return cls(0, [], 0.0)
        return cls(state.step, list(state.losses), state.elapsed_s, saved=state.step)

    def add(self, loss: float, n_examples: int) -> None:
        self.step, self.n_examples = self.step + 1, self.n_examples + n_examples
        self.losses.append(loss)

    @property
    def elapsed_s(self) -> float:
        return self.elapsed_before_s + time.monotonic() - self.began

    @property
    def examples_per_s(self) -> float:
        return self.n_examples / max(time.monotonic() - self.began, 1e-9)


class FarTrainer:
    """AdamW over a global shuffle of all clients' examples; adapter and head train, the backbone does not.

    The same specification, features and machine give the same bits, also when the run was killed in between and
    continues from its checkpoint. The backbone's own dropout is off: its frozen blocks are one fixed function. With
    `spec.patience` a share of the training examples is held out, and the far side ends as the epoch with the lowest
    loss on them left it.

    Args:
        far: *secret* once it trains. Gets the adapter here if it has none yet, and then `spec.precision`, for good.
        spec: steps, rates and seed.
        adapter: what to place and train; None where the caller has attached one.
        task: decides the loss.
        source: every client's features.
        checkpoint: where to seal the state; None trains without.
        regulariser: added to the loss of every step, such as FedProx's proximal term.
        on_step: told after every step.
        on_epoch: told (counted from 1) after every epoch; may evaluate.
        on_held_out: told after every epoch, with `spec.patience`: the epoch, and the metric on held-out examples, which
            is as *secret* as the losses.
        stop: when set, training seals its state after the current step and returns.

    Raises:
        DataError: there is nothing to train on, or with `spec.patience` nothing to hold out.
        ConfigError: `spec.precision` is bf16, and the processor does not compute in it.
    """

    def __init__(
        self,
        far: FarSide,
        spec: TrainSpec,
        adapter: FarAdapterSpec | None,
        task: TaskSpec,
        source: Features,
        *,
        checkpoint: Checkpointer | None = None,
        regulariser: Callable[[], Tensor] | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        on_epoch: Callable[[int], None] | None = None,
        on_held_out: Callable[[int, EvalResult], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        if not source.split("train"):
            raise DataError("no client has a training example", hint="look at the clients' `train` files and `where`")
        self._far, self._spec, self._task, self._source = far, spec, task, trained_features(source, spec)
        self._regulariser = regulariser
        self._checkpoint, self._on_step, self._on_epoch, self._stop = checkpoint, on_step, on_epoch, stop
        self._on_held_out = on_held_out
        self._keys = self._source.split("train")
        if adapter is not None:
            # What examples have chosen once is not chosen anew: their scores may round otherwise on another machine.
            was_chosen = not isinstance(adapter, LoraSpec) and adapter.needs_scores
            state = checkpoint.load() if checkpoint and was_chosen else None
            place_adapter(far, adapter, self._source, seed=spec.seed, state=state)
        accelerate_lora(far.blocks)
        precision = set_precision(far, spec.precision)
        self._stopping = EarlyStopping(spec.patience)
        self._best: dict[str, Tensor] = {}
        self._plan = StepPlan(spec, len(self._keys))
        self._weights = _example_weights(spec, self._keys)
        self._overhead = overhead_tokens(far.blocks, len(far.blocks))
        self._named = {name: p for name, p in far.named_parameters() if p.requires_grad}
        self._optimizer = _adamw(list(self._named.values()), spec)
        self._fingerprint = _fingerprint(far, replace(spec, precision=precision), adapter, task, self._source)

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
        course = _Course.behind(state)
        first = course.step
        while not (self._is_over(course) or self._is_asked_to_stop()):
            self._epoch(course)
        is_done = self._is_over(course)
        if course.step > course.saved:
            if is_done and self._best:
                load_trainable_state(self._far, self._best)
            self._save(course, is_done=is_done)
        losses, patience_ran_out = self._stopping.losses, self._stopping.is_over and course.step < self._plan.n_steps
        return TrainResult(
            course.step, tuple(course.losses), course.elapsed_s, first,
            stopped=not is_done,
            held_out_losses=tuple(losses),
            best_epoch=self._stopping.best_epoch,
            stopped_at_epoch=len(losses) if patience_ran_out else None,
        )  # fmt: skip

    def _is_over(self, course: _Course) -> bool:
        return course.step >= self._plan.n_steps or self._stopping.is_over

    def _is_asked_to_stop(self) -> bool:
        return self._stop is not None and self._stop.is_set()

    def _epoch(self, course: _Course) -> None:
        """What is left of the epoch, or up to the step after which it is asked to stop."""
        epoch = self._plan.epoch_of(course.step)
        batches = self._plan.batches(epoch)[course.step % self._plan.steps_per_epoch :]
        batches = batches[: self._plan.n_steps - course.step]
        with ReadAhead(self._source, (self._keys[i] for i in itertools.chain.from_iterable(batches))) as ahead:
            for batch in batches:
                if self._is_asked_to_stop():
                    return
                lr = self._plan.lr_at(course.step)
                loss, n_tokens = self._step(batch, ahead.take([self._keys[i] for i in batch]), lr)
                if not math.isfinite(loss):
                    raise AdapterError(f"the loss is {loss} at step {course.step + 1}", hint="lower training.lr")
                course.add(loss, len(batch))
                self._after_step(course, epoch + 1, lr, n_tokens)

    def _after_step(self, course: _Course, epoch: int, lr: float, n_tokens: int) -> None:
        ends_epoch = self._plan.ends_epoch(course.step - 1)
        if ends_epoch and self._spec.patience is not None:
            self._judge(epoch)  # before the state is saved, so that no resumed run leaves it out
        if course.step % self._spec.checkpoint_every_steps == 0 and not self._is_over(course):
            self._save(course)
        if self._on_step:
            self._on_step(
                StepInfo(
                    course.step, self._plan.n_steps, epoch, course.losses[-1], lr, n_tokens,
                    course.examples_per_s, course.elapsed_s,
                )
            )  # fmt: skip
        if ends_epoch and self._on_epoch:
            _set_modes(self._far, training=False)
            self._on_epoch(epoch)
            _set_modes(self._far, training=True)

    def _judge(self, epoch: int) -> None:
        """Keeps the state where it is the best on held-out examples so far."""
        _set_modes(self._far, training=False)
        sums = evaluate_sums(self._far, self._source, HELD_OUT)
        _set_modes(self._far, training=True)
        if not any(found.n_targets for found in sums):
            raise DataError("no held-out example has a token that carries loss", hint="train without training.patience")
        found = merge_sums(sums, self._task)
        if self._stopping.add(found.loss):
            self._best = trainable_state(self._far)
        if self._on_held_out:
            self._on_held_out(epoch, found)

    def _step(self, batch: Sequence[int], features: Sequence[Feature], lr: float) -> tuple[float, int]:
        """One optimiser step over the examples at these positions. Returns its loss and tokens."""
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

    def _save(self, course: _Course, *, is_done: bool = False) -> None:
        course.saved = course.step
        if self._checkpoint is None:
            return
        tensors: dict[str, Tensor] = trained_tensors(self._far)
        for name, parameter in self._named.items():
            moments = self._optimizer.state[parameter]
            tensors |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        if not is_done:
            tensors |= {_BEST + name: tensor for name, tensor in self._best.items()}
        tensors[_RNG] = torch.get_rng_state()
        self._checkpoint.save(
            TrainState(
                course.step, self._plan.n_steps, self._fingerprint, tensors, tuple(course.losses), course.elapsed_s,
                held_out_losses=tuple(self._stopping.losses),
                is_done=is_done,
            )
        )  # fmt: skip

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
        self._stopping.losses = list(state.held_out_losses)
        self._best = {n.removeprefix(_BEST): t.clone() for n, t in state.tensors.items() if n.startswith(_BEST)}
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


def _fingerprint(
    far: FarSide, spec: TrainSpec, adapter: FarAdapterSpec | None, task: TaskSpec, source: Features
) -> str:
    """Hex SHA-256 of everything that the course of training depends on."""
    told = asdict(spec)
    del told["checkpoint_every_steps"]  # how often the state is saved changes nothing about it
    if spec.patience is None:
        del told["held_out"]
    shapes = {name: list(p.shape) for name, p in far.named_parameters() if p.requires_grad}
    of_adapter = asdict(adapter) if adapter else {}
    parts = [told, of_adapter, asdict(task), source.fingerprint, far.info.family, far.cut_layer, shapes]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
