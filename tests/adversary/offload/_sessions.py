"""Sessions of one small layer, and doubles that misbehave in ways that no test elsewhere needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cloister.errors import AcceleratorLostError
from cloister.offload import OffloadSession
from cloister.pad import Direction, PadRange, expand_ranges
from cloister.ring import FAITHFUL, QuantizedWeight, RingFormat, product, quantize_weight
from cloister.testing import FakeAccelerator

N_IN, N_OUT, TOKENS = 48, 16, 5


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(fmt: RingFormat = FAITHFUL, layer: str = "q") -> QuantizedWeight:
    return quantize_weight(draw(N_OUT, N_IN, seed=2), fmt, layer=layer)


def session_with(accelerator: FakeAccelerator, fmt: RingFormat = FAITHFUL, **options: Any) -> OffloadSession:
    made = OffloadSession(accelerator, fmt, **options)
    made.add("q", weight(fmt))
    return made


def add_one(answer: np.ndarray) -> None:
    """What a lying accelerator does to its answer: one unit in one element."""
    answer[0, 0] += np.uint32(1)


class FakeHelper:
    """The second accelerator of otp-2. It is lost at the products of `lost`, counted from 0."""

    def __init__(self, lost: Sequence[int] = ()) -> None:
        self.asked: list[list[PadRange]] = []
        self._lost = lost
        self._weights: dict[str, QuantizedWeight] = {}

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        self._weights[layer] = weight

    def multiply(self, layer: str, direction: Direction, ranges: Sequence[PadRange], n_tokens: int) -> np.ndarray:
        self.asked.append(list(ranges))
        if len(self.asked) - 1 in self._lost:
            raise AcceleratorLostError("the pad helper is gone")
        held = self._weights[layer]
        fmt = held.format
        planes = held.forward_planes() if direction is Direction.FORWARD else held.backward_planes()
        pad = expand_ranges(ranges, n_tokens * planes.shape[2], fmt.pad_moduli)
        elements = fmt.decode_product(torch.from_numpy(pad).to(torch.int32)).view(n_tokens, -1)
        return fmt.decode_product(product(fmt.encode(elements), planes, fmt)).numpy().astype(np.uint32)
