"""The pad sources of a session's layers, by the mode of the pads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloister.errors import OffloadError
from cloister.pad import (
    CheckKeys,
    Direction,
    LatticeParameters,
    Otp2Pads,
    OtpPads,
    PadHelper,
    PadKeys,
    PadMode,
    PadPool,
    PadSource,
)

if TYPE_CHECKING:
    from cloister.ring import QuantizedWeight


@dataclass(frozen=True, eq=False, slots=True)
class Sources:
    """Makes the pad sources of a layer, all of one mode. Holds keys; *secret*.

    Attributes:
        mode: of every source.
        keys: where the key of every source comes from.
        pool: of pads made ahead.
        helper: the second accelerator of the mode otp-2, and of no other.
        lattice: parameters of the mode lattice, and of no other.
    """

    mode: PadMode
    keys: PadKeys = field(repr=False)
    pool: PadPool = field(repr=False)
    helper: PadHelper | None = field(repr=False)
    lattice: LatticeParameters | None

    def __post_init__(self) -> None:
        if (self.helper is not None) != (self.mode is PadMode.OTP2):
            raise OffloadError("the mode otp-2 needs a second accelerator, and no other mode has one")
        if (self.lattice is not None) != (self.mode is PadMode.LATTICE):
            raise OffloadError("the mode lattice needs its parameters, and no other mode has any")

    def make(self, weight: QuantizedWeight) -> dict[Direction, PadSource]:
        """The sources of a layer named `weight.layer`, one a direction, each with check keys of its own.

        Raises:
            OffloadError: the helper refused the weight.
            RingOverflowError: the weight leaves no room for the rounding of lattice pads.
            PadError: the keys were closed.
        """
        build = self._builder(weight)
        with ExitStack() as undo:
            made: dict[Direction, PadSource] = {}
            for direction in Direction:
                check = CheckKeys.generate(weight, direction)
                undo.callback(check.wipe)
                made[direction] = build(direction, check)
                undo.callback(made[direction].close)
            undo.pop_all()
            return made

    def _builder(self, weight: QuantizedWeight) -> Callable[[Direction, CheckKeys], PadSource]:
        keys, pool, helper, layer = self.keys, self.pool, self.helper, weight.layer
        if self.mode is PadMode.LATTICE:
            return lambda direction, check: keys.lattice(
                layer, direction, weight, check, pool=pool, parameters=self.lattice
            )
        if helper is not None:
            helper.load(layer, weight)
            return lambda direction, check: Otp2Pads(
                keys.stream(layer, direction), weight, direction, check, pool=pool, helper=helper
            )
        planes = weight.forward_planes()  # one copy for both directions
        return lambda direction, check: OtpPads(
            keys.stream(layer, direction), weight, direction, check, pool=pool, planes=planes
        )

    def close(self) -> None:
        """Destroy every key and every pad that was made ahead. May be called again."""
        with ExitStack() as all_of_them:  # each, whatever becomes of the others
            all_of_them.callback(self.keys.close)
            all_of_them.callback(self.pool.close)
