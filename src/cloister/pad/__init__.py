"""Pads: uniform ring elements of which each is used once, and what takes them off again. Normative: spec/pad.md.

Everything here is *secret* but shapes, positions and counts, and stays in the process that made it.
"""

from __future__ import annotations

from cloister.pad._check import CheckKeys
from cloister.pad._expand import BLOCK_POSITIONS, MAX_MODULUS, MAX_PLANES, MIN_MODULUS
from cloister.pad._guard import ProcessBound
from cloister.pad._keys import PadKeys
from cloister.pad._lattice import LATTICE_PARAMETERS, LatticeParameters
from cloister.pad._lattice_pads import LatticePads
from cloister.pad._ledger import MAX_POSITIONS, PadLedger, PadTicket
from cloister.pad._modes import ASSUMPTIONS, Direction, PadMode
from cloister.pad._otp import Otp2Pads, OtpPads, PadHelper, multiply_pad
from cloister.pad._pool import PadPool
from cloister.pad._source import Pad, PadSource
from cloister.pad._stream import MAX_PAD_POSITIONS, PadRange, PadStream, expand_ranges

__all__ = [
    "ASSUMPTIONS",
    "BLOCK_POSITIONS",
    "LATTICE_PARAMETERS",
    "MAX_MODULUS",
    "MAX_PAD_POSITIONS",
    "MAX_PLANES",
    "MAX_POSITIONS",
    "MIN_MODULUS",
    "CheckKeys",
    "Direction",
    "LatticePads",
    "LatticeParameters",
    "Otp2Pads",
    "OtpPads",
    "Pad",
    "PadHelper",
    "PadKeys",
    "PadLedger",
    "PadMode",
    "PadPool",
    "PadRange",
    "PadSource",
    "PadStream",
    "PadTicket",
    "ProcessBound",
    "expand_ranges",
    "multiply_pad",
]
