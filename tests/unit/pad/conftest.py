"""Keys of one test, closed behind it, and small weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from cloister.pad import Direction, PadKeys, PadStream
from cloister.ring import QuantizedWeight, RingFormat, quantize_weight


@pytest.fixture
def keys() -> Iterator[PadKeys]:
    keys = PadKeys()
    yield keys
    keys.close()


@pytest.fixture
def stream(keys: PadKeys) -> PadStream:
    return keys.stream("layers.0.q", Direction.FORWARD)


@pytest.fixture
def make_weight() -> Callable[[RingFormat, int, int], QuantizedWeight]:
    def make(fmt: RingFormat, n_out: int, n_in: int) -> QuantizedWeight:
        values = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(n_out))
        return quantize_weight(values, fmt, layer="layers.0.q")

    return make
