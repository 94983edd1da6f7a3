"""Aggregation in the server enclave: a round's updates in, one at a time, and a new global adapter out.

An update that is malformed, of another adapter, not finite or too large is refused by name, and the round goes on
without it. Nothing is counted twice. What must survive a kill is the state between rounds (`to_bytes`): a round that
was interrupted is begun anew, and its clients give the same sealed answers again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cloister import wire
from cloister.adapters import MAX_STATE_BYTES, AdapterState, AdapterUpdate
from cloister.errors import (
    AdapterError,
    CloisterError,
    FederationError,
    InsufficientClientsError,
    StateMismatchError,
    UpdateRejectedError,
    WireError,
)
from cloister.train import gaussian_epsilon

from ._aggregate_rules import ExactLora, Mean, Rule, make_rule
from ._aggregate_spec import MEMORY_BYTES, AggregationSpec, RoundResult

_LABEL = b"cloister-aggregator/v1"


class Aggregator:
    """The global adapter of a run and how it goes on. *Secret*. Not for several threads at once.

    Args:
        spec: the job's rule.
        start: the global adapter before the first round.
        min_clients: how many updates a round needs.
        folder: on the host's disk, for sealed spools; must exist.
        memory_bytes: see `MEMORY_BYTES`.
    """

    def __init__(
        self,
        spec: AggregationSpec,
        start: AdapterState,
        *,
        min_clients: int,
        folder: Path,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._spec = spec
        self._state = start
        self._min_clients = min_clients
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._n_rounds = 0
        self._moments: tuple[AdapterUpdate, AdapterUpdate] | None = None
        self._round: _Round | None = None

    def __repr__(self) -> str:
        return f"Aggregator({self._spec.rule}, n_rounds={self._n_rounds})"

    @property
    def state(self) -> AdapterState:
        """The global adapter after the last finished round. *Secret*."""
        return self._state

    @property
    def n_rounds(self) -> int:
        """How many rounds are finished."""
        return self._n_rounds

    @property
    def epsilon(self) -> float | None:
        """Spent by the finished rounds; None without privacy."""
        private = self._spec.privacy
        if private is None:
            return None
        return gaussian_epsilon(private.noise_multiplier, self._n_rounds, delta=private.delta)

    def begin(self, clients: Collection[str]) -> int:
        """Opens the next round for these clients and returns its number; an open round is given up.

        Raises:
            InsufficientClientsError: fewer clients than a round needs.
            StoreError: there is no place for a spool.
        """
        if len(set(clients)) < self._min_clients:
            raise InsufficientClientsError(f"{len(set(clients))} clients, min_clients is {self._min_clients}")
        self.close()
        rule = make_rule(
            self._spec,
            self._state.spec,
            n_clients=len(set(clients)),
            folder=self._folder,
            memory_bytes=self._memory_bytes,
        )
        self._round = _Round(self._n_rounds + 1, frozenset(clients), rule)
        return self._round.number

    def add(self, client: str, n_examples: int, update: bytes, *, round: int) -> bool:  # noqa: A002 - Flower's word
        """Counts one client's update (an encoded `AdapterUpdate`); False if the very same one was counted before.

        Raises:
            UpdateRejectedError: it is not counted, now or later in this round; names client and key.
            FederationError: no round is open.
            StoreError: the spool's disk failed; the update may be given again.
        """
        current = self._open_round()
        if round != current.number:
            raise UpdateRejectedError(
                f"client {client} sent an update of round {round} in round {current.number}", peer=client, key="round"
            )
        if client not in current.clients:
            raise UpdateRejectedError(f"client {client} has no part in this round", peer=client, key="client")
        digest = hashlib.sha256(f"{n_examples!r} ".encode())
        digest.update(update)
        if client in current.delivered:
            return current.again(client, digest.digest())
        try:
            weight, checked = self._checked(client, n_examples, update)
        except UpdateRejectedError as error:
            current.delivered[client] = digest.digest()
            current.rejected[client] = (error.key, error.cause)
            raise
        current.rule.add(checked, weight)
        current.delivered[client] = digest.digest()
        return True

    def finish(self) -> RoundResult:
        """Closes the round and makes its mean the new global adapter. Seal `to_bytes` before the result is sent.

        Raises:
            InsufficientClientsError: fewer updates were counted than a round needs; the round stays open for more.
            FederationError: no round is open.
            DecryptionError, StoreError: the spool was changed or cannot be read.
            StateMismatchError: the new adapter is beyond float32; names the tensor.
        """
        current = self._open_round()
        counted = current.counted
        if len(counted) < self._min_clients:
            raise InsufficientClientsError(
                f"{len(counted)} of {len(current.clients)} clients gave an update that counts in round "
                f"{current.number}, min_clients is {self._min_clients}",
                hint="; ".join(cause for _, cause in current.rejected.values()),
            )
        try:
            state, moments = self._stepped(current.rule.finish(self._state, len(current.delivered)))
        except InsufficientClientsError:
            raise
        except CloisterError:
            self.close()  # its rule is used up: the round must be begun anew
            raise
        residuals = (0.0, 0.0)
        if isinstance(current.rule, ExactLora):
            residuals = (current.rule.residual, current.rule.residual_share)
        self.close()
        self._state, self._moments, self._n_rounds = state, moments, current.number
        return RoundResult(
            current.number,
            state,
            counted,
            dict(sorted(current.rejected.items())),
            tuple(sorted(current.clients - current.delivered.keys())),
            *residuals,
            epsilon=self.epsilon,
        )

    def close(self) -> None:
        """Gives up an open round and what of it lies on the disk."""
        if self._round is not None:
            self._round.rule.close()
            self._round = None

    def _open_round(self) -> _Round:
        if self._round is None:
            raise FederationError("no round is open")
        return self._round

    def _checked(self, client: str, n_examples: int, blob: bytes) -> tuple[float, AdapterUpdate]:
        if isinstance(n_examples, bool) or not isinstance(n_examples, int) or n_examples < 1:
            raise UpdateRejectedError(f"client {client} claims no examples", peer=client, key="n_examples")
        try:
            update = AdapterUpdate.parse(blob, self._state.spec)
        except (WireError, AdapterError) as error:
            key = error.key if isinstance(error, StateMismatchError) else "update"
            raise UpdateRejectedError(f"client {client}'s update: {error.cause}", peer=client, key=key) from error
        norm = update.norm()
        if norm > self._spec.max_norm:
            raise UpdateRejectedError(
                f"client {client}'s update has norm {norm:.3g}, max_norm is {self._spec.max_norm:g}",
                peer=client,
                key="norm",
            )
        if self._spec.weighting == "uniform":
            return 1.0, update
        return float(min(n_examples, self._spec.max_examples)), update

    def _stepped(self, mean: Mean) -> tuple[AdapterState, tuple[AdapterUpdate, AdapterUpdate] | None]:
        spec, base = self._state.spec, self._state.tensors
        if self._spec.rule != "fedadam":
            # A sum beyond float32 becomes infinite here and is refused, by name, by the state.
            with np.errstate(over="ignore"):
                return AdapterState(spec, {n: (base[n] + d).astype(np.float32) for n, d in mean.items()}), None
        zeros = {name: np.zeros(shape, dtype=np.float32) for name, shape in spec.shapes.items()}
        m, v = (moment.tensors for moment in self._moments) if self._moments else (zeros, zeros)
        stepped = {name: self._adam(base[name], mean[name], m[name], v[name]) for name in base}
        state, new_m, new_v = ({name: three[i] for name, three in stepped.items()} for i in range(3))
        return AdapterState(spec, state), (AdapterUpdate(spec, new_m), AdapterUpdate(spec, new_v))

    def _adam(self, base: Any, mean: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        """Reddi et al., 2020, arXiv 2003.00295, with the bias correction of Flower's FedAdam."""
        spec, power = self._spec, self._n_rounds + 2.0
        with np.errstate(over="ignore"):
            m = spec.beta_1 * m + (1 - spec.beta_1) * mean
            v = spec.beta_2 * v + (1 - spec.beta_2) * mean**2
            rate = spec.server_lr * np.sqrt(1 - spec.beta_2**power) / (1 - spec.beta_1**power)
            new = base + rate * m / (np.sqrt(v) + spec.tau)
            return new.astype(np.float32), m.astype(np.float32), v.astype(np.float32)

    # --- between rounds -------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Everything that the next round depends on, for a sealed checkpoint. *Secret*. An open round is not in it."""
        moments = [moment.to_bytes() for moment in self._moments] if self._moments else [b"", b""]
        return wire.enc(_LABEL, self._facts(self._n_rounds), self._state.to_bytes(), *moments)

    def restore(self, blob: bytes) -> None:
        """Goes on from what `to_bytes` gave; an open round is given up.

        Raises:
            StateMismatchError: it is of another job, rule or adapter.
            WireError: it is no such state.
        """
        label, facts, state, m, v = wire.dec(blob, 5, max_bytes=3 * MAX_STATE_BYTES + (1 << 20))
        n_rounds = _rounds_of(facts)
        if label != _LABEL or facts != self._facts(n_rounds):
            raise StateMismatchError("the aggregation's state is of another rule or release", key="aggregation")
        spec = self._state.spec
        restored = AdapterState.parse(state, spec)
        self._moments = (AdapterUpdate.parse(m, spec), AdapterUpdate.parse(v, spec)) if m else None
        self._state, self._n_rounds = restored, n_rounds
        self.close()

    def _facts(self, n_rounds: int) -> bytes:
        return json.dumps({"n_rounds": n_rounds, "rule": asdict(self._spec)}, sort_keys=True).encode()


class _Round:
    """One open round: who may, who did, and what became of it."""

    def __init__(self, number: int, clients: frozenset[str], rule: Rule) -> None:
        self.number = number
        self.clients = clients
        self.rule = rule
        self.delivered: dict[str, bytes] = {}
        self.rejected: dict[str, tuple[str, str]] = {}

    @property
    def counted(self) -> tuple[str, ...]:
        return tuple(sorted(self.delivered.keys() - self.rejected.keys()))

    def again(self, client: str, digest: bytes) -> bool:
        """What a second update of a client gives: the same answer for the same update, a refusal for another."""
        if client in self.rejected:
            key, cause = self.rejected[client]
            raise UpdateRejectedError(cause, peer=client, key=key)
        if digest != self.delivered[client]:
            raise UpdateRejectedError(f"client {client} sent a second, other update", peer=client, key="update")
        return False


def _rounds_of(facts: bytes) -> int:
    try:
        n_rounds = json.loads(facts)["n_rounds"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StateMismatchError("the aggregation's state does not parse", key="aggregation") from None
    if isinstance(n_rounds, bool) or not isinstance(n_rounds, int) or n_rounds < 0:
        raise StateMismatchError("the aggregation's state has no number of rounds", key="aggregation")
    return n_rounds
