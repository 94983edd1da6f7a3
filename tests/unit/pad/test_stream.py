"""Streams and their keys: ranges, buffers, spending, rotation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

import cloister.pad
from cloister.errors import PadError, PadExhaustedError, PadReuseError
from cloister.pad import (
    BLOCK_POSITIONS,
    MAX_PAD_POSITIONS,
    MAX_POSITIONS,
    Direction,
    PadKeys,
    PadRange,
    PadStream,
    expand_ranges,
)
from cloister.pad import _expand as expand_module

FAITHFUL = (256, 255, 253, 251)
FAST = (256, 256, 256)


@pytest.mark.parametrize("moduli", [FAITHFUL, FAST, (129,), (129,) * 16])
def test_a_pad_has_the_tensors_shape_and_stays_below_the_moduli(stream: PadStream, moduli: tuple[int, ...]):
    ticket = stream.draw((3, 5, 700), moduli)
    r = ticket.use((3, 5, 700))
    assert (r.shape, r.dtype) == ((len(moduli), 3, 5, 700), np.uint8)
    assert all(int(plane.max()) < modulus for plane, modulus in zip(r, moduli, strict=True))
    assert (ticket.start, stream.ledger.n_taken) == (0, 10_500)


def test_a_scalar_is_a_tensor_too(stream: PadStream):
    assert stream.draw((), FAST).use(()).shape == (3,)


def test_planes_of_one_modulus_are_not_the_same(stream: PadStream):
    a, b, c = stream.draw((1000,), FAST).use((1000,))
    assert not (np.array_equal(a, b) or np.array_equal(a, c) or np.array_equal(b, c))


@pytest.mark.parametrize("moduli", [(), (128,), (257,), (256,) * 17, (256, 0)])
def test_other_moduli_are_refused(stream: PadStream, moduli: tuple[int, ...]):
    with pytest.raises(PadError, match="moduli"):
        stream.draw((4,), moduli)
    assert stream.ledger.n_taken == 0
    stream.take(4)
    with pytest.raises(PadError, match="moduli"):
        stream.expand(0, 4, moduli)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (-2, -3), (-1,)])
def test_other_shapes_are_refused(stream: PadStream, shape: tuple[int, ...]):
    with pytest.raises(PadError, match="at least one"):
        stream.draw(shape, FAST)
    assert stream.ledger.n_taken == 0


def test_a_pad_has_a_largest_size(stream: PadStream):
    with pytest.raises(PadError, match="at most"):
        stream.draw((MAX_PAD_POSITIONS, 2), FAST)
    assert stream.ledger.n_taken == 0


def test_an_exhausted_key(stream: PadStream):
    stream.ledger.take(MAX_POSITIONS - 4)
    stream.draw((4,), FAST).use((4,))
    with pytest.raises(PadExhaustedError):
        stream.draw((1,), FAST)


@pytest.mark.parametrize("position, n", [(0, 0), (0, -1), (-1, 2), (0, 11), (10, 1)])
def test_only_taken_positions_expand(stream: PadStream, position: int, n: int):
    stream.take(10)
    with pytest.raises(PadError, match="were taken"):
        stream.expand(position, n, FAST)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((3, 4), np.int8),
        np.empty((2, 4), np.uint8),
        np.empty((3, 8), np.uint8)[:, ::2],
        np.empty((3, 2, 2), np.uint8),
    ],
    ids=["dtype", "planes", "strided", "dimensions"],
)
def test_other_buffers_are_refused(stream: PadStream, out: np.ndarray):
    stream.take(10)
    with pytest.raises(PadError, match="buffer"):
        stream.expand_into(0, FAST, out)


def test_the_callers_buffer_is_written_and_nothing_beside_it(stream: PadStream):
    n = BLOCK_POSITIONS + 3000
    stream.take(n + 100)
    for first in (0, 100):
        whole = np.full((4, n + 20), 7, np.uint8)
        stream.expand_into(first, FAITHFUL, whole[:, 10:-10])
        assert np.array_equal(whole[:, 10:-10], stream.expand(first, n, FAITHFUL))
        assert (whole[:, :10] == 7).all()
        assert (whole[:, -10:] == 7).all()


def test_a_key_stream_that_is_not_random_is_refused(stream: PadStream, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expand_module._KeyStream, "fill", lambda *arguments: arguments[-1].fill(255))
    with pytest.raises(PadError, match="not random"):
        stream.draw((5,), (251,)).use((5,))


def test_spent_positions_do_not_expand(stream: PadStream):
    n = 2 * BLOCK_POSITIONS
    stream.take(n)
    stream.spend(0, 10)
    stream.spend(10, n - 11)
    assert list(stream._blocks) == [1]
    with pytest.raises(PadReuseError, match="after they were spent"):
        stream.expand(BLOCK_POSITIONS - 1, 2, FAST)
    stream.expand(BLOCK_POSITIONS, 2, FAST)
    block = stream._blocks[1]
    key = block.key
    assert any(key)
    stream.spend(n - 1, 1)
    assert not any(key)
    assert stream._blocks == {}


@pytest.mark.parametrize("position, n", [(0, 1), (BLOCK_POSITIONS, BLOCK_POSITIONS)], ids=["whole block", "too many"])
def test_positions_are_spent_once(stream: PadStream, position: int, n: int):
    stream.take(2 * BLOCK_POSITIONS)
    stream.spend(0, BLOCK_POSITIONS + 1)
    with pytest.raises(PadReuseError, match="spent a second time"):
        stream.spend(position, n)


def test_drawn_pads_leave_no_block_key(stream: PadStream):
    tickets = [stream.draw((n,), FAST) for n in (BLOCK_POSITIONS - 1, 3, BLOCK_POSITIONS - 2)]
    for ticket in tickets:
        ticket.use(ticket.shape)
    assert stream.ledger.n_taken == 2 * BLOCK_POSITIONS
    assert stream._blocks == {}


def test_retiring_zeroes_every_key(stream: PadStream):
    ticket = stream.draw((4,), FAST)
    stream.expand(0, 4, FAST)
    buffers = [stream._key, stream._blocks[0].key]
    assert all(any(buffer) for buffer in buffers)
    stream.retire()
    stream.retire()
    assert not any(any(buffer) for buffer in buffers)
    for use in (lambda: ticket.use((4,)), lambda: stream.draw((4,), FAST), lambda: stream.expand(0, 4, FAST)):
        with pytest.raises(PadExhaustedError, match="retired"):
            use()
    stream.spend(0, 4)  # as a thread does that had expanded them just before


def test_a_shared_pad_comes_with_what_makes_it_again(stream: PadStream):
    for shape in ((3, 5), (BLOCK_POSITIONS,), (2, BLOCK_POSITIONS - 1), (7,)):
        ticket = stream.draw_shared(shape, FAITHFUL)
        r, ranges = ticket.use(shape)
        assert r.shape == (4, *shape)
        again = jaxtyped(expand_ranges, typechecker=beartype)(ranges, r[0].size, FAITHFUL)
        assert np.array_equal(again.reshape(r.shape), r)
        at = ticket.start
        for part in ranges:
            assert part.first == at % BLOCK_POSITIONS
            at += part.n
            assert at == ticket.start + r[0].size or at % BLOCK_POSITIONS == 0
    assert list(stream._blocks) == [3]


def test_a_stream_shares_all_of_its_pads_or_none(keys: PadKeys):
    """The key of a block would tell the second party the pads that were not for it."""
    shared, own = keys.stream("a", Direction.FORWARD), keys.stream("b", Direction.FORWARD)
    shared.draw_shared((4,), FAST)
    own.draw((4,), FAST)
    attempts = (
        lambda: shared.draw((4,), FAST),
        lambda: shared.take(4),
        lambda: own.draw_shared((4,), FAST),
    )
    for attempt in attempts:
        with pytest.raises(PadError, match="all of its pads, or none"):
            attempt()
    assert (shared.ledger.n_taken, own.ledger.n_taken) == (4, 4)


def test_what_is_refused_takes_nothing_and_decides_nothing(stream: PadStream):
    for shape, moduli in (((0,), FAST), ((4,), (2,)), ((MAX_PAD_POSITIONS, 2), FAST), ((MAX_POSITIONS,), FAST)):
        with pytest.raises(PadError):
            stream.draw_shared(shape, moduli)
    assert stream.draw((4,), FAST).start == 0


@pytest.mark.parametrize(
    "ranges, match",
    [
        ([], "size"),
        ([PadRange(bytes(32), 0, 9)], "size"),
        ([PadRange(bytes(32), 0, 5), PadRange(bytes(32), 5, 6)], "size"),
        ([PadRange(bytes(31), 0, 10)], "block"),
        ([PadRange(bytes(33), 0, 10)], "block"),
        ([PadRange(bytes(32), -1, 10)], "block"),
        ([PadRange(bytes(32), 0, 10), PadRange(bytes(32), 0, 0)], "block"),
        ([PadRange(bytes(32), 0, 11), PadRange(bytes(32), 0, -1)], "block"),
        ([PadRange(bytes(32), BLOCK_POSITIONS - 9, 10)], "block"),
    ],
    ids=["none", "short", "long", "key-31", "key-33", "before", "empty", "negative", "beyond"],
)
def test_ranges_that_make_no_pad(ranges: list[PadRange], match: str):
    with pytest.raises(PadError, match=match):
        expand_ranges(ranges, 10, FAST)


def test_ranges_have_moduli_too():
    with pytest.raises(PadError, match="moduli"):
        expand_ranges([PadRange(bytes(32), 0, 10)], 10, ())


def test_one_stream_for_a_layer_and_direction(keys: PadKeys):
    streams = {(name, way): keys.stream(name, way) for name in ("a", "b") for way in Direction}
    assert len({id(stream) for stream in streams.values()}) == 4
    assert all(keys.stream(*name) is stream for name, stream in streams.items())
    assert repr(keys) == "PadKeys(n_jobs=1, n_streams=4)"


def test_a_new_job_has_new_streams(keys: PadKeys):
    old = keys.stream("a", Direction.FORWARD)
    old.draw((4,), FAST).use((4,))
    before = bytes(keys._key)
    keys.new_job()
    assert bytes(keys._key) != before
    new = keys.stream("a", Direction.FORWARD)
    assert (new.ledger.n_taken, old.ledger.is_retired, new.ledger.is_retired) == (0, True, False)
    with pytest.raises(PadExhaustedError):
        old.draw((4,), FAST)


def test_closed_keys(keys: PadKeys):
    stream = keys.stream("a", Direction.BACKWARD)
    keys.close()
    keys.close()
    assert stream.ledger.is_retired
    with pytest.raises(PadExhaustedError, match="closed"):
        keys.stream("a", Direction.BACKWARD)


def test_shapes_are_those_of_the_signatures(stream: PadStream):
    stream.take(8)
    out = jaxtyped(stream.expand, typechecker=beartype)(0, 8, FAST)
    jaxtyped(stream.expand_into, typechecker=beartype)(0, FAST, out)
    with pytest.raises(TypeCheckError):
        jaxtyped(stream.expand_into, typechecker=beartype)(0, FAST, out[0])


def test_public_names_exist_once_and_in_order():
    names = cloister.pad.__all__
    kinds = [(not name.isupper(), name[0].islower(), name) for name in names]
    assert kinds == sorted(kinds)
    assert all(hasattr(cloister.pad, name) for name in names)


def test_pad_does_not_import_torch():
    code = "import sys, cloister.pad; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
