"""The keys of the check against Python's integers, and their end."""

from __future__ import annotations

import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from tests.oracle import slow_pad

from cloister.errors import PadError
from cloister.pad import CheckKeys, Direction
from cloister.ring import FAITHFUL, FAST, RingFormat

WAYS = pytest.mark.parametrize("direction", list(Direction))


@WAYS
@pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (513, 2), (2, 513)], ids=str)
def test_v_is_the_product_with_python_integers(make_weight, fmt: RingFormat, shape, direction: Direction):
    weight = make_weight(fmt, *shape)
    keys = CheckKeys.generate(weight, direction)
    w_q = (weight.w_q if direction is Direction.FORWARD else weight.w_q.T).tolist()
    assert (keys.rho.dtype, keys.v.dtype) == (np.uint64, np.uint64)
    assert (keys.n_out, keys.n_in) == (len(w_q), len(w_q[0]))
    assert keys.v.tolist() == slow_pad.check_words(w_q, keys.rho.tolist())
    assert keys.rho.flags.c_contiguous and keys.v.flags.c_contiguous


@WAYS
def test_integers_of_the_largest_size(make_weight, direction: Direction, monkeypatch: pytest.MonkeyPatch):
    """Every word 2^64 - 1 and every integer the least or the largest of int16: nothing but the wrap-around counts."""
    weight = make_weight(FAITHFUL, 300, 3)
    weight.w_q.fill_(-32768)
    weight.w_q[::2] = 32767
    monkeypatch.setattr("cloister.pad._check.os.urandom", lambda n: b"\xff" * n)
    keys = CheckKeys.generate(weight, direction)
    w_q = (weight.w_q if direction is Direction.FORWARD else weight.w_q.T).tolist()
    assert set(keys.rho.tolist()) == {2**64 - 1}
    assert keys.v.tolist() == slow_pad.check_words(w_q, keys.rho.tolist())


def test_the_words_are_the_systems_and_other_ones_each_time(make_weight, monkeypatch: pytest.MonkeyPatch):
    weight = make_weight(FAST, 4, 5)
    found = {CheckKeys.generate(weight, way).rho.tobytes() for way in Direction for _ in range(5)}
    assert len(found) == 10
    drawn: list[int] = []
    monkeypatch.setattr("cloister.pad._check.os.urandom", lambda n: drawn.append(n) or bytes(range(n)))
    assert CheckKeys.generate(weight, Direction.FORWARD).rho.tobytes() == bytes(range(32))
    assert drawn == [32]


def test_wiped_words_are_zero_and_cannot_be_had(make_weight):
    """Zero words would accept every answer."""
    keys = CheckKeys.generate(make_weight(FAST, 4, 5), Direction.FORWARD)
    rho, v = keys.rho, keys.v
    assert rho.any() and v.any()
    keys.wipe()
    keys.wipe()
    assert not rho.any() and not v.any()
    for attempt in (lambda: keys.rho, lambda: keys.v):
        with pytest.raises(PadError, match="gone"):
            attempt()
    assert repr(keys) == "CheckKeys(n_out=4, n_in=5)"


def test_shapes_are_those_of_the_signatures():
    make = jaxtyped(CheckKeys, typechecker=beartype)
    make(np.zeros(3, np.uint64), np.zeros(2, np.uint64))
    with pytest.raises(TypeCheckError):
        jaxtyped(CheckKeys.__init__, typechecker=beartype)(
            CheckKeys.__new__(CheckKeys), np.zeros(3, np.int64), np.zeros(2, np.uint64)
        )
