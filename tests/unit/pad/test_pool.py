"""The pool: what it gives, how much it holds, and every way in which it stops."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from cloister.errors import PadError, PadExhaustedError
from cloister.pad import Direction, Pad, PadKeys, PadPool, PadStream

MODULI = (256, 251)
SHAPE = (4, 8)
R_BYTES = 2 * 32
U_BYTES = 32 * 8


def term(r: np.ndarray) -> tuple[np.ndarray, ...]:
    return (r.astype(np.int64).sum(0) * 3,)


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_pad_comes_with_its_unmasking_term(stream: PadStream):
    with PadPool(stream, MODULI, term, shapes=[SHAPE], capacity_bytes=1000) as pool:
        for _ in range(8):
            ticket = pool.take(SHAPE, timeout_s=60, compute_when_dry=False)
            pad = ticket.use(SHAPE)
            assert pad.r.shape == (2, *SHAPE)
            assert np.array_equal(pad.u[0], term(pad.r)[0])
            assert (ticket.start, pad.start) == (pad.start, ticket.start)
            assert ticket.start % 32 == 0
            pad.wipe()
            pad.wipe()
            assert not pad.r.any()
            assert not pad.u[0].any()


def test_the_pool_fills_up_to_its_capacity(stream: PadStream):
    other = (2, 8)
    with PadPool(stream, MODULI, term, shapes=[SHAPE, other], capacity_bytes=2 * 1000) as pool:
        wait_until(lambda: pool.n_ready == 1000 // (R_BYTES + U_BYTES) + 1000 // ((R_BYTES + U_BYTES) // 2))
        time.sleep(0.02)
        assert pool.n_ready == 3 + 6
        assert repr(pool) == "PadPool(n_ready=9)"
        pool.take(other, timeout_s=60, compute_when_dry=False)
        wait_until(lambda: pool.n_ready == 9)


def test_a_shape_that_nobody_makes(stream: PadStream):
    with PadPool(stream, MODULI, term, shapes=[SHAPE], capacity_bytes=1000) as pool:
        begin = time.monotonic()
        with pytest.raises(PadExhaustedError, match="was ready"):
            pool.take((3,), timeout_s=200, compute_when_dry=False)
        ticket = pool.take((3,), timeout_s=200, compute_when_dry=True)
        assert time.monotonic() - begin < 100
        assert ticket.use((3,)).r.shape == (2, 3)


def test_a_dry_pool_refuses_or_computes(stream: PadStream):
    gate, main = threading.Event(), threading.current_thread()

    def slow(r: np.ndarray) -> tuple[np.ndarray, ...]:
        if threading.current_thread() is not main:
            gate.wait(60)
        return term(r)

    with PadPool(stream, MODULI, slow, shapes=[SHAPE], capacity_bytes=1000) as pool:
        with pytest.raises(PadExhaustedError, match=r"within 0\.01 s"):
            pool.take(SHAPE, timeout_s=0.01, compute_when_dry=False)
        pad = pool.take(SHAPE, timeout_s=0.01, compute_when_dry=True).use(SHAPE)
        assert np.array_equal(pad.u[0], term(pad.r)[0])
        gate.set()
        assert pool.take(SHAPE, timeout_s=60, compute_when_dry=False).start != pad.start


def test_a_failure_of_the_term_reaches_every_taker(stream: PadStream):
    seen: list[np.ndarray] = []

    def fail(r: np.ndarray) -> tuple[np.ndarray, ...]:
        seen.append(r)
        try:
            raise ValueError("the first cause")
        except ValueError:
            raise ArithmeticError("no product")  # noqa: B904  # a context to be dropped

    with PadPool(stream, MODULI, fail, shapes=[SHAPE], capacity_bytes=1000) as pool:
        for compute in (False, True):
            with pytest.raises(ArithmeticError, match="no product") as caught:
                pool.take(SHAPE, timeout_s=60, compute_when_dry=compute)
        assert "fail" not in [entry.name for entry in caught.traceback]
        assert caught.value.__context__ is None
    assert len(seen) == 1
    assert not seen[0].any()


def test_a_term_that_cannot_be_zeroed_is_refused(stream: PadStream):
    def read_only(r: np.ndarray) -> tuple[np.ndarray, ...]:
        u = r.copy()
        u.flags.writeable = False
        return (u,)

    pool = PadPool(stream, MODULI, read_only, shapes=[SHAPE], capacity_bytes=1000)
    with pool, pytest.raises(PadError, match="zeroed"):
        pool.take(SHAPE, timeout_s=60, compute_when_dry=False)


def test_a_pad_that_does_not_fit_its_share(stream: PadStream):
    made: list[np.ndarray] = []

    def keep(r: np.ndarray) -> tuple[np.ndarray, ...]:
        made.append(r)
        return (np.ones(10),)

    pool = PadPool(stream, MODULI, keep, shapes=[SHAPE], capacity_bytes=R_BYTES + 79)
    with pool, pytest.raises(PadExhaustedError, match="takes 144 bytes, its share of the pool is 143"):
        pool.take(SHAPE, timeout_s=60, compute_when_dry=False)
    assert not made[0].any()


def test_a_retired_key_stops_the_pool(keys: PadKeys):
    stream = keys.stream("a", Direction.FORWARD)
    with PadPool(stream, MODULI, term, shapes=[SHAPE], capacity_bytes=1000) as pool:
        wait_until(lambda: pool.n_ready == 3)
        keys.new_job()
        for compute in (False, True):
            with pytest.raises(PadExhaustedError, match="retired"):
                pool.take(SHAPE, timeout_s=60, compute_when_dry=compute)


def test_closing_zeroes_what_lies_ready(stream: PadStream):
    made: list[np.ndarray] = []

    def keep(r: np.ndarray) -> tuple[np.ndarray, ...]:
        u = term(r)
        made.extend((r, *u))
        return u

    pool = PadPool(stream, MODULI, keep, shapes=[SHAPE], capacity_bytes=1000)
    wait_until(lambda: pool.n_ready == 3)
    assert all(array.any() for array in made)
    pool.close()
    pool.close()
    assert len(made) == 6
    assert not any(array.any() for array in made)
    assert not pool._thread.is_alive()
    with pytest.raises(PadError, match="closed"):
        pool.take(SHAPE, timeout_s=60, compute_when_dry=True)


def test_closing_wakes_whoever_waits(stream: PadStream):
    gate, errors = threading.Event(), []

    def slow(r: np.ndarray) -> tuple[np.ndarray, ...]:
        gate.wait(60)
        return term(r)

    pool = PadPool(stream, MODULI, slow, shapes=[SHAPE], capacity_bytes=1000)

    def wait() -> None:
        try:
            pool.take(SHAPE, timeout_s=60, compute_when_dry=False)
        except PadError as error:
            errors.append(error)

    taker = threading.Thread(target=wait)
    taker.start()
    closer = threading.Thread(target=pool.close)
    closer.start()
    taker.join(60)
    gate.set()
    closer.join(60)
    assert [type(error) for error in errors] == [PadError]


def test_concurrent_takers_never_share_a_pad(stream: PadStream):
    starts: list[int] = []
    pads: list[bytes] = []
    with PadPool(stream, MODULI, term, shapes=[SHAPE], capacity_bytes=700) as pool:

        def work() -> None:
            for i in range(50):
                ticket = pool.take(SHAPE, timeout_s=0 if i % 2 else 60, compute_when_dry=True)
                pad = ticket.use(SHAPE)
                starts.append(ticket.start)
                pads.append(pad.r.tobytes())

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(starts) == len(set(starts)) == len(set(pads)) == 300
    assert all(start % 32 == 0 for start in starts)


def test_a_pool_needs_shapes(stream: PadStream):
    with pytest.raises(PadError, match="shapes"):
        PadPool(stream, MODULI, term, shapes=[], capacity_bytes=1000)
    with pytest.raises(PadError, match="moduli"):
        PadPool(stream, (2,), term, shapes=[SHAPE], capacity_bytes=1000)


def test_repr_of_a_pad_says_no_value():
    pad = Pad(3, np.full((2, 5), 77, np.uint8), (np.full(5, 77),))
    assert repr(pad) == "Pad(start=3, shape=(5,))"
    assert pad.n_bytes == 50
