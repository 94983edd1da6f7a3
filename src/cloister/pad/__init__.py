"""One-time pads: uniform residues of which each is used once, and what takes them off again. Normative: spec/pad.md.

Everything here is *secret* but shapes, positions and counts, and stays in the process that made it.
"""

from __future__ import annotations

from cloister.pad._expand import BLOCK_POSITIONS, MAX_MODULUS, MAX_PLANES, MIN_MODULUS
from cloister.pad._keys import Direction, PadKeys
from cloister.pad._ledger import MAX_POSITIONS, PadLedger, PadTicket
from cloister.pad._pool import Pad, PadPool
from cloister.pad._stream import MAX_PAD_POSITIONS, PadStream

__all__ = [
    "BLOCK_POSITIONS",
    "MAX_MODULUS",
    "MAX_PAD_POSITIONS",
    "MAX_PLANES",
    "MAX_POSITIONS",
    "MIN_MODULUS",
    "Direction",
    "Pad",
    "PadKeys",
    "PadLedger",
    "PadPool",
    "PadStream",
    "PadTicket",
]
