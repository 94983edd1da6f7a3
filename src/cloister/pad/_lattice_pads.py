"""Lattice pads: blocks of 1,024 tokens under one fresh vector a, of which each row is used once; spec/pad.md,
"Homomorphic pads"."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from jaxtyping import UInt8, UInt32

from cloister.errors import PadError
from cloister.kernels import _native
from cloister.pad._check import CheckKeys
from cloister.pad._expand import ByteArray
from cloister.pad._lattice import KeyArray, LatticeParameters, LatticeSecrets
from cloister.pad._ledger import PadLedger, PadTicket
from cloister.pad._modes import PadMode
from cloister.pad._pool import PadPool
from cloister.pad._source import Pad, PadSource
from cloister.pad._stream import KEY_BYTES, MAX_PAD_POSITIONS, PadStream, derive_key

if TYPE_CHECKING:
    import numpy.typing as npt

_N = LatticeParameters.N_TOKENS
_NOISE_MODULI = (252, 255)  # multiples of 9 and of 5: together uniform modulo 45, and few bytes are rejected
# Of 4,096 words of 30 bits 1,024 must be below the prime, each with p > 1/2: fewer are with probability at most
# exp(-4096 * KL(1/4 || 1/2)) < 2^-772 (Chernoff).
_N_WORDS = 4096
_WORD_MASK = np.uint32((1 << 30) - 1)
# A block is drawn again where one of its values is the excluded one: at most every sixth, with 2^17 features.
_MAX_DRAWS = 64
_ZEROS = bytes(4 * _N_WORDS)


class _Rest:
    """A block, of which the rows from `row` are left. Of one thread at a time: who works with it has taken it out."""

    __slots__ = ("pad", "row")

    def __init__(self, pad: Pad) -> None:
        self.pad = pad
        self.row = _N

    def move(self, to: Pad, done: int, n: int) -> int:
        """Move up to `n` rows to the rows from `done`, and zero them here. Rows are gone before they are read."""
        start = self.row
        self.row = stop = min(start + n, _N)
        n_moved = stop - start
        to.r[:, done : done + n_moved] = self.pad.r[:, start:stop]
        to.u[done : done + n_moved] = self.pad.u[start:stop]
        to.correction[done : done + n_moved] = self.pad.correction[start:stop]
        self.pad.r[:, start:stop] = 0
        self.pad.u[start:stop] = 0
        self.pad.correction[start:stop] = 0
        return n_moved


class LatticePads(PadSource):
    """The mode `lattice`. Made by `PadKeys.lattice`.

    The ledger counts rows of blocks, of those drawn again too: it ends after 2^30 blocks, and new secrets need a new
    job.

    Args:
        key: *secret*, of this source alone, which owns the buffer and zeroes it.
        secrets: *secret*, of this source alone, which zeroes them.
        check: *secret*, of the same layer and direction.
        pool: shared by the sources of a session.

    Attributes:
        parameters: *public*.
        ledger: the rows of this key.

    Raises:
        PadReuseError: another source has the secrets.
        PadError: `check` is of another shape.
    """

    __slots__ = ("_key", "_lock", "_n_used", "_pool", "_rests", "_secrets", "ledger", "parameters")

    mode = PadMode.LATTICE

    def __init__(self, key: bytearray, secrets: LatticeSecrets, check: CheckKeys, pool: PadPool) -> None:
        super().__init__(check, secrets.input_limit)
        if (check.n_out, check.n_in) != (secrets.n_out, secrets.n_in):
            raise PadError("the keys of the check are not of the layer of the lattice secrets")
        secrets.claim()
        self._key = key
        self._secrets = secrets
        self._pool = pool
        self._lock = threading.Lock()
        self._rests: list[_Rest] = []
        self._n_used = 0
        self.parameters = secrets.parameters
        self.ledger = PadLedger()

    @property
    def n_used(self) -> int:
        """See `PadSource.n_used`."""
        return self._n_used

    def take(self, n_tokens: int) -> PadTicket[Pad]:
        """See `PadSource.take`."""
        self.ledger.check()
        if n_tokens < 1:
            raise PadError("a pad has at least one token")
        if n_tokens * max(self._secrets.n_in, self._secrets.n_out) > MAX_PAD_POSITIONS:
            raise PadError(f"a pad has at most {MAX_PAD_POSITIONS} elements")
        return self._pool.take(self, n_tokens)

    def pad_bytes(self, n_tokens: int) -> int:
        """See `PadMaker.pad_bytes`. The memory of a block, one for each thread that makes pads, comes on top."""
        return n_tokens * (self._secrets.n_planes * self._secrets.n_in + 4 * self._secrets.n_out + 8)

    def make(self, n_tokens: int) -> Pad:
        """See `PadMaker.make`. Whole blocks go where they belong at once; the last rows come from one that is kept."""
        self.ledger.check()
        pad = self._empty(n_tokens)
        try:
            starts: list[int] = []
            for done in range(0, n_tokens - _N + 1, _N):
                starts.append(self._fill(pad, done))
            done = len(starts) * _N
            while done < n_tokens:
                start, n_moved = self._move_rest(pad, done, n_tokens - done)
                starts.append(start)
                done += n_moved
            # After `close` the secrets may have been zeros, which mask nothing.
            self.ledger.check()
        except BaseException:
            pad.wipe()
            raise
        pad.start = starts[0]
        with self._lock:
            self._n_used += n_tokens * self._secrets.n_in
        return pad

    def close(self) -> None:
        """See `PadSource.close`. The ledger goes first: what is being made meanwhile is then never given out."""
        self._stay_home()
        self.ledger.retire()
        self._pool.drop(self)
        with self._lock:
            for rest in self._rests:
                rest.pad.wipe()
            self._rests.clear()
        self._secrets.wipe()
        self._key[:] = bytes(len(self._key))
        self.check.wipe()

    def _empty(self, n_tokens: int) -> Pad:
        secrets = self._secrets
        r = np.empty((secrets.n_planes, n_tokens, secrets.n_in), np.uint8)
        u = np.empty((n_tokens, secrets.n_out), np.uint32)
        return Pad(0, r, u, np.empty(n_tokens, np.uint64))

    def _move_rest(self, pad: Pad, done: int, n: int) -> tuple[int, int]:
        """Up to `n` rows of a block that is begun, or of a new one: the first one's position, and how many."""
        with self._lock:
            rest = self._rests.pop() if self._rests else _Rest(self._empty(_N))
        try:
            if rest.row == _N:
                rest.pad.start, rest.row = self._fill(rest.pad, 0), 0
            start = rest.pad.start + rest.row
            n_moved = rest.move(pad, done, n)
        except BaseException:
            rest.pad.wipe()
            raise
        with self._lock:
            if self.ledger.is_retired:
                rest.pad.wipe()
            else:  # to be taken next, but for one without rows, which is kept for its memory
                self._rests.insert(0 if rest.row == _N else len(self._rests), rest)
        return start, n_moved

    def _fill(self, pad: Pad, first: int) -> int:
        """One fresh block into the rows of `pad` from `first`; returns its position."""
        keys, check, out = self._secrets, self.check, (pad.r, pad.u, pad.correction)
        for _ in range(_MAX_DRAWS):
            start = self.ledger.take(_N)
            a, noise = self._draw(start // _N)
            try:
                is_usable = _native.lattice_block(keys.code, a, keys.s, keys.z, check.v, check.rho, noise, *out, first)
            finally:
                for array in (a, noise):
                    if array is not None:
                        array.fill(0)
            if is_usable:
                return start
        raise PadError("the vectors of a lattice pad are not random")

    def _draw(self, counter: int) -> tuple[UInt32[KeyArray, "primes rank 1024"], UInt8[ByteArray, "2 1024 in"] | None]:
        """The vector a of one block, and its noise. Both *secret*, and hedged: 32 fresh bytes go into their key."""
        key = bytearray(derive_key(self._key, b"vector", counter.to_bytes(8, "big"), os.urandom(KEY_BYTES)))
        try:
            return _uniform(key, self.parameters), self._draw_noise(key)
        finally:
            key[:] = bytes(len(key))

    def _draw_noise(self, key: bytearray) -> UInt8[ByteArray, "2 1024 in"] | None:
        if not self.parameters.has_noise:
            return None
        stream = PadStream(bytearray(derive_key(key, b"noise")))
        shape = (_N, self._secrets.n_in)
        noise = stream.draw(shape, _NOISE_MODULI).use(shape)
        stream.retire()
        return noise


def _uniform(key: bytearray, parameters: LatticeParameters) -> UInt32[KeyArray, "primes rank 1024"]:
    """Uniform below each prime: words of 30 bits of AES-256-CTR, without those that are not below."""
    context = Cipher(algorithms.AES256(bytes(key)), modes.CTR(bytes(16))).encryptor()
    a = np.empty((len(parameters.primes), parameters.rank, _N), np.uint32)
    words: npt.NDArray[np.uint32] = np.empty(_N_WORDS, np.dtype("<u4"))
    try:
        for i, prime in enumerate(parameters.primes):
            for j in range(parameters.rank):
                context.reset_nonce(bytes((i, j)) + bytes(14))
                context.update_into(_ZEROS, words.view(np.uint8).data)
                words &= _WORD_MASK
                good = words[words < prime]
                n_good = len(good)
                a[i, j, :n_good] = good[:_N]
                good.fill(0)
                if n_good < _N:
                    a.fill(0)
                    raise PadError("the key stream of a lattice pad is not random")
    finally:
        words.fill(0)
    return a
