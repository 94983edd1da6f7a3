"""Pads made ahead of time, with their unmasking terms, in bounded memory; spec/pad.md section 4."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import UInt8

from cloister.errors import PadError, PadExhaustedError
from cloister.pad._expand import ByteArray, check_moduli
from cloister.pad._guard import ProcessBound
from cloister.pad._ledger import PadTicket
from cloister.pad._stream import PadStream

if TYPE_CHECKING:
    import numpy.typing as npt

    AnyArray = npt.NDArray[Any]
else:
    AnyArray = np.ndarray

Shape = tuple[int, ...]
UnmaskTerm = Callable[[UInt8[ByteArray, "planes ..."]], tuple[AnyArray, ...]]


class Pad(ProcessBound):
    """One pad and what takes it off again. *Secret*, all of it; `wipe` it after unmasking.

    Attributes:
        start: *public*, first position of the pad.
        r: the pad, uniform in each plane's residue ring.
        u: what the unmask term gave for it: W r for each weight W that multiplies the masked tensor.
    """

    __slots__ = ("r", "start", "u")

    def __init__(self, start: int, r: UInt8[ByteArray, "planes ..."], u: tuple[AnyArray, ...]) -> None:
        super().__init__()
        self.start = start
        self.r = r
        self.u = u

    def __repr__(self) -> str:
        return f"Pad(start={self.start}, shape={self.r.shape[1:]})"

    @property
    def n_bytes(self) -> int:
        """Size of `r` and `u` in bytes."""
        return self.r.nbytes + sum(term.nbytes for term in self.u)

    def wipe(self) -> None:
        """Zero `r` and `u` in place. May be called again."""
        for array in (self.r, *self.u):
            array.fill(0)


class _Shelf:
    """The pads of one shape that lie ready."""

    __slots__ = ("pad_bytes", "tickets")

    def __init__(self) -> None:
        self.tickets: deque[PadTicket[Pad]] = deque()
        self.pad_bytes = 0  # of one pad; unknown before the first


class PadPool(ProcessBound):
    """A bounded pool of pads of known shapes, filled by one background thread. Close it, or use it in a `with`.

    Each shape has an equal share of the capacity, so that no shape can starve another.

    Args:
        stream: where pads come from; several pools may share one.
        moduli: *public*, one for each residue plane.
        unmask_term: gives `u` for `r`, both *secret*: a tuple of writable arrays, of one size for one shape, that
            nobody else holds. Called by the background thread and by takers, at the same time.
        shapes: *public*, of the tensors that will be masked, without repeats.
        capacity_bytes: what the ready pads may fill, `r` and `u` together. What one `unmask_term` needs comes on top.

    Raises:
        PadError: no shapes, or a modulus that pads cannot have.
    """

    __slots__ = ("_changed", "_failure", "_is_closed", "_moduli", "_share_bytes", "_shelves", "_stream", "_thread",
                 "_unmask_term")  # fmt: skip

    def __init__(
        self,
        stream: PadStream,
        moduli: Sequence[int],
        unmask_term: UnmaskTerm,
        *,
        shapes: Sequence[Shape],
        capacity_bytes: int,
    ) -> None:
        super().__init__()
        if not shapes:
            raise PadError("a pool of pads needs the shapes to make")
        self._stream = stream
        self._moduli = check_moduli(moduli)
        self._unmask_term = unmask_term
        self._shelves = {tuple(shape): _Shelf() for shape in shapes}
        self._share_bytes = capacity_bytes // len(self._shelves)
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._fill, name="cloister-pad-pool", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"PadPool(n_ready={self.n_ready})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_ready(self) -> int:
        """Pads that lie ready, of all shapes. *Public*."""
        return sum(len(shelf.tickets) for shelf in self._shelves.values())

    def take(self, shape: Shape, *, timeout_s: float, compute_when_dry: bool) -> PadTicket[Pad]:
        """A ticket for a pad that nobody else has or gets. Safe to call from several threads.

        Args:
            shape: *public*, of the tensor to mask. One that the pool does not make is never waited for.
            timeout_s: how long to wait for the background thread.
            compute_when_dry: what to do then: make the pad here and now, or refuse.

        Raises:
            PadExhaustedError: nothing is ready and `compute_when_dry` is false; or the key ran out, or was retired.
            PadReuseError: in a forked process.
            PadError: the pool is closed.
            Exception: whatever stopped the background thread, at every call from then on.
        """
        self._stay_home()
        shelf = self._shelves.get(tuple(shape)) or _Shelf()
        with self._changed:
            if tuple(shape) in self._shelves:
                self._changed.wait_for(lambda: shelf.tickets or self._is_closed or self._failure, timeout_s)
            self._check()
            if shelf.tickets:
                self._changed.notify_all()
                return shelf.tickets.popleft()
        if compute_when_dry:
            return self._ticket(self._make(tuple(shape)))
        raise PadExhaustedError(
            f"no pad of shape {tuple(shape)} was ready within {timeout_s:g} s",
            hint="give the pool more memory, or let pads be computed when it is dry",
        )

    def close(self) -> None:
        """Stop the background thread, which ends the pad it is at, and zero what lies ready. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        for shape, shelf in self._shelves.items():
            while shelf.tickets:
                shelf.tickets.popleft().use(shape).wipe()

    def _check(self) -> None:
        if self._is_closed:
            raise PadError("the pool of pads is closed")
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        self._stream.ledger.check()

    def _fill(self) -> None:
        """The background thread."""
        try:
            while (shape := self._next_shape()) is not None:
                self._shelve(shape, self._make(shape))
        except BaseException as error:  # whatever it is, the takers must hear of it
            with self._changed:
                # Without the frames, its own and those of what came before it: their locals are secret.
                error.__cause__ = error.__context__ = None
                self._failure = error.with_traceback(None)
                self._changed.notify_all()

    def _next_shape(self) -> Shape | None:
        """Wait until there is room for another pad, and say of which shape; None once the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._shapes_with_room())
            if self._is_closed:
                return None
            return min(self._shapes_with_room(), key=lambda shape: len(self._shelves[shape].tickets))

    def _shapes_with_room(self) -> list[Shape]:
        return [
            shape
            for shape, shelf in self._shelves.items()
            if (len(shelf.tickets) + 1) * shelf.pad_bytes <= self._share_bytes
        ]

    def _shelve(self, shape: Shape, pad: Pad) -> None:
        shelf = self._shelves[shape]
        with self._changed:
            if pad.n_bytes > self._share_bytes:
                pad.wipe()
                raise PadExhaustedError(
                    f"a pad of shape {shape} takes {pad.n_bytes} bytes, its share of the pool is {self._share_bytes}"
                )
            shelf.pad_bytes = pad.n_bytes
            shelf.tickets.append(self._ticket(pad))
            self._changed.notify_all()

    def _make(self, shape: Shape) -> Pad:
        """One pad of fresh positions. Where the unmask term fails, the positions are lost and `r` is zeroed."""
        drawn = self._stream.draw(shape, self._moduli)
        r = drawn.use(shape)
        try:
            pad = Pad(drawn.start, r, self._unmask_term(r))
            if not all(term.flags.writeable for term in pad.u):
                raise PadError("an unmask term that cannot be zeroed")
            return pad
        except BaseException:
            r.fill(0)
            raise

    @staticmethod
    def _ticket(pad: Pad) -> PadTicket[Pad]:
        return PadTicket(pad.start, pad.r.shape[1:], lambda: pad)
