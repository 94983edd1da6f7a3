"""Masking equals the oracle to the last bit on every level, and writes nothing where a value is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import slow_kernels as slow
from tests.oracle import slow_ring
from tests.unit.native import data

from cloister.kernels import _native

pytestmark = pytest.mark.usefixtures("level")
_SETTINGS = settings(deadline=None, derandomize=True, max_examples=80)
_RINGS = pytest.mark.parametrize("ring", data.RINGS, ids=slow.NAMES)
_MOST = 2.0**31 - 1


def mask(x: np.ndarray, fold: np.ndarray | None, room: float, r: np.ndarray, ring: int, v: np.ndarray):
    """What the kernel says, and its three results; they hold something else before."""
    tokens = len(x)
    planes = np.full(r.shape, 77, np.int8)
    scales, sums = np.full(tokens, 7.0), np.full(tokens, 7, np.uint64)
    return _native.mask(x, fold, room, r, ring, v, planes, scales, sums), planes, scales, sums


def check(x: np.ndarray, fold: np.ndarray | None, room: float, r: np.ndarray, ring: int, v: np.ndarray) -> None:
    found, planes, scales, sums = mask(x, fold, room, r, ring, v)
    expected = slow.mask(
        x.tolist(), None if fold is None else fold.tolist(), room, r.tolist(), ring, v.tolist()
    )  # fmt: skip
    if expected is None:
        assert not found
        assert not planes.any() and not scales.any() and not sums.any()
    else:
        assert found
        assert planes.tolist() == expected[0]
        assert data.bits(scales) == data.bits(np.array(expected[1]))
        assert sums.tolist() == expected[2]


@_SETTINGS
@given(
    ring=st.sampled_from(data.RINGS), tokens=data.TOKENS, features=data.WIDTHS, seed=data.SEEDS,
    scale=st.sampled_from([1.0, 1e-30, 1e30, 3e38, 1e-44]),
    fold=st.none() | st.sampled_from([1.0, 1e-20, 1e10]),
    room=st.sampled_from([1.0, 10.5, 3e4, 8388607.0, 1e9, _MOST]),
    outliers=st.lists(st.tuples(st.integers(0, 999), st.sampled_from(
        [0.0, -0.0, 3.4028234663852886e38, -1e38, 1.0, 1e-45, -1e-40, math.inf, -math.inf, math.nan])), max_size=4),
)  # fmt: skip
def test_planes_scales_and_sums(
    ring: int, tokens: int, features: int, seed: int, scale: float, fold: float | None, room: float,
    outliers: list[tuple[int, float]],
) -> None:  # fmt: skip
    x = data.floats(seed, (tokens, features), scale)
    for place, value in outliers:
        x.flat[place % x.size] = value
    factors = None if fold is None else data.floats(seed + 1, (features,), fold)
    r, v = data.pads(seed, (tokens, features), ring), data.integers(seed, (features,), np.uint64)
    check(x, factors, room, r, ring, v)


@_RINGS
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["plus", "minus"])
def test_the_largest_integers(ring: int, sign: float) -> None:
    """One feature, so that it is the norm: x_q is room itself, with the smallest and the largest pad."""
    for room in (_MOST, _MOST - 0.5, 2.0**30, 8388608.0, 1.0):
        for pad in ([0] * 4, [m - 1 for m in data.MODULI[ring]], [128] * 4, [1, 1, 1, 1]):
            r = np.array(pad[: len(data.MODULI[ring])], np.uint8).reshape(-1, 1, 1)
            v = np.array([2**64 - 1], np.uint64)
            check(np.array([[sign * 3e38]], np.float32), None, room, r, ring, v)
            assert mask(np.array([[sign]], np.float32), None, room, r, ring, v)[3].tolist() == [
                -round(sign * room) % 2**64
            ]


@_RINGS
def test_integers_and_halves_as_they_are(ring: int) -> None:
    """With the norm as room the scale is 1, so that x_q is known: around every multiple of a modulus, and ties."""
    for start in (-(2**23), -70_000, -600, 2**23 - 1400, 65536 - 700):
        x = (np.arange(1400, dtype=np.float32) / 2 + start).reshape(1, -1).astype(np.float32)
        r = data.pads(start % 1000, x.shape, ring)
        room = slow.norm(x[0].tolist())
        v = np.ones(x.shape[1], np.uint64)
        check(x, None, room, r, ring, v)
        _, planes, scales, _ = mask(x, None, room, r, ring, v)
        assert scales.tolist() == [1.0]
        for i in (0, 1, 2, 3, 777, 1399):
            whole = round(float(x[0, i])) + slow.element(r[:, 0, i].tolist(), slow.NAMES[ring])
            assert planes[:, 0, i].tolist() == slow_ring.encode(whole, slow.NAMES[ring])


@_RINGS
def test_every_residue_meets_every_pad(ring: int) -> None:
    """All 256 x 256 of lowest byte and pad byte; the scale is 1."""
    x = np.repeat(np.arange(-128, 128, dtype=np.float32), 256).reshape(1, -1)
    r = np.stack([np.tile(np.arange(256) % m, 256).astype(np.uint8) for m in data.MODULI[ring]])[:, None, :].copy()
    check(x, None, slow.norm(x[0].tolist()), r, ring, np.ones(x.shape[1], np.uint64))


@_RINGS
@pytest.mark.parametrize("features", [1, 9, 300])
def test_rows_of_zeros_are_their_pads(ring: int, features: int) -> None:
    x = np.zeros((3, features), np.float32)
    x[1] = 1e-45  # the smallest there is
    x[2] = -0.0
    r, v = data.pads(1, x.shape, ring), data.integers(1, (features,), np.uint64)
    found, planes, scales, sums = mask(x, None, 100.0, r, ring, v)
    assert found and scales[[0, 2]].tolist() == [0.0, 0.0] and sums[[0, 2]].tolist() == [0, 0]
    pads = np.empty((len(r), 3 * features), np.int8)
    _native.encode_pad(r.reshape(len(r), -1), ring, pads)
    assert np.array_equal(planes[:, [0, 2]], pads.reshape(r.shape)[:, [0, 2]])
    check(x, None, 100.0, r, ring, v)


@_RINGS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [(0, 0), (0, 299), (3, 0), (2, 150), (3, 299)])
def test_nothing_is_written_of_a_batch_that_is_not_finite(ring: int, bad: float, at: tuple[int, int]) -> None:
    x = data.floats(3, (4, 300))
    x[at] = bad
    r, v = data.pads(3, x.shape, ring), data.integers(3, (300,), np.uint64)
    check(x, None, 1e4, r, ring, v)
    check(data.floats(3, (4, 300)), np.where(np.arange(300) == at[1], bad, 1).astype(np.float32), 1e4, r, ring, v)


@_RINGS
def test_a_product_that_overflows_is_not_finite(ring: int) -> None:
    x, fold = np.full((2, 17), 1e30, np.float32), np.full(17, 1e30, np.float32)
    check(x, fold, 1e4, data.pads(4, x.shape, ring), ring, np.ones(17, np.uint64))
    assert not mask(x, fold, 1e4, data.pads(4, x.shape, ring), ring, np.ones(17, np.uint64))[0]


@_RINGS
def test_no_tokens_and_no_features(ring: int) -> None:
    for shape in ((0, 5), (2, 0), (0, 0)):
        r = data.pads(5, shape, ring)
        found, _, scales, sums = mask(np.zeros(shape, np.float32), None, 10.0, r, ring, np.ones(shape[1], np.uint64))
        assert found and scales.tolist() == [0.0] * shape[0] and sums.tolist() == [0] * shape[0]
