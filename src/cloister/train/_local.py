"""One client's rounds of Method 1: the whole backbone, its adapter, its text, all in the client's own enclave."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from cloister.adapters import AdapterState, adapter_spec, adapter_state, difference, load_adapter_state, trainable_state
from cloister.errors import ConfigError, FederationError
from cloister.train._evaluate import EvalSums, evaluate_sums, predict
from cloister.train._far import FarTrainer, StepInfo, TrainResult
from cloister.train._private_round import check_private_rounds, private_round, rounds_epsilon
from cloister.train._proximal import proximal_term
from cloister.train._tokens import question_features

if TYPE_CHECKING:
    from cloister.adapters import StateSpec
    from cloister.slicing import WholeSide
    from cloister.train._data import TaskSpec
    from cloister.train._dp_sgd import DpSgdSpec
    from cloister.train._features import MemoryFeatures
    from cloister.train._schedule import TrainSpec


@dataclass(frozen=True)
class LocalUpdate:
    """What a client's training of one round gives.

    Attributes:
        update: encoded difference to the global adapter, for the aggregation. *Secret*.
        n_examples: trained on.
        losses: of each step. *Secret*, unless the job declares `live_metrics`.
        wall_s, cpu_s: of this process, for the whole round.
    """

    update: bytes = field(repr=False)
    n_examples: int
    losses: tuple[float, ...] = field(repr=False)
    wall_s: float
    cpu_s: float


class LocalTraining:
    """Trains and measures global adapters on one client's examples; everything in it is *secret*.

    Each round starts from the global adapter with a fresh optimiser, as FedAvg has it, and from the job's seed and the
    round's number alone, so that a round that is done again gives the same update. With DP-SGD it does not: then nobody
    can know who is in a batch and what the noise is.

    Args:
        side: the backbone with its adapter; its frozen linears may be masked layers.
        source: the client's tokens.
        spec: one round's steps, rates and seed; in float32, and over all epochs.
        task: decides the loss.
        proximal_mu: weight of FedProx's term; 0 for none.
        dp: DP-SGD, which leaves no room for a proximal term; None for none.
        on_step: told after every step.
        stop: when set, a round ends after the current step, without an update.

    Raises:
        ConfigError: `spec` asks for another precision, or for early stopping.
        ConfigError, UnsupportedLayerError: DP-SGD cannot be had; see `check_private_rounds`.
    """

    def __init__(
        self,
        side: WholeSide,
        source: MemoryFeatures,
        spec: TrainSpec,
        task: TaskSpec,
        *,
        proximal_mu: float = 0.0,
        dp: DpSgdSpec | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        if spec.precision != "fp32" or spec.patience is not None:
            raise ConfigError("training.precision and training.patience are for the far side of Method 2")
        self._side = side
        self._peft: Any = side.peft
        self._source = source
        self._spec = spec
        self._task = task
        self._mu = proximal_mu
        self._dp = dp
        self._on_step = on_step
        self._stop = stop
        if dp is not None:
            if proximal_mu:
                raise ConfigError("DP-SGD has no place for a proximal term", hint="use another rule than fedprox")
            check_private_rounds(side, self.n_examples("train"), dp)

    @property
    def spec(self) -> StateSpec:
        """What the adapter's states look like. *Public*."""
        return adapter_spec(self._peft)

    def n_examples(self, split: str) -> int:
        """Of this client; 0 where it has no such split."""
        return len(self._source.split(split))

    def train(self, adapter: bytes, n_round: int) -> LocalUpdate:
        """One round from this global adapter.

        Raises:
            StateMismatchError, WireError: the adapter is of another shape, or does not parse.
            AdapterError: the loss is not finite any more.
            FederationError: stopped before the round's end.
            OffloadError, PadError: a masked layer failed.
        """
        start = AdapterState.parse(adapter, self.spec)
        load_adapter_state(self._peft, start)
        wall, cpu = time.monotonic(), time.process_time()
        result = self._round(n_round)
        if result.stopped:
            raise FederationError("stopped by the host", hint="resume the run: the round is done again")
        update = difference(adapter_state(self._peft), start).to_bytes()
        return LocalUpdate(
            update,
            self.n_examples("train"),
            result.losses,
            time.monotonic() - wall,
            time.process_time() - cpu,
        )

    def _round(self, n_round: int) -> TrainResult:
        if self._dp is not None:
            return private_round(self._side, self._source, self._spec, self._dp, on_step=self._on_step, stop=self._stop)
        regulariser: Callable[[], torch.Tensor] | None = None
        if self._mu:
            fixed = {name: tensor.clone() for name, tensor in trainable_state(self._side).items()}
            regulariser = lambda: proximal_term(self._side, fixed, self._mu)  # noqa: E731
        return FarTrainer(
            self._side,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # it has what a far side has
            replace(self._spec, seed=(self._spec.seed + n_round) % (1 << 63), client_weights=None),
            None,
            self._task,
            self._source,
            regulariser=regulariser,
            on_step=self._on_step,
            stop=self._stop,
        ).train()

    def epsilon(self, n_rounds: int) -> float | None:
        """What so many rounds spend on each training example, at the spec's delta; None without DP-SGD. *Public*."""
        if self._dp is None:
            return None
        return rounds_epsilon(self._spec, self.n_examples("train"), self._dp, n_rounds)

    def evaluate(self, adapter: bytes) -> EvalSums | None:
        """What this client's held-out examples say of a global adapter, which stays loaded; None without any."""
        load_adapter_state(self._peft, AdapterState.parse(adapter, self.spec))
        if not self.n_examples("test"):
            return None
        return evaluate_sums(self._side, self._source)[0]  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def complete(
    side: WholeSide, prompt: str, tokenizer: Any, task: TaskSpec, max_new_tokens: int, *, model_max_length: int | None
) -> dict[str, Any]:
    """Greedy completion of a prompt inside this enclave; every token is computed over the whole text. *Secret*."""
    [feature] = question_features([prompt], tokenizer, task, model_max_length=model_max_length)
    ids, made = feature.hidden, []
    limit = model_max_length or math.inf
    while len(made) < max_new_tokens and len(ids) < limit:
        token = int(predict(side, [replace(feature, hidden=ids, labels=None)], task)[0])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
        ids = torch.cat((ids, torch.tensor([token])))
    return {"completion": tokenizer.decode(made, skip_special_tokens=True), "n_tokens": len(made)}
