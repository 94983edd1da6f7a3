"""A pad helper in this process, for tests of the mode otp-2: honest, lying or lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from jaxtyping import UInt32

from cloister.errors import AcceleratorLostError
from cloister.pad import Direction, PadRange, expand_ranges, multiply_pad
from cloister.ring import QuantizedWeight


class FakePadHelper:
    """Stands for a `cloister.pad.PadHelper`.

    Args:
        change: what a lying one does to its answer, in place.
        lost: the products, counted from 0, at which it is lost.

    Attributes:
        seen: of every product the layer, the direction and the ranges, which is all that a pad helper sees.
    """

    def __init__(
        self, change: Callable[[UInt32[np.ndarray, "tokens out"]], object] = lambda _: None, lost: Collection[int] = ()
    ) -> None:
        self.seen: list[tuple[str, Direction, list[PadRange]]] = []
        self._change = change
        self._lost = lost
        self._weights: dict[str, QuantizedWeight] = {}

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        """See `PadHelper.load`."""
        self._weights[layer] = weight

    def multiply(
        self, layer: str, direction: Direction, ranges: Sequence[PadRange], n_tokens: int
    ) -> UInt32[np.ndarray, "tokens out"]:
        """See `PadHelper.multiply`."""
        self.seen.append((layer, direction, list(ranges)))
        if len(self.seen) - 1 in self._lost:
            raise AcceleratorLostError("the pad helper is gone")
        weight = self._weights[layer]
        planes = weight.forward_planes() if direction is Direction.FORWARD else weight.backward_planes()
        r = expand_ranges(ranges, n_tokens * planes.shape[2], weight.format.pad_moduli)
        u = multiply_pad(r.reshape(len(r), n_tokens, -1), planes, weight.format)
        self._change(u)
        return u
