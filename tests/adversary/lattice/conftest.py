"""Sources of lattice pads of small layers, closed behind each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from cloister.pad import LATTICE_PARAMETERS, CheckKeys, Direction, LatticePads, PadKeys, PadPool
from cloister.ring import FORMATS, QuantizedWeight, quantize_weight

MakeWeight = Callable[..., QuantizedWeight]
OpenSource = Callable[..., LatticePads]


@pytest.fixture
def keys() -> Iterator[PadKeys]:
    keys = PadKeys()
    yield keys
    keys.close()


@pytest.fixture
def pool() -> Iterator[PadPool]:
    with PadPool(0) as pool:
        yield pool


@pytest.fixture
def make_weight() -> MakeWeight:
    def make(name: str = "fast", n_out: int = 4, n_in: int = 5) -> QuantizedWeight:
        values = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(n_out))
        return quantize_weight(values, FORMATS[LATTICE_PARAMETERS[name].ring], layer="q")

    return make


@pytest.fixture
def open_source(keys: PadKeys, pool: PadPool, make_weight: MakeWeight) -> OpenSource:
    def make(
        layer: str = "q",
        direction: Direction = Direction.FORWARD,
        *,
        name: str = "fast",
        n_out: int = 4,
        n_in: int = 5,
        of: PadKeys = keys,
        using: PadPool = pool,
    ) -> LatticePads:
        weight = make_weight(name, n_out, n_in)
        check = CheckKeys.generate(weight, direction)
        return of.lattice(layer, direction, weight, check, pool=using, parameters=LATTICE_PARAMETERS[name])

    return make
