"""Positions of a pad key, each given out once, and the ticket that lets one tensor meet them; spec/pad.md section 4."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from cloister.errors import PadError, PadExhaustedError, PadReuseError
from cloister.pad._guard import ProcessBound

MAX_POSITIONS = 1 << 40
"""Positions of one key. Each is one pad element, in all of its residues."""

T = TypeVar("T")


class _Cell(ProcessBound):
    """What changes in a ledger. Never copied, so every reference to it, saved ones too, sees the same state."""

    __slots__ = ("is_retired", "lock", "n_taken")

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.n_taken = 0
        self.is_retired = False


class PadLedger(ProcessBound):
    """The counter of one key's positions, which only goes up. Safe to use from several threads.

    It holds no key; its numbers are *public*. It cannot be copied or pickled, and refuses to work in a forked child.
    """

    __slots__ = ("_cell",)

    def __init__(self) -> None:
        super().__init__()
        self._cell = _Cell()

    def __repr__(self) -> str:
        return f"PadLedger(n_taken={self._cell.n_taken})"

    @property
    def n_taken(self) -> int:
        """Positions given out so far: all below this number."""
        return self._cell.n_taken

    @property
    def is_retired(self) -> bool:
        """Whether `retire` was called."""
        return self._cell.is_retired

    def take(self, n: int) -> int:
        """Give out positions `start .. start + n - 1` and return `start`. Nobody ever gets one of them again.

        They are gone even if the caller then fails. Nothing is taken where this raises.

        Raises:
            PadReuseError: in a forked process.
            PadExhaustedError: fewer than `n` positions are left, or the key was retired.
            PadError: `n` is below 1.
        """
        self._stay_home()
        n = operator.index(n)
        if n < 1:
            raise PadError("a pad has at least one element")
        with self._cell.lock:
            self.check()
            start = self._cell.n_taken
            if n > MAX_POSITIONS - start:
                raise PadExhaustedError(
                    "the pad key has no positions left", hint="start a new job, which has a new key"
                )
            self._cell.n_taken = start + n
            return start

    def check(self) -> None:
        """Raise unless positions of this key may still be used, here.

        Raises:
            PadReuseError: in a forked process.
            PadExhaustedError: the key was retired.
        """
        self._stay_home()
        if self._cell.is_retired:
            raise PadExhaustedError("the pad key was retired", hint="take pads of the job that is running")

    def retire(self) -> None:
        """Give out nothing any more. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        self._cell.is_retired = True


class _Once(ProcessBound, Generic[T]):
    """What can be had once. Never copied, so every reference to it, saved ones too, finds it gone afterwards."""

    __slots__ = ("content",)

    def __init__(self, content: T) -> None:
        super().__init__()
        self.content = [content]


class PadTicket(ProcessBound, Generic[T]):
    """The right to mask one tensor of one shape, once, with the pad at one range of positions.

    Args:
        start: *public*, first position.
        shape: *public*, of the tensor to mask.
        reveal: gives the pad (*secret*); called at most once.
    """

    __slots__ = ("_once", "shape", "start")

    def __init__(self, start: int, shape: tuple[int, ...], reveal: Callable[[], T]) -> None:
        super().__init__()
        self.start = start
        self.shape = shape
        self._once = _Once(reveal)

    def __repr__(self) -> str:
        return f"PadTicket(start={self.start}, shape={self.shape}, is_used={self.is_used})"

    @property
    def is_used(self) -> bool:
        """Whether `use` was called, successfully or not."""
        return not self._once.content

    def use(self, shape: tuple[int, ...]) -> T:
        """The pad, for the one tensor that the caller masks now. *Secret*.

        The ticket is used up even if making the pad fails: a retry takes another ticket.

        Raises:
            PadReuseError: it was used before, or in a forked process. Fatal.
            PadError: the tensor is of another shape; the ticket is used up.
        """
        self._stay_home()
        try:
            reveal = self._once.content.pop()  # atomic: of two threads one finds it gone
        except IndexError:
            raise PadReuseError("a pad was to be used a second time") from None
        if tuple(shape) != self.shape:
            raise PadError(f"a pad of shape {self.shape} does not fit a tensor of shape {tuple(shape)}")
        return reveal()
