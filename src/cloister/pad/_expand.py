"""Residues of one block of positions from its AES-256 key; spec/pad.md section 3. Pure: no state, nothing is counted.

A byte below the modulus is the residue. A byte that is not is *rejected*, and the k-th rejected byte of a group of
1,024 positions is replaced by the k-th byte below the modulus among the group's spare bytes. So every residue is
exactly uniform and a function of its position alone, and all but 2 % of them are written by AES-CTR where they stay.

Time and addresses depend on which bytes are rejected, and on nothing else. Given which are, the residues are
independent and uniform: whoever sees the whole pattern learns nothing about any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from jaxtyping import UInt8

from cloister.errors import PadError
from cloister.kernels import _native

if TYPE_CHECKING:
    import numpy.typing as npt

    ByteArray = npt.NDArray[np.uint8]
else:
    ByteArray = np.ndarray

BLOCK_POSITIONS = 1 << 16
"""Positions under one AES key."""
MIN_MODULUS = 129
MAX_MODULUS = 256
MAX_PLANES = 16

_GROUP_POSITIONS = 1024
# 64 spares for 1,024 positions: at 251 a group has 20 rejected bytes on average, standard deviation 4.4.
_ROUND_SPARES = 64
# A group needs at most 1,024 of 64 * 64 spares, each of which is good with p > 1/2. Fewer are good with probability at
# most exp(-4096 * KL(1/4 || 1/2)) < 2^-772 (Chernoff): it means that the cipher is broken.
_MAX_ROUNDS = 64
_AES_BLOCK_BYTES = 16
_ZEROS = memoryview(bytes(BLOCK_POSITIONS))


class _KeyStream:
    """AES-256-CTR under one block's key; every (plane, modulus, round) has counters of its own."""

    __slots__ = ("_context",)

    def __init__(self, key: bytes) -> None:
        # CTR is the pseudo-random function itself here. There is no message, so nothing to authenticate.
        self._context = Cipher(algorithms.AES256(key), modes.CTR(bytes(_AES_BLOCK_BYTES))).encryptor()

    def fill(self, plane: int, modulus: int, round_: int, offset: int, out: UInt8[ByteArray, " n"]) -> None:
        """Bytes `offset ..` of one stream into `out` (*secret*). `offset` is a multiple of 16, `n` at most 2^16."""
        counter = bytes((plane, modulus - 1, round_, 0, 0, 0, 0, 0)) + (offset // _AES_BLOCK_BYTES).to_bytes(8, "big")
        self._context.reset_nonce(counter)
        self._context.update_into(_ZEROS[: len(out)], out.data)


def expand_block(key: bytes, first: int, moduli: Sequence[int], out: UInt8[ByteArray, "planes n"]) -> None:
    """Write the residues of positions `first .. first + n - 1` of one block.

    Args:
        key: *secret*, 32 bytes, the block's.
        first: position in the block, from 0; the range ends inside of the block.
        moduli: *public*, one for each plane, checked by `check_moduli`.
        out: rows contiguous; gets the pad, *secret*: uniform modulo `moduli[i]` in plane i.

    Raises:
        PadError: the key stream is not random, which no working AES shows (2^-772 for each group).
    """
    stream = _KeyStream(key)
    skip = first % _GROUP_POSITIONS
    for plane, modulus in enumerate(moduli):
        # Ranks count from the start of a group, so a range that starts inside of one begins earlier.
        row = out[plane] if skip == 0 else np.empty(skip + out.shape[1], np.uint8)
        stream.fill(plane, modulus, 0, first - skip, row)
        if modulus < MAX_MODULUS:
            _replace_rejected(stream, plane, modulus, first // _GROUP_POSITIONS, row)
        if skip:
            out[plane] = row[skip:]
            row.fill(0)


def check_moduli(moduli: Sequence[int]) -> tuple[int, ...]:
    """The moduli as a tuple.

    Raises:
        PadError: none or more than 16 of them, or one outside of 129 .. 256.
    """
    if not 1 <= len(moduli) <= MAX_PLANES or not all(MIN_MODULUS <= m <= MAX_MODULUS for m in moduli):
        raise PadError(f"pads have 1 to {MAX_PLANES} moduli of {MIN_MODULUS} to {MAX_MODULUS}")
    return tuple(moduli)


def _replace_rejected(stream: _KeyStream, plane: int, modulus: int, first: int, row: UInt8[ByteArray, " n"]) -> None:
    """Replace every byte of `row` that is not below the modulus; `row` starts with group `first`."""
    spares = np.empty(-(-len(row) // _GROUP_POSITIONS) * _ROUND_SPARES, np.uint8)
    stream.fill(plane, modulus, 1, first * _ROUND_SPARES, spares)
    for group in _native.replace_rejected(row, modulus, spares):
        own = row[group * _GROUP_POSITIONS : (group + 1) * _GROUP_POSITIONS]
        left = np.flatnonzero(own >= modulus)
        own[left] = _more_spares(stream, plane, modulus, first + group, len(left))
    spares.fill(0)


def _more_spares(stream: _KeyStream, plane: int, modulus: int, group: int, n: int) -> UInt8[ByteArray, " n"]:
    """The first `n` good spares after those of round 1. Slow and rare: 2^-46 of groups at 251."""
    good = np.empty(0, np.uint8)
    for round_ in range(2, _MAX_ROUNDS + 1):
        spares = np.empty(_ROUND_SPARES, np.uint8)
        stream.fill(plane, modulus, round_, group * _ROUND_SPARES, spares)
        good = np.concatenate((good, spares[spares < modulus]))
        if len(good) >= n:
            return good[:n]
    raise PadError("the pad's key stream is not random")
