"""The rules: what each keeps of an update, and the mean update that it makes of a round.

They are Flower's FedAvg, FedProx, FedAdam and FedTrimmedAvg, to which tests compare them round by round. Flower's own
classes work on all replies in one list, as messages of a SuperLink, and bring gRPC into the trusted process.

Memory for an adapter of P numbers and any number n of clients, beside one update of 4 P bytes:

    mean, private mean    8 P bytes
    trimmed mean          max(256 MiB, 4 KiB * n), and 4 P n bytes of sealed spool on disk
    exact LoRA            8 P bytes and three float64 matrices of the largest adapted layer, and the spool
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float64

from cloister.adapters import AdapterState, AdapterUpdate, StateSpec
from cloister.errors import InsufficientClientsError
from cloister.train import noised, on_grid

from ._aggregate_lora import LoraProducts, refactor
from ._aggregate_spec import MEMORY_BYTES, AggregationSpec, ClientPrivacy
from ._aggregate_spool import Spool

Mean = Mapping[str, Float64[np.ndarray, "..."]]

_PIECE = 1 << 16  # numbers at a time, so that temporaries stay small beside a tensor
_MIN_PIECE = 256
_SORT_BYTES = 16  # a number of the trimmed mean: as read from the spool, in its column, and twice in sorting
_SLACK = 1 - 2.0**-40  # scaling by a quotient of float64s must not end above the clipping norm


class Rule(Protocol):
    """Takes updates one at a time and keeps none of them."""

    def add(self, update: AdapterUpdate, weight: float) -> None:
        """One client's update, already checked."""
        ...

    def finish(self, base: AdapterState, n_delivered: int) -> Mean:
        """The mean update; the rule is used up."""
        ...

    def close(self) -> None:
        """Gives back what lies on the disk."""
        ...


class WeightedMean:
    """sum(w_i u_i) / sum(w_i), as a running sum in float64."""

    def __init__(self, spec: StateSpec) -> None:
        self._sums = {name: np.zeros(shape) for name, shape in spec.shapes.items()}
        self._weight = 0.0

    def add(self, update: AdapterUpdate, weight: float) -> None:
        """See `Rule`."""
        for name, total in self._sums.items():
            flat, into = update.tensors[name].reshape(-1), total.reshape(-1)
            for at in range(0, flat.size, _PIECE):
                into[at : at + _PIECE] += np.multiply(flat[at : at + _PIECE], weight, dtype=np.float64)
        self._weight += weight

    def finish(self, base: AdapterState, n_delivered: int) -> Mean:
        """See `Rule`."""
        return {name: np.divide(total, self._weight, out=total) for name, total in self._sums.items()}

    def close(self) -> None:
        """See `Rule`."""
        self._sums = {}


class PrivateMean:
    """sum(clip(u_i)) + noise, over the number of clients that delivered: McMahan et al., 2018, arXiv 1710.06963.

    The sum is in integers of the noise's grid, so that neither rounding nor order can carry more of a client than its
    clipped share. Whoever delivered counts in the denominator, also when its update is refused: then its share is zero,
    and the denominator says nothing about its data.
    """

    def __init__(self, spec: StateSpec, privacy: ClientPrivacy) -> None:
        self._clip_norm = privacy.clip_norm
        self._sigma = privacy.clip_norm * privacy.noise_multiplier
        self._sums = {name: np.zeros(shape, dtype=np.int64) for name, shape in spec.shapes.items()}

    def add(self, update: AdapterUpdate, weight: float) -> None:
        """See `Rule`."""
        norm = update.norm()
        share = _SLACK * min(1.0, self._clip_norm / norm if norm else 1.0)
        for name, total in self._sums.items():
            flat, into = update.tensors[name].reshape(-1), total.reshape(-1)
            for at in range(0, flat.size, _PIECE):
                into[at : at + _PIECE] += on_grid(flat[at : at + _PIECE].astype(np.float64) * share, self._sigma)

    def finish(self, base: AdapterState, n_delivered: int) -> Mean:
        """See `Rule`."""
        return {name: noised(total, self._sigma) / n_delivered for name, total in self._sums.items()}

    def close(self) -> None:
        """See `Rule`."""
        self._sums = {}


class TrimmedMean:
    """Each coordinate's mean without its largest and smallest `trim` share: Yin et al., 2018, arXiv 1803.01498.

    With k = floor(trim * n) dropped at either end, up to k clients that lie cannot move a coordinate beyond what the
    honest ones said. Computed over pieces of all clients' updates from the spool.
    """

    def __init__(self, spec: StateSpec, trim: float, *, n_clients: int, folder: Path, memory_bytes: int) -> None:
        self._trim = trim
        self._shapes = spec.shapes
        self._require(n_clients)
        piece = max(_MIN_PIECE, memory_bytes // (_SORT_BYTES * n_clients))
        self._places = [
            (name, slice(at, min(at + piece, size)))
            for name, shape in spec.shapes.items()
            for size in [int(np.prod(shape))]
            for at in range(0, size, piece)
        ]
        self._spool = Spool(folder, [place.stop - place.start for _, place in self._places])

    def add(self, update: AdapterUpdate, weight: float) -> None:
        """See `Rule`."""
        self._spool.append(update.tensors[name].reshape(-1)[place] for name, place in self._places)

    def finish(self, base: AdapterState, n_delivered: int) -> Mean:
        """See `Rule`.

        Raises:
            InsufficientClientsError: so few that none would be dropped, which would be a plain mean.
        """
        n = len(self._spool)
        self._require(n)
        mean = {name: np.zeros(shape) for name, shape in self._shapes.items()}
        for index, (name, place) in enumerate(self._places):
            column = np.empty((n, place.stop - place.start), dtype=np.float32)
            for row, piece in zip(column, self._spool.read(index), strict=True):
                row[:] = piece
            dropped = int(self._trim * n)
            column.partition((dropped, n - dropped - 1), axis=0)
            mean[name].reshape(-1)[place] = column[dropped : n - dropped].mean(axis=0, dtype=np.float64)
        return mean

    def _require(self, n_clients: int) -> None:
        if int(self._trim * n_clients) == 0:
            raise InsufficientClientsError(
                f"a trimmed mean of {n_clients} clients drops none of them with trim = {self._trim}",
                hint=f"it takes {int(np.ceil(1 / self._trim))} clients, or a larger trim",
            )

    def close(self) -> None:
        """See `Rule`."""
        self._spool.close()


class ExactLora:
    """The mean of the products B A, factored anew at rank r; everything that is no LoRA pair as a weighted mean.

    Attributes:
        residual, residual_share: see `RoundResult`; known after `finish`.
    """

    def __init__(self, spec: StateSpec, scale: float, folder: Path) -> None:
        self._pairs = spec.lora_pairs()
        self._scale = scale
        self._shapes = spec.shapes
        self._weights: list[float] = []
        self._spool = Spool(folder, [int(np.prod(spec.shapes[name])) for pair in self._pairs for name in pair])
        paired = {name for pair in self._pairs for name in pair}
        self._rest = {name: np.zeros(shape) for name, shape in spec.shapes.items() if name not in paired}
        self.residual = 0.0
        self.residual_share = 0.0

    def add(self, update: AdapterUpdate, weight: float) -> None:
        """See `Rule`."""
        self._spool.append(update.tensors[name].reshape(-1) for pair in self._pairs for name in pair)
        for name, total in self._rest.items():
            np.add(total, update.tensors[name] * np.float64(weight), out=total)
        self._weights.append(weight)

    def finish(self, base: AdapterState, n_delivered: int) -> Mean:
        """See `Rule`."""
        weights = np.array(self._weights) / sum(self._weights)
        mean = {name: total / sum(self._weights) for name, total in self._rest.items()}
        squares = np.zeros(2)
        for index, (a_name, b_name) in enumerate(self._pairs):
            a, b = (base.tensors[name].astype(np.float64) for name in (a_name, b_name))
            products = LoraProducts(a, b, weights, lambda index=index: self._of(index))
            new_a, new_b, *norms = refactor(products)
            mean[a_name], mean[b_name] = new_a - a, new_b - b
            squares += np.square(norms)
        self.residual = self._scale * float(np.sqrt(squares[0]))
        self.residual_share = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
        return mean

    def _of(self, index: int) -> Iterator[tuple[Float64[np.ndarray, "r features"], Float64[np.ndarray, "out r"]]]:
        shapes = [self._shapes[name] for name in self._pairs[index]]
        for a, b in zip(self._spool.read(2 * index), self._spool.read(2 * index + 1), strict=True):
            yield a.reshape(shapes[0]).astype(np.float64), b.reshape(shapes[1]).astype(np.float64)

    def close(self) -> None:
        """See `Rule`."""
        self._spool.close()


def make_rule(
    spec: AggregationSpec, state: StateSpec, *, n_clients: int, folder: Path, memory_bytes: int = MEMORY_BYTES
) -> WeightedMean | PrivateMean | TrimmedMean | ExactLora:
    """The rule of a job for one round."""
    if spec.rule == "trimmed-mean":
        return TrimmedMean(state, spec.trim, n_clients=n_clients, folder=folder, memory_bytes=memory_bytes)
    if spec.exact_lora and state.lora_pairs():
        return ExactLora(state, lora_scale(state), folder)
    return PrivateMean(state, spec.privacy) if spec.privacy else WeightedMean(state)


def lora_scale(state: StateSpec) -> float:
    """What a LoRA product is multiplied by in the model."""
    return getattr(state.adapter, "scale", 1.0)
