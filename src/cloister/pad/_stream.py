"""The pads of one layer and direction in one job: uniform residues, addressed by position; spec/pad.md section 3."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from jaxtyping import UInt8

from cloister import wire
from cloister.errors import PadError, PadReuseError
from cloister.pad._expand import BLOCK_POSITIONS, ByteArray, check_moduli, expand_block
from cloister.pad._guard import ProcessBound
from cloister.pad._ledger import PadLedger, PadTicket

KEY_BYTES = 32
MAX_PAD_POSITIONS = 1 << 32
"""Elements of one pad, far above any tensor."""
_V = b"cloister-pad/v1"


def derive_key(secret: bytearray, *labels: bytes) -> bytes:
    """HKDF-Expand-SHA256 (RFC 5869 section 2.3) with info = enc(V, labels): 32 bytes, *secret*."""
    return HKDFExpand(hashes.SHA256(), KEY_BYTES, wire.enc(_V, *labels)).derive(secret)


@dataclass(frozen=True, slots=True)
class PadRange:
    """Consecutive positions of one block, for a second party that makes the same pad.

    Attributes:
        key: *secret*, the block's; it tells every pad of the block.
        first: *public*, position in the block.
        n: *public*, how many.
    """

    key: bytes = field(repr=False)
    first: int
    n: int


def expand_ranges(ranges: Sequence[PadRange], n: int, moduli: Sequence[int]) -> UInt8[ByteArray, "planes n"]:
    """The pad that ranges make, one behind the other: what the stream that they are of made. *Secret*.

    Raises:
        PadError: a key is not of 32 bytes, a range is not inside of a block, they are not `n` positions, or a modulus
            that pads cannot have.
    """
    checked = check_moduli(moduli)
    for part in ranges:
        if len(part.key) != KEY_BYTES or part.first < 0 or part.n < 1 or part.first + part.n > BLOCK_POSITIONS:
            raise PadError("a range of a pad is not inside of a block")
    if sum(part.n for part in ranges) != n:
        raise PadError("the ranges of a pad do not make its size")
    out = np.empty((len(checked), n), np.uint8)
    _expand_into(ranges, checked, out)
    return out


def _expand_into(ranges: Sequence[PadRange], moduli: tuple[int, ...], out: UInt8[ByteArray, "planes n"]) -> None:
    done = 0
    for part in ranges:
        expand_block(part.key, part.first, moduli, out[:, done : done + part.n])
        done += part.n


def _pieces(position: int, n: int) -> Iterator[tuple[int, int, int]]:
    """Positions by block: its index, the first position in it, how many."""
    end = position + n
    while position < end:
        index, first = divmod(position, BLOCK_POSITIONS)
        size = min(end - position, BLOCK_POSITIONS - first)
        yield index, first, size
        position += size


class _Block:
    """A block of which positions were given out and not all are spent. Its key is made when it is first expanded."""

    __slots__ = ("key", "n_unspent")

    def __init__(self) -> None:
        self.key = bytearray()
        self.n_unspent = BLOCK_POSITIONS


class PadStream(ProcessBound):
    """The pads of one (job, layer, direction), each element used once. Made by `PadKeys.stream`. Thread-safe.

    Args:
        key: *secret*, of this stream alone; the stream owns the buffer and zeroes it.

    Attributes:
        ledger: the positions of this key.
    """

    __slots__ = ("_blocks", "_is_shared", "_key", "_lock", "ledger")

    def __init__(self, key: bytearray) -> None:
        super().__init__()
        self._key = key
        self._blocks: dict[int, _Block] = {}
        self._is_shared: bool | None = None  # unknown before the first pad
        self._lock = threading.Lock()
        self.ledger = PadLedger()

    def __repr__(self) -> str:
        return f"PadStream(n_taken={self.ledger.n_taken})"

    def draw(self, shape: tuple[int, ...], moduli: Sequence[int]) -> PadTicket[UInt8[ByteArray, "planes ..."]]:
        """Take positions for one tensor. Its pad is made when the ticket is used, by the thread that uses it.

        Args:
            shape: *public*, of the tensor that will be masked.
            moduli: *public*, one for each residue plane.

        Returns:
            A ticket for the pad, *secret*: element k of the tensor in row-major order has position `start + k`.

        Raises:
            PadReuseError: in a forked process.
            PadExhaustedError: the key has not enough positions left, or was retired.
            PadError: an empty shape, a modulus that pads cannot have, or pads of this stream are shared.
        """
        start, reveal = self._draw(shape, moduli, is_shared=False)
        return PadTicket(start, tuple(shape), lambda: reveal()[0])

    def draw_shared(
        self, shape: tuple[int, ...], moduli: Sequence[int]
    ) -> PadTicket[tuple[UInt8[ByteArray, "planes ..."], list[PadRange]]]:
        """As `draw`, for a stream of which a second party makes every pad too: with what it makes them from.

        A block's key tells all pads of the block, so one stream either shares all of its pads, or none.

        Returns:
            A ticket for the pad and its ranges in order, both *secret*.

        Raises:
            PadReuseError, PadExhaustedError, PadError: as `draw`.
        """
        start, reveal = self._draw(shape, moduli, is_shared=True)
        return PadTicket(start, tuple(shape), reveal)

    def take(self, n: int) -> int:
        """`PadLedger.take` for a caller that expands in pieces. It must `spend` what it has expanded.

        Raises:
            PadReuseError, PadExhaustedError, PadError: as `PadLedger.take`; also PadError for more than 2^32 positions.
        """
        return self._take(n, is_shared=False)

    def expand(self, position: int, n: int, moduli: Sequence[int]) -> UInt8[ByteArray, "planes n"]:
        """The pad at `n` positions from `position`, exactly uniform in every residue. *Secret*.

        A function of the position alone: the same in pieces, in any order and from any thread. That is why expanding is
        not using: a position masks one tensor only, and `PadTicket` sees to it.

        Raises:
            PadReuseError: positions that were spent, or in a forked process.
            PadExhaustedError: the key was retired.
            PadError: positions that were not taken, or a modulus that pads cannot have.
        """
        self._check_taken(position, n)
        out = np.empty((len(moduli), n), np.uint8)
        self.expand_into(position, moduli, out)
        return out

    def expand_into(self, position: int, moduli: Sequence[int], out: UInt8[ByteArray, "planes n"]) -> None:
        """As `expand`, into the caller's buffer, which is *secret* from then on. Its rows must be contiguous.

        Raises:
            PadReuseError, PadExhaustedError, PadError: as `expand`; also PadError for a buffer of another form.
        """
        self._stay_home()
        checked = check_moduli(moduli)
        if out.ndim != 2 or out.dtype != np.uint8 or len(out) != len(checked) or out.strides[1] != 1:
            raise PadError("the buffer for a pad must be uint8, one contiguous row for each modulus")
        n = out.shape[1]
        self._check_taken(position, n)
        _expand_into(self._ranges(position, n), checked, out)

    def spend(self, position: int, n: int) -> None:
        """Say that these positions, once taken, will not be expanded again. A block's key is zeroed with its last one.

        Raises:
            PadReuseError: they were spent before, or in a forked process.
        """
        self._stay_home()
        with self._lock:
            if self.ledger.is_retired:
                return  # every key is zeroed already
            for index, _, size in _pieces(position, n):
                self._spend_in_block(index, size)

    def retire(self) -> None:
        """Zero every key; what was not expanded is lost. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self.ledger.retire()
        with self._lock:
            for block in self._blocks.values():
                block.key[:] = bytes(len(block.key))
            self._blocks.clear()
            self._key[:] = bytes(len(self._key))

    def _draw(
        self, shape: tuple[int, ...], moduli: Sequence[int], *, is_shared: bool
    ) -> tuple[int, Callable[[], tuple[UInt8[ByteArray, "planes ..."], list[PadRange]]]]:
        """Take positions: the first, and what makes their pad, for one ticket."""
        checked, n = check_moduli(moduli), math.prod(shape)
        if min(shape, default=1) < 1:
            raise PadError("a pad has at least one element")
        start = self._take(n, is_shared)

        def reveal() -> tuple[UInt8[ByteArray, "planes ..."], list[PadRange]]:
            planes = self.expand(start, n, checked)
            ranges = self._ranges(start, n) if is_shared else []
            self.spend(start, n)
            return planes.reshape(len(checked), *shape), ranges

        return start, reveal

    def _take(self, n: int, is_shared: bool) -> int:
        self._stay_home()
        if n > MAX_PAD_POSITIONS:
            raise PadError(f"a pad has at most {MAX_PAD_POSITIONS} elements")
        with self._lock:
            if self._is_shared not in (None, is_shared):
                raise PadError("a stream shares all of its pads, or none")
            start = self.ledger.take(n)
            self._is_shared = is_shared
            for index, _, _ in _pieces(start, n):
                self._blocks.setdefault(index, _Block())
        return start

    def _ranges(self, position: int, n: int) -> list[PadRange]:
        return [PadRange(self._block_key(index), first, size) for index, first, size in _pieces(position, n)]

    def _spend_in_block(self, index: int, n: int) -> None:
        block = self._blocks.get(index)
        if block is None or n > block.n_unspent:
            raise PadReuseError("pad positions were to be spent a second time")
        block.n_unspent -= n
        if not block.n_unspent:
            block.key[:] = bytes(len(block.key))
            del self._blocks[index]

    def _check_taken(self, position: int, n: int) -> None:
        if n < 1 or position < 0 or position + n > self.ledger.n_taken:
            raise PadError("only positions that were taken can be expanded")

    def _block_key(self, index: int) -> bytes:
        """The AES key of one block, hedged: 32 fresh bytes of the system go into it when it is first expanded.

        So two copies of a machine that were restored from one snapshot have other pads in every block that neither had
        begun, provided that their kernels' generators were reseeded. spec/pad.md section 4 says what that leaves open.
        """
        with self._lock:
            self.ledger.check()
            block = self._blocks.get(index)
            if block is None:
                raise PadReuseError("pad positions were to be expanded after they were spent")
            if not block.key:
                block.key[:] = derive_key(self._key, b"block", index.to_bytes(8, "big"), os.urandom(KEY_BYTES))
            return bytes(block.key)
