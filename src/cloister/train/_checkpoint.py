"""Sealed training state: what a killed server enclave continues from, and what prediction later loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from cloister import wire
from cloister.adapters import SpfSupport, load_trainable_state, placed_support, trainable_state
from cloister.channel import read_sealed, write_sealed
from cloister.errors import StateMismatchError, WireError

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 2
TRAINED = "trained/"
"""Prefix of the adapter's and head's own tensors; the others are the optimiser's, and the best epoch's."""
SUPPORT = "support/"
"""Prefix of SPF's choice of rows."""

_MAX_BYTES = 1 << 34


@dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on. *secret*: it holds the adapter and head.

    Attributes:
        step: optimiser steps done.
        n_steps: of the whole run.
        fingerprint: of job, adapter and data; a run continues only from a state of its own.
        tensors: parameters, optimiser moments and the random generator, by name.
        losses: of every step so far.
        elapsed_s: training time so far.
        held_out_losses: of every epoch so far, with early stopping.
        is_done: training is over, and the parameters are what it gave.
    """

    step: int
    n_steps: int
    fingerprint: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    losses: tuple[float, ...] = field(default=(), repr=False)
    elapsed_s: float = 0.0
    held_out_losses: tuple[float, ...] = field(default=(), repr=False)
    is_done: bool = False


class Checkpointer:
    """One sealed file that is replaced as training goes on.

    A host can put back an older file of the same run. Training then repeats steps, which changes nothing about its
    result: the same steps give the same bits.

    Args:
        path: the file; its folder must exist.
        key: *secret*, 32 bytes, derived from the enclave's measurement.
        label: what is sealed; another run's or job's label does not open.
    """

    def __init__(self, path: Path | str, key: bytes, label: str) -> None:
        self.path = Path(path)
        self._key = key
        self._label = label

    def __repr__(self) -> str:
        return f"Checkpointer({str(self.path)!r})"

    def save(self, state: TrainState) -> None:
        """Seals a state over the one before, whole or not at all.

        Raises:
            StoreFullError, StoreError: the disk did not take it; the state before is still there.
        """
        meta = {
            "format": FORMAT,
            "step": state.step,
            "n_steps": state.n_steps,
            "fingerprint": state.fingerprint,
            "losses": list(state.losses),
            "elapsed_s": state.elapsed_s,
            "held_out_losses": list(state.held_out_losses),
            "is_done": state.is_done,
        }
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
        body = wire.enc(json.dumps(meta).encode(), save_safetensors(tensors))
        write_sealed(self.path, body, key=self._key, label=self._label, version=state.step)

    def load(self, fingerprint: str | None = None) -> TrainState | None:
        """The last state that was saved; None if there is none.

        Args:
            fingerprint: of the run that wants to continue.

        Raises:
            DecryptionError: it was altered, or sealed by other code or under another label.
            StateMismatchError: it is of another job, adapter or data.
            StoreError: it cannot be read.
        """
        if not self.path.exists():
            return None
        _, body = read_sealed(self.path, key=self._key, label=self._label)
        try:
            meta_bytes, tensor_bytes = wire.dec(body, 2, max_bytes=_MAX_BYTES)
            meta: dict[str, Any] = json.loads(meta_bytes)
            tensors = load_safetensors(tensor_bytes)
            if meta.pop("format") != FORMAT:
                raise ValueError
            losses = {name: tuple(meta.pop(name)) for name in ("losses", "held_out_losses")}
            state = TrainState(tensors=tensors, **losses, **meta)
        except (WireError, SafetensorError, ValueError, KeyError, TypeError):
            raise StateMismatchError(f"{self.path} is a checkpoint of another release") from None
        if fingerprint is not None and state.fingerprint != fingerprint:
            raise StateMismatchError(
                f"{self.path} is a checkpoint of another job, adapter or data",
                hint="continue the run with the job file and data it was started with, or start a new run",
            )
        return state

    def load_final(self, far: nn.Module) -> None:
        """Puts the tuned adapter and head into a far side that has the same adapter placed.

        Raises:
            StateMismatchError: there is no finished state, or it does not fit.
            DecryptionError, StoreError: as `load`.
        """
        load_trained(far, self.finished())

    def finished(self) -> TrainState:
        """The state of a training that is over.

        Raises:
            StateMismatchError: there is none.
            DecryptionError, StoreError: as `load`.
        """
        state = self.load()
        if state is None or not state.is_done:
            raise StateMismatchError(
                f"{self.path} holds no finished training", hint="continue it with `cloister run --resume`"
            )
        return state


def trained_tensors(far: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapter's and head's tensors, as a state names them, and the support of SPF."""
    return {TRAINED + name: tensor for name, tensor in trainable_state(far).items()} | support_tensors(far)


def support_tensors(far: nn.Module) -> dict[str, Tensor]:
    """The support of SPF, as a state or a release names it; empty where there is no SPF."""
    support = placed_support(far)
    return {SUPPORT + name: tensor for name, tensor in support.tensors().items()} if support else {}


def saved_support(tensors: Mapping[str, Tensor]) -> SpfSupport | None:
    """The support among a state's, or a release's, tensors; None where there is no SPF.

    Raises:
        StateMismatchError: it is not whole.
    """
    found = {name.removeprefix(SUPPORT): tensor for name, tensor in tensors.items() if name.startswith(SUPPORT)}
    return SpfSupport.from_tensors(found) if found else None


def require_support(far: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers of other rows than those that are placed: they have the same shapes.

    Raises:
        StateMismatchError: the supports differ, or only one of the two has one.
    """
    if saved_support(tensors) != placed_support(far):
        raise StateMismatchError(
            "the saved state is of another SPF support than the one that is placed",
            key="support",
            hint="it was saved with another criterion, share, seed or data",
        )


def load_trained(far: nn.Module, state: TrainState) -> None:
    """Puts a state's adapter and head into the far side.

    Raises:
        StateMismatchError: they do not fit, or are of another SPF support.
    """
    require_support(far, state.tensors)
    found = {n.removeprefix(TRAINED): t for n, t in state.tensors.items() if n.startswith(TRAINED)}
    load_trainable_state(far, found)
