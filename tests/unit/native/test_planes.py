"""Planes of pads and elements of accumulators equal the oracle on every level."""

from __future__ import annotations

import itertools

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
_INT32 = st.sampled_from([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]) | st.integers(-(2**31), 2**31 - 1)


def encode(r: np.ndarray, ring: int) -> np.ndarray:
    planes = np.full(r.shape, 77, np.int8)
    _native.encode_pad(r, ring, planes)
    return planes


def combine(acc: np.ndarray, ring: int) -> np.ndarray:
    out = np.full(acc.shape[1], 77, np.uint32)
    _native.combine(acc, ring, out)
    return out


@_SETTINGS
@given(ring=st.sampled_from(data.RINGS), n=data.WIDTHS, seed=data.SEEDS)
def test_planes_of_pads(ring: int, n: int, seed: int) -> None:
    r = data.pads(seed, (n,), ring)
    elements = [slow.element(list(pad), slow.NAMES[ring]) for pad in r.T.tolist()]
    planes = encode(r, ring)
    assert planes.T.tolist() == [slow_ring.encode(x, slow.NAMES[ring]) for x in elements]
    assert combine(planes.astype(np.int32), ring).tolist() == elements


def test_every_carry() -> None:
    edges = [0, 1, 126, 127, 128, 129, 254, 255]
    r = np.array(list(itertools.product(edges, repeat=3)), np.uint8).T.copy()
    assert encode(r, 1).T.tolist() == [
        slow_ring.encode(slow.element(list(pad), "fast"), "fast") for pad in r.T.tolist()
    ]


def test_every_residue() -> None:
    r = np.stack([np.arange(256) % m for m in data.MODULI[0]]).astype(np.uint8)
    expected = [[slow_ring.balanced(int(x), m) for x in row] for row, m in zip(r, data.MODULI[0], strict=True)]
    assert encode(r, 0).tolist() == expected


@_SETTINGS
@given(ring=st.sampled_from(data.RINGS), n=data.WIDTHS, seed=data.SEEDS, own=st.tuples(_INT32, _INT32, _INT32, _INT32))
def test_any_accumulators(ring: int, n: int, seed: int, own: tuple[int, ...]) -> None:
    acc = data.integers(seed, (len(data.MODULI[ring]), n), np.int32)
    acc[:, n // 2] = own[: len(acc)]
    expected = [slow_ring.decode(list(column), slow.NAMES[ring]) for column in acc.T.tolist()]
    assert combine(acc, ring).tolist() == expected


@_RINGS
def test_extreme_accumulators(ring: int) -> None:
    edges = [-(2**31), -(2**31) + 1, -65536, -1, 0, 255, 65535, 2**31 - 1]
    acc = np.array(list(itertools.product(edges, repeat=len(data.MODULI[ring]))), np.int32).T.copy()
    expected = [slow_ring.decode(list(column), slow.NAMES[ring]) for column in acc.T.tolist()]
    assert combine(acc, ring).tolist() == expected


def test_elements_beside_0_and_beside_half_of_the_ring() -> None:
    """Where the number of times that m is in the sum changes, and where the rest changes its sign."""
    m = slow_ring.MODULUS["faithful"]
    elements = [(centre + d) % m for centre in (0, m // 2, m // 4, 3 * m // 4) for d in range(-300, 300)]
    planes = np.array([slow_ring.encode(x, "faithful") for x in elements], np.int32).T.copy()
    assert combine(planes, 0).tolist() == elements


def test_nothing_at_all() -> None:
    for ring in data.RINGS:
        n_planes = len(data.MODULI[ring])
        assert encode(np.zeros((n_planes, 0), np.uint8), ring).shape == (n_planes, 0)
        assert combine(np.zeros((n_planes, 0), np.int32), ring).shape == (0,)
