"""The keys with which a layer's answers are checked: secret words rho, and V = W^T rho modulo 2^64; spec/pad.md.

Success of the check rho . y = V . x + k (mod 2^64) means that y = W_q x over the integers. A wrong y, with a difference
d != 0, passes with probability 2^(j - 64), 2^j the largest power of two that divides every d_o: at most 2^-33 for
`faithful` and 2^-41 for `fast`, as |d_o| < m. It holds while rho is secret: the first answer that fails is the last.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import UInt64

from cloister.errors import PadError
from cloister.pad._guard import ProcessBound
from cloister.pad._modes import Direction

if TYPE_CHECKING:
    import numpy.typing as npt

    from cloister.ring import QuantizedWeight

    WordArray = npt.NDArray[np.uint64]
else:
    WordArray = np.ndarray

_BLOCK_ROWS = 64  # of the weight as 64-bit words at a time, so that they stay in the cache


class CheckKeys(ProcessBound):
    """The words of one layer and direction. *Secret*; `wipe` them. `in` and `out` are those of the direction.

    Args:
        rho: uniform words, one for each output.
        v: W^T rho modulo 2^64, one for each input.
    """

    __slots__ = ("_is_wiped", "_rho", "_v")

    def __init__(self, rho: UInt64[WordArray, " out"], v: UInt64[WordArray, " in"]) -> None:
        super().__init__()
        self._rho = rho
        self._v = v
        self._is_wiped = False

    def __repr__(self) -> str:
        return f"CheckKeys(n_out={self.n_out}, n_in={self.n_in})"

    @classmethod
    def generate(cls, weight: QuantizedWeight, direction: Direction) -> Self:
        """Fresh words of the system's generator, and their product with the integers of the weight, exact mod 2^64.

        Args:
            weight: *public*. Backward multiplies by its transpose: rho is over its features, V over its channels.
            direction: *public*.
        """
        w_q = weight.w_q.cpu().numpy()
        n_out, n_in = w_q.shape if direction is Direction.FORWARD else w_q.T.shape
        rho, v = np.frombuffer(bytearray(os.urandom(8 * n_out)), np.uint64), np.zeros(n_in, np.uint64)
        for start in range(0, len(w_q), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            rows = w_q[block].astype(np.int64).view(np.uint64)  # two's complement is mod 2^64
            if direction is Direction.FORWARD:
                v += np.einsum("o,oi->i", rho[block], rows)
            else:
                v[block] = rows @ rho
        return cls(rho, v)

    @property
    def n_out(self) -> int:
        """Outputs of the product. *Public*."""
        return len(self._rho)

    @property
    def n_in(self) -> int:
        """Inputs of the product. *Public*."""
        return len(self._v)

    @property
    def rho(self) -> UInt64[WordArray, " out"]:
        """*Secret*. PadError after `wipe`, since words of zero would accept every answer."""
        self._check()
        return self._rho

    @property
    def v(self) -> UInt64[WordArray, " in"]:
        """*Secret*. PadError after `wipe`."""
        self._check()
        return self._v

    def wipe(self) -> None:
        """Zero all words; no answer may be under check. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        self._is_wiped = True
        self._rho.fill(0)
        self._v.fill(0)

    def _check(self) -> None:
        self._stay_home()
        if self._is_wiped:
            raise PadError("the keys of the check are gone", hint="make a new session")
