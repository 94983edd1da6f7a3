"""Numpy arrays out of a seeded torch generator, as the house draws data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Seeded:
    """The few draws that the aggregation's tests need."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, size: int | Sequence[int]) -> np.ndarray:
        shape = (size,) if isinstance(size, int) else tuple(size)
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).numpy()

    def random(self, size: int) -> np.ndarray:
        return torch.rand(size, generator=self._generator, dtype=torch.float64).numpy()

    def integers(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self._generator))
