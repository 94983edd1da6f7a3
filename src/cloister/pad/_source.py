"""A pad with what takes it off again, and the sources of such pads, one for each layer and direction; spec/pad.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import UInt8, UInt32, UInt64

from cloister.pad._check import CheckKeys, WordArray
from cloister.pad._expand import ByteArray
from cloister.pad._guard import ProcessBound
from cloister.pad._ledger import PadTicket
from cloister.pad._modes import PadMode

if TYPE_CHECKING:
    import numpy.typing as npt

    ElementArray = npt.NDArray[np.uint32]
else:
    ElementArray = np.ndarray


class Pad(ProcessBound):
    """One pad and what takes it off again. *Secret*, all of it; `wipe` it after unmasking. Arrays are C-contiguous.

    Attributes:
        start: *public*, first position of the pad.
        r: the pad, one plane for each of the format's `pad_moduli`.
        u: W_q r as elements in [0, m).
        correction: k_t with rho . y_t = V . x_t + k_t modulo 2^64; all zero for the one-time pads.
    """

    __slots__ = ("correction", "r", "start", "u")

    def __init__(
        self,
        start: int,
        r: UInt8[ByteArray, "planes tokens in"],
        u: UInt32[ElementArray, "tokens out"],
        correction: UInt64[WordArray, " tokens"],
    ) -> None:
        super().__init__()
        self.start = start
        self.r = r
        self.u = u
        self.correction = correction

    def __repr__(self) -> str:
        return f"Pad(start={self.start}, shape={self.r.shape[1:]})"

    @property
    def n_bytes(self) -> int:
        """Size of the arrays in bytes."""
        return self.r.nbytes + self.u.nbytes + self.correction.nbytes

    def wipe(self) -> None:
        """Zero the arrays in place. May be called again."""
        for array in (self.r, self.u, self.correction):
            array.fill(0)


class PadSource(ProcessBound, ABC):
    """The pads of one layer and direction in one job. Thread-safe. `in` and `out` are those of the direction.

    Args:
        check: the keys that the answers of this layer and direction are checked with; `close` zeroes them.
        input_limit: *public*, the largest norm of a row x_q that this source may mask; for `quantize_rows`.

    Attributes:
        mode: *public*.
        check: *secret*.
        input_limit: *public*.
    """

    __slots__ = ("check", "input_limit")

    mode: ClassVar[PadMode]

    def __init__(self, check: CheckKeys, input_limit: float) -> None:
        super().__init__()
        self.check = check
        self.input_limit = input_limit

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_used={self.n_used})"

    @property
    @abstractmethod
    def n_used(self) -> int:
        """Pad elements given out so far, those made ahead of time included. *Public*."""

    @abstractmethod
    def take(self, n_tokens: int) -> PadTicket[Pad]:
        """A ticket for one pad of shape (n_tokens, in) that nobody else has or gets; to be used once. May block.

        Raises:
            PadReuseError: in a forked process. Fatal.
            PadExhaustedError: the key has no positions left, was retired, or nothing was ready and the pool refuses.
            PadError: fewer than one token, or the source is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Zero what was made ahead of time, and the keys of the check. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
