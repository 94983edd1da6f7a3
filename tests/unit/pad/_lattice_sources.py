"""What the tests of lattice pads share."""

from __future__ import annotations

from collections.abc import Callable

from cloister.pad import (
    LATTICE_PARAMETERS,
    CheckKeys,
    Direction,
    LatticePads,
    Pad,
    PadKeys,
    PadPool,
)
from cloister.ring import QuantizedWeight, RingFormat

MakeWeight = Callable[[RingFormat, int, int], QuantizedWeight]


def open_source(
    keys: PadKeys,
    weight: QuantizedWeight,
    pool: PadPool,
    direction: Direction = Direction.FORWARD,
    name: str | None = None,
) -> LatticePads:
    check = CheckKeys.generate(weight, direction)
    parameters = None if name is None else LATTICE_PARAMETERS[name]
    return keys.lattice(weight.layer, direction, weight, check, pool=pool, parameters=parameters)


def use(source: LatticePads, n_tokens: int) -> Pad:
    ticket = source.take(n_tokens)
    return ticket.use(ticket.shape)
