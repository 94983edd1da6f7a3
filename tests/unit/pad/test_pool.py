"""The pool: what it gives, what it learns, how much it holds, and every way in which it stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from cloister.errors import PadError, PadExhaustedError
from cloister.pad import Direction, Pad, PadKeys, PadPool, PadStream, PadTicket

MODULI = (256, 251)
WIDTH = 8
PAD_BYTES = 2 * WIDTH + 4 * WIDTH + 8  # of a token


class Maker:
    """Stands for a source. What it made is kept, to see that it is zeroed."""

    def __init__(self, stream: PadStream, before: Callable[[int], None] = lambda _: None) -> None:
        self.stream = stream
        self.before = before
        self.made: list[Pad] = []
        self.n_here = 0
        self._main = threading.current_thread()

    def pad_bytes(self, n_tokens: int) -> int:
        return n_tokens * PAD_BYTES

    def make(self, n_tokens: int) -> Pad:
        if threading.current_thread() is self._main:
            self.n_here += 1
        else:
            self.before(n_tokens)
        ticket = self.stream.draw((n_tokens, WIDTH), MODULI)
        r = ticket.use(ticket.shape)
        pad = Pad(ticket.start, r, 1 + r[0].astype(np.uint32), np.zeros(n_tokens, np.uint64))
        assert pad.n_bytes == self.pad_bytes(n_tokens)
        self.made.append(pad)
        return pad


@pytest.fixture
def maker(stream: PadStream) -> Maker:
    return Maker(stream)


def use(ticket: PadTicket[Pad]) -> Pad:
    return ticket.use(ticket.shape)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_zero(pad: Pad) -> bool:
    return not (pad.r.any() or pad.u.any() or pad.correction.any())


def test_without_memory_every_pad_is_made_where_it_is_asked_for(maker: Maker):
    with PadPool(0) as pool:
        pads = [use(pool.take(maker, n)) for n in (3, 3, 1)]
        assert [pad.r.shape for pad in pads] == [(2, 3, WIDTH), (2, 3, WIDTH), (2, 1, WIDTH)]
        assert (maker.n_here, pool.n_ready) == (3, 0)
    with pytest.raises(PadError, match="closed"):
        pool.take(maker, 3)
    with pytest.raises(PadError, match="waited for"):
        PadPool(0, wait_s=1)


def test_a_shape_is_learned_when_it_is_first_asked_for(maker: Maker):
    with PadPool(3 * 4 * PAD_BYTES + 1) as pool:
        assert pool.n_ready == 0
        first = pool.take(maker, 4)
        assert maker.n_here == 1
        wait_until(lambda: pool.n_ready == 3)
        time.sleep(0.02)
        assert (pool.n_ready, repr(pool)) == (3, "PadPool(n_ready=3)")
        for _ in range(8):
            wait_until(lambda: pool.n_ready > 0)
            ticket = pool.take(maker, 4)
            pad = use(ticket)
            assert (ticket.start, ticket.shape) == (pad.start, pad.r.shape[1:])
            assert pad.r.any()
        assert maker.n_here == 1
        assert use(first).start == 0
        wait_until(lambda: pool.n_ready == 3)


def test_sources_and_shapes_take_turns(stream: PadStream, keys: PadKeys):
    makers = [Maker(stream), Maker(keys.stream("other", Direction.BACKWARD))]
    with PadPool(2 * (1 + 2) * 2 * PAD_BYTES) as pool:
        for n_tokens in (1, 2):
            for maker in makers:
                pool.take(maker, n_tokens)
        wait_until(lambda: pool.n_ready == 8)
        assert [len(shelf.tickets) for shelf in pool._shelves.values()] == [2] * 4
        assert pool._held == pool._capacity


def test_what_was_asked_for_first_does_not_keep_the_whole_pool(maker: Maker):
    with PadPool(10 * PAD_BYTES) as pool:
        pool.take(maker, 1)
        wait_until(lambda: pool.n_ready == 10)
        pool.take(maker, 9)
        wait_until(lambda: pool.n_ready == 2)
        assert {n: len(shelf.tickets) for (_, n), shelf in pool._shelves.items()} == {1: 1, 9: 1}
        # Two were made on the spot, for takers who have them still.
        assert sorted(pad.r.shape[1] for pad in maker.made if not is_zero(pad)) == [1, 1, 9, 9]


def test_nothing_smaller_takes_the_room_of_a_large_pad(maker: Maker, stream: PadStream):
    other = Maker(stream)
    with PadPool(10 * PAD_BYTES) as pool:
        for each in (maker, other):
            pool.take(each, 5)
        wait_until(lambda: pool.n_ready == 2)
        pool.take(maker, 6)
        for each in (maker, other):
            assert use(pool.take(each, 5)).r.any()
        wait_until(lambda: pool.n_ready == 1)
        assert maker.made[-1].r.shape[1] == 6
        assert use(pool.take(maker, 6)) is maker.made[-1]


def test_a_pad_that_does_not_fit_is_made_on_the_spot(maker: Maker):
    with PadPool(3 * PAD_BYTES) as pool:
        for _ in range(2):
            assert use(pool.take(maker, 4)).r.shape[1] == 4
        assert (maker.n_here, pool._shelves) == (2, {})
    with PadPool(3 * PAD_BYTES, wait_s=60) as pool, pytest.raises(PadExhaustedError, match=r"4 tokens \(224 bytes\)"):
        pool.take(maker, 4)


def test_a_shape_out_of_use_is_forgotten_and_zeroed(maker: Maker):
    with PadPool(8 * PAD_BYTES) as pool:
        mine = use(pool.take(maker, 3))
        wait_until(lambda: pool.n_ready == 2)
        old = [pad for pad in maker.made if pad is not mine]
        for _ in range(32):
            pool.take(maker, 1)
        assert (maker, 3) in pool._shelves
        pool.take(maker, 1)
        assert (maker, 3) not in pool._shelves
        assert all(is_zero(pad) for pad in old)
        pool.take(maker, 1)
        wait_until(lambda: pool.n_ready == 8)


def test_shapes_in_turn_are_not_forgotten(maker: Maker, stream: PadStream):
    other = Maker(stream)
    with PadPool(30 * PAD_BYTES) as pool:
        for n_tokens in [1, 2, 3] * 20:
            pool.take(maker, n_tokens)
            pool.take(other, 5)
        assert [n for _, n in pool._shelves] == [1, 2, 3, 5]


def test_a_dry_pool_that_waits_refuses(stream: PadStream):
    gate = threading.Event()
    maker = Maker(stream, lambda _: gate.wait(60) and None)
    with PadPool(2 * PAD_BYTES, wait_s=0.01) as pool:
        with pytest.raises(PadExhaustedError, match=r"no pad of 1 tokens .* within 0\.01 s"):
            pool.take(maker, 1)
        gate.set()
        wait_until(lambda: pool.n_ready == 2)
        assert use(pool.take(maker, 1)).start == 0
        assert maker.n_here == 0


def test_who_waits_gets_room(maker: Maker, stream: PadStream):
    """The others' pads are zeroed for one that somebody waits for, the most plentiful first."""
    other = Maker(stream)
    with PadPool(4 * PAD_BYTES, wait_s=60) as pool:
        use(pool.take(maker, 1))
        wait_until(lambda: pool.n_ready == 4)
        assert use(pool.take(other, 3)).r.shape[1] == 3
        assert sum(is_zero(pad) for pad in maker.made) == 3
        assert use(pool.take(maker, 2)).r.shape[1] == 2
        assert maker.n_here == other.n_here == 0


def test_two_who_wait_for_more_than_fits(maker: Maker, stream: PadStream):
    """Neither's pad is thrown away for the other's."""
    other, found = Maker(stream), []
    with PadPool(4 * PAD_BYTES, wait_s=60) as pool:
        takers = [
            threading.Thread(target=lambda each=each: found.append(use(pool.take(each, 3)))) for each in (maker, other)
        ]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
    assert len(found) == 2
    assert not any(is_zero(pad) for pad in found)


def test_a_failure_is_told_once_and_then_tried_again(stream: PadStream):
    bad = [True]

    def fail(_: int) -> None:
        if bad:
            try:
                raise ValueError("the first cause")
            except ValueError:
                raise ArithmeticError("no product")  # noqa: B904  # a context to be dropped

    maker, healthy = Maker(stream, fail), Maker(stream)
    with PadPool(6 * PAD_BYTES) as pool:
        use(pool.take(maker, 1))
        wait_until(lambda: pool._shelves[maker, 1].failure is not None)
        assert pool._held == 0
        use(pool.take(healthy, 1))
        wait_until(lambda: pool.n_ready == 6)  # the thread goes on with the others
        for _ in range(2):
            pool.drop(healthy)
        with pytest.raises(ArithmeticError, match="no product") as caught:
            pool.take(maker, 1)
        assert "fail" not in [entry.name for entry in caught.traceback]
        assert caught.value.__context__ is None
        bad.clear()
        assert use(pool.take(maker, 1)).r.any()
        wait_until(lambda: pool.n_ready == 6)


def test_a_failure_reaches_who_waits(stream: PadStream):
    def fail(_: int) -> None:
        raise ArithmeticError

    with PadPool(6 * PAD_BYTES, wait_s=60) as pool:
        for _ in range(3):
            with pytest.raises(ArithmeticError):
                pool.take(Maker(stream, fail), 1)


def test_a_dropped_source_is_zeroed_and_the_others_stay(maker: Maker, stream: PadStream):
    other = Maker(stream)
    with PadPool(4 * PAD_BYTES) as pool:
        mine = use(pool.take(maker, 1))
        pool.take(other, 1)
        wait_until(lambda: pool.n_ready == 4)
        pool.drop(maker)
        pool.drop(maker)
        assert [pad for pad in maker.made if not is_zero(pad)] == [mine]
        wait_until(lambda: pool.n_ready == 4)
        assert {each for each, _ in pool._shelves} == {other}


@pytest.mark.parametrize("end", ["drop", "close"])
def test_what_is_in_the_making_at_the_end_is_zeroed(stream: PadStream, end: str):
    gate, begun = threading.Event(), threading.Event()
    maker = Maker(stream, lambda _: begun.set() or (gate.wait(60) and None))
    pool = PadPool(4 * PAD_BYTES)
    pool.take(maker, 1)
    assert begun.wait(60)
    ender = threading.Thread(target=pool.close if end == "close" else lambda: pool.drop(maker))
    ender.start()
    if end == "drop":
        ender.join()
    else:
        wait_until(lambda: pool._is_closed)
    gate.set()
    ender.join()
    wait_until(lambda: pool._held == 0)
    assert [is_zero(pad) for pad in maker.made] == [False, True]
    pool.close()
    assert not pool._thread.is_alive()


@pytest.mark.parametrize("end", ["drop", "close"])
def test_the_end_wakes_whoever_waits(stream: PadStream, end: str):
    gate, errors = threading.Event(), []
    maker = Maker(stream, lambda _: gate.wait(60) and None)
    pool = PadPool(4 * PAD_BYTES, wait_s=60)

    def wait() -> None:
        try:
            pool.take(maker, 1)
        except PadError as error:
            errors.append(str(error))

    taker = threading.Thread(target=wait)
    taker.start()
    wait_until(lambda: any(shelf.n_waiting for shelf in pool._shelves.values()))
    ender = threading.Thread(target=pool.close if end == "close" else lambda: pool.drop(maker))
    ender.start()
    taker.join(30)
    gate.set()
    ender.join()
    pool.close()
    assert errors == ["the pool of pads is closed" if end == "close" else "the source of these pads is closed"]


def test_closing_zeroes_what_lies_ready(maker: Maker):
    pool = PadPool(3 * PAD_BYTES)
    mine = use(pool.take(maker, 1))
    wait_until(lambda: pool.n_ready == 3)
    pool.close()
    pool.close()
    assert len(maker.made) == 4
    assert [pad for pad in maker.made if not is_zero(pad)] == [mine]
    assert not pool._thread.is_alive()
    assert (pool.n_ready, pool._held) == (0, 0)
    with pytest.raises(PadError, match="closed"):
        pool.take(maker, 1)


def test_concurrent_takers_never_share_a_pad(stream: PadStream):
    maker, starts, pads = Maker(stream), [], []
    with PadPool(12 * PAD_BYTES) as pool:

        def work(n_tokens: int) -> None:
            for _ in range(50):
                ticket = pool.take(maker, n_tokens)
                pad = use(ticket)
                starts.append(ticket.start)
                pads.append(pad.r.tobytes())
                assert not is_zero(pad)

        threads = [threading.Thread(target=work, args=(4 + i % 2,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(starts) == len(set(starts)) == len(set(pads)) == 300


def test_repr_of_a_pad_says_no_value():
    pad = Pad(3, np.full((2, 4, 5), 77, np.uint8), np.full((4, 6), 77, np.uint32), np.zeros(4, np.uint64))
    assert repr(pad) == "Pad(start=3, shape=(4, 5))"
    assert pad.n_bytes == 40 + 96 + 32
