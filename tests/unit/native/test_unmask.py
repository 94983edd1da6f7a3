"""Unmasking equals the oracle to the last bit on every level, for any answer, and gives nothing of a wrong one."""

from __future__ import annotations

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


def listed(array: np.ndarray | None) -> list | None:
    return None if array is None else array.tolist()


def check(
    answer: np.ndarray, u: np.ndarray, ring: int, scales: np.ndarray, channel: np.ndarray | None,
    bias: np.ndarray | None, rho: np.ndarray,
) -> None:  # fmt: skip
    y_q, expected = slow.unmask(answer.tolist(), u.tolist(), ring, scales.tolist(), listed(channel), listed(bias))
    sums = np.array(slow.checksums(y_q, rho.tolist()), np.uint64)
    y = np.full(answer.shape, 77, np.float32)
    assert _native.unmask(answer, u, ring, scales, channel, bias, rho, sums, y)
    assert data.bits(y) == data.bits(np.array(expected, np.float32).reshape(y.shape))


@_SETTINGS
@given(
    ring=st.sampled_from(data.RINGS), tokens=data.TOKENS, out=data.WIDTHS, seed=data.SEEDS,
    scale=st.sampled_from([1.0, 1e-20, 1e25, 1e35, 1e-44]), with_channel=st.booleans(), with_bias=st.booleans(),
    edges=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 2**32 - 1) | st.sampled_from(
        [0, 1, 2**23 - 1, 2**23, 2**24 - 1, 2072737919, 2072737920, 2072737921, 4145475839, 4145475840])), max_size=6),
)  # fmt: skip
def test_any_answer(
    ring: int, tokens: int, out: int, seed: int, scale: float, with_channel: bool, with_bias: bool,
    edges: list[tuple[int, int]],
) -> None:  # fmt: skip
    answer = data.integers(seed, (tokens, out), np.uint32)
    for place, value in edges:
        answer.flat[place % answer.size] = value
    u = data.integers(seed + 1, (tokens, out), np.uint32)
    scales = np.abs(data.floats(seed, (tokens,), scale)).astype(np.float64)
    channel = data.floats(seed + 2, (out,), 0.01) if with_channel else None
    bias = data.floats(seed + 3, (out,), 10.0) if with_bias else None
    check(answer, u, ring, scales, channel, bias, data.integers(seed, (out,), np.uint64))


@_RINGS
def test_every_edge_of_the_ring(ring: int) -> None:
    """All pairs of what lies beside 0, m/2, m and 2^32: the representative is the one in (-m/2, m/2]."""
    m = slow_ring.MODULUS[slow.NAMES[ring]]
    centres = (0, m // 256, m // 2, m - m // 256, m, 2**31, 2**32, m // 2 + 256, m // 2 - 256)
    edges = sorted({(centre + d) % 2**32 for centre in centres for d in range(-3, 4)})
    answer = np.repeat(np.array(edges, np.uint32), len(edges)).reshape(len(edges), -1).copy()
    u = np.tile(np.array(edges, np.uint32), (len(edges), 1)).copy()
    check(answer, u, ring, np.ones(len(edges)), None, None, data.integers(1, (len(edges),), np.uint64))
    y_q, _ = slow.unmask(answer.tolist(), u.tolist(), ring, [1.0] * len(edges), None, None)
    flat = [y for row in y_q for y in row]
    assert min(flat) == -(m // 2) + 1 and max(flat) == m // 2


@_RINGS
@pytest.mark.parametrize("out", [1, 8, 300])
def test_one_wrong_token_takes_all(ring: int, out: int) -> None:
    """A sum that is off in any token, by any bit: not one number of any token is given."""
    answer, u = data.integers(1, (3, out), np.uint32), data.integers(2, (3, out), np.uint32)
    rho = data.integers(3, (out,), np.uint64) | np.uint64(1)
    y_q, _ = slow.unmask(answer.tolist(), u.tolist(), ring, [1.0] * 3, None, None)
    right = np.array(slow.checksums(y_q, rho.tolist()), np.uint64)
    for token in range(3):
        for bit in (0, 31, 32, 63):
            wrong, y = right.copy(), np.full((3, out), 77, np.float32)
            wrong[token] ^= np.uint64(1 << bit)
            assert not _native.unmask(answer, u, ring, np.ones(3), None, None, rho, wrong, y)
            assert not y.any()


@_RINGS
def test_one_unit_in_one_element_is_noticed(ring: int) -> None:
    answer, u = data.integers(1, (2, 65), np.uint32), data.integers(2, (2, 65), np.uint32)
    rho = data.integers(3, (65,), np.uint64) | np.uint64(1)
    y_q, _ = slow.unmask(answer.tolist(), u.tolist(), ring, [1.0] * 2, None, None)
    right = np.array(slow.checksums(y_q, rho.tolist()), np.uint64)
    for place in range(answer.size):
        forged, y = answer.copy(), np.empty((2, 65), np.float32)
        forged.flat[place] += np.uint32(1)
        assert not _native.unmask(forged, u, ring, np.ones(2), None, None, rho, right, y)


def test_no_tokens_and_no_outputs() -> None:
    for shape in ((0, 5), (2, 0)):
        empty = np.zeros(shape, np.uint32)
        rho, y = np.zeros(shape[1], np.uint64), np.zeros(shape, np.float32)
        zeros = np.zeros(shape[0], np.uint64)
        assert _native.unmask(empty, empty, 0, np.ones(shape[0]), None, None, rho, zeros, y)
        if shape[0]:
            assert not _native.unmask(empty, empty, 0, np.ones(shape[0]), None, None, rho, zeros + np.uint64(1), y)
