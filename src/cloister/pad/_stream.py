"""The pads of one layer and direction in one job: uniform residues, addressed by position; spec/pad.md section 3."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence

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

    __slots__ = ("_blocks", "_key", "_lock", "ledger")

    def __init__(self, key: bytearray) -> None:
        super().__init__()
        self._key = key
        self._blocks: dict[int, _Block] = {}
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
            PadError: an empty shape or a modulus that pads cannot have.
        """
        checked, n = check_moduli(moduli), math.prod(shape)
        if min(shape, default=1) < 1:
            raise PadError("a pad has at least one element")
        start = self.take(n)

        def reveal() -> UInt8[ByteArray, "planes ..."]:
            planes = self.expand(start, n, checked)
            self.spend(start, n)
            return planes.reshape(len(checked), *shape)

        return PadTicket(start, tuple(shape), reveal)

    def take(self, n: int) -> int:
        """`PadLedger.take` for a caller that expands in pieces. It must `spend` what it has expanded.

        Raises:
            PadReuseError, PadExhaustedError, PadError: as `PadLedger.take`; also PadError for more than 2^32 positions.
        """
        self._stay_home()
        if n > MAX_PAD_POSITIONS:
            raise PadError(f"a pad has at most {MAX_PAD_POSITIONS} elements")
        with self._lock:
            start = self.ledger.take(n)
            for index in range(start // BLOCK_POSITIONS, (start + n - 1) // BLOCK_POSITIONS + 1):
                self._blocks.setdefault(index, _Block())
        return start

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
        end = position + n
        while position < end:
            index, first = divmod(position, BLOCK_POSITIONS)
            stop = min(end, (index + 1) * BLOCK_POSITIONS)
            done = n - (end - position)
            expand_block(self._block_key(index), first, checked, out[:, done : done + stop - position])
            position = stop

    def spend(self, position: int, n: int) -> None:
        """Say that these positions, once taken, will not be expanded again. A block's key is zeroed with its last one.

        Raises:
            PadReuseError: they were spent before, or in a forked process.
        """
        self._stay_home()
        end = position + n
        with self._lock:
            if self.ledger.is_retired:
                return  # every key is zeroed already
            while position < end:
                index = position // BLOCK_POSITIONS
                stop = min(end, (index + 1) * BLOCK_POSITIONS)
                self._spend_in_block(index, stop - position)
                position = stop

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
