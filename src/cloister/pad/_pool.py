"""Pads made ahead of time, with their unmasking terms, in bounded memory; spec/pad.md section 4."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Protocol, Self

from cloister.errors import PadError, PadExhaustedError
from cloister.pad._guard import ProcessBound
from cloister.pad._ledger import PadTicket
from cloister.pad._source import Pad

# A shape is forgotten once its source was asked for others this often. Batches of a few padded lengths stay known.
_FORGET_AFTER = 32


class PadMaker(Protocol):
    """What a pool makes pads with. Both methods are called from several threads at the same time."""

    def make(self, n_tokens: int) -> Pad:
        """A pad of fresh positions. Where it fails, the positions are lost and what was made is zeroed."""
        ...

    def pad_bytes(self, n_tokens: int) -> int:
        """`Pad.n_bytes` of such a pad."""
        ...


class _Shelf:
    """The pads of one source and shape that lie ready."""

    __slots__ = ("failure", "maker", "n_others", "n_tokens", "n_waiting", "pad_bytes", "tickets")

    def __init__(self, maker: PadMaker, n_tokens: int) -> None:
        self.maker = maker
        self.n_tokens = n_tokens
        self.pad_bytes = maker.pad_bytes(n_tokens)
        self.tickets: deque[PadTicket[Pad]] = deque()
        self.n_waiting = 0
        self.n_others = 0  # times that the source was asked for other shapes since it was asked for this one
        self.failure: BaseException | None = None

    @property
    def n_spare(self) -> int:
        """Pads that nobody waits for; below 0 where more wait than lie ready."""
        return len(self.tickets) - self.n_waiting


class PadPool(ProcessBound):
    """The pads that all sources of a session have ready, made by one background thread. Close it, or use `with`.

    It learns which pads to make from what is asked for. Whatever has the fewest ready is made next, and of those
    the one that was asked for longest ago: layers take turns, so it is needed first. In time all have the same number.

    Args:
        capacity_bytes: *public*, what the ready pads and the one in the making may fill. What making one needs
            beside itself comes on top. With 0 there is no thread, and every pad is made where it is asked for.
        wait_s: *public*, what to do when nothing is ready: wait so long and then refuse, or, without a number, make the
            pad here and now.

    Raises:
        PadError: a pool without memory cannot be waited for.
    """

    __slots__ = ("_capacity", "_changed", "_held", "_is_closed", "_shelves", "_thread", "_wait_s")

    def __init__(self, capacity_bytes: int, *, wait_s: float | None = None) -> None:
        super().__init__()
        if capacity_bytes <= 0 and wait_s is not None:
            raise PadError("a pool of pads that may hold nothing cannot be waited for")
        self._capacity = capacity_bytes
        self._wait_s = wait_s
        self._shelves: dict[tuple[PadMaker, int], _Shelf] = {}  # the one that was asked for longest ago comes first
        self._held = 0  # bytes
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._fill, name="cloister-pad-pool", daemon=True)
        if capacity_bytes > 0:
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
        """Pads that lie ready, of all sources and shapes. *Public*."""
        return sum(len(shelf.tickets) for shelf in list(self._shelves.values()))

    def take(self, maker: PadMaker, n_tokens: int) -> PadTicket[Pad]:
        """A ticket for a pad that nobody else has or gets. Safe to call from several threads.

        Args:
            maker: the source that asks.
            n_tokens: *public*.

        Raises:
            PadExhaustedError: nothing was ready in time, and the pool does not make pads on the spot.
            PadReuseError: in a forked process.
            PadError: the pool is closed, or the source was dropped meanwhile.
            Exception: what the maker raised, in this thread or, once, in the background.
        """
        self._stay_home()
        n_bytes = maker.pad_bytes(n_tokens)
        with self._changed:
            self._check_open()
            if n_bytes <= self._capacity and (ready := self._from_shelf(maker, n_tokens)) is not None:
                return ready
        if self._wait_s is None:
            return _ticket(maker.make(n_tokens))
        raise PadExhaustedError(
            f"no pad of {n_tokens} tokens ({n_bytes} bytes) was ready within {self._wait_s:g} s",
            hint="give the pool more memory, or let pads be made when it is dry",
        )

    def drop(self, maker: PadMaker) -> None:
        """Forget a source, and zero what lies ready of it. Whoever waits for its pads is refused.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._changed:
            for shelf in [shelf for shelf in self._shelves.values() if shelf.maker is maker]:
                shelf.failure = PadError("the source of these pads is closed")
                self._forget(shelf)

    def close(self) -> None:
        """Stop the background thread, which ends the pad it is at, and zero what lies ready. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        with self._changed:
            for shelf in list(self._shelves.values()):
                self._forget(shelf)

    def _check_open(self) -> None:
        if self._is_closed:
            raise PadError("the pool of pads is closed")

    def _from_shelf(self, maker: PadMaker, n_tokens: int) -> PadTicket[Pad] | None:
        """A ready pad, after waiting for one where the pool waits; None where there is none."""
        shelf = self._ask(maker, n_tokens)
        self._changed.notify_all()
        if self._wait_s is not None:
            shelf.n_waiting += 1
            try:
                self._changed.wait_for(lambda: shelf.tickets or shelf.failure or self._is_closed, self._wait_s)
            finally:
                shelf.n_waiting -= 1
            self._check_open()
        if shelf.failure is not None:
            # Told once: the next one to ask lets the thread try again.
            failure, shelf.failure = shelf.failure, None
            raise failure
        return self._pop(shelf) if shelf.tickets else None

    def _ask(self, maker: PadMaker, n_tokens: int) -> _Shelf:
        """The shelf of a shape, as the one that was asked for last; shapes out of use are forgotten."""
        shelf = self._shelves.pop((maker, n_tokens), None) or _Shelf(maker, n_tokens)
        for other in [other for other in self._shelves.values() if other.maker is maker]:
            other.n_others += 1
            if other.n_others > _FORGET_AFTER and not other.n_waiting:
                self._forget(other)
        shelf.n_others = 0
        self._shelves[maker, n_tokens] = shelf
        return shelf

    def _pop(self, shelf: _Shelf) -> PadTicket[Pad]:
        self._held -= shelf.pad_bytes
        self._changed.notify_all()
        return shelf.tickets.popleft()

    def _wipe_one(self, shelf: _Shelf) -> None:
        ticket = self._pop(shelf)
        ticket.use(ticket.shape).wipe()

    def _forget(self, shelf: _Shelf) -> None:
        del self._shelves[shelf.maker, shelf.n_tokens]
        while shelf.tickets:
            self._wipe_one(shelf)
        self._changed.notify_all()

    def _fill(self) -> None:
        """The background thread."""
        while (shelf := self._next_shelf()) is not None:
            try:
                self._shelve(shelf, shelf.maker.make(shelf.n_tokens))
            except BaseException as error:  # whatever it is, a taker must hear of it
                # Without the frames, its own and those of what came before it: their locals are secret.
                error.__cause__ = error.__context__ = None
                with self._changed:
                    self._held -= shelf.pad_bytes
                    shelf.failure = error.with_traceback(None)
                    self._changed.notify_all()

    def _next_shelf(self) -> _Shelf | None:
        """Wait until a pad is lacking and has room, which is then kept for it; None once the pool is closed."""
        with self._changed:
            while not self._is_closed:
                shelf = min(
                    (shelf for shelf in self._shelves.values() if shelf.failure is None),
                    key=lambda shelf: shelf.n_spare,
                    default=None,
                )
                # Nothing smaller goes first where one does not fit, or a large one would never get room.
                if shelf is not None and self._has_room(shelf):
                    self._held += shelf.pad_bytes
                    return shelf
                self._changed.wait()
            return None

    def _has_room(self, shelf: _Shelf) -> bool:
        """Whether one more fits. A shelf with two more than this one gives up pads for it."""
        while self._held + shelf.pad_bytes > self._capacity:
            fullest = max(self._shelves.values(), key=lambda other: other.n_spare)
            if fullest.n_spare < shelf.n_spare + 2:
                return False
            self._wipe_one(fullest)
        return True

    def _shelve(self, shelf: _Shelf, pad: Pad) -> None:
        with self._changed:
            if self._is_closed or self._shelves.get((shelf.maker, shelf.n_tokens)) is not shelf:
                self._held -= shelf.pad_bytes
                pad.wipe()
                return
            shelf.tickets.append(_ticket(pad))
            self._changed.notify_all()


def _ticket(pad: Pad) -> PadTicket[Pad]:
    return PadTicket(pad.start, pad.r.shape[1:], lambda: pad)
