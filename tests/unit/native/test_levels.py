"""One instruction set gives the bits of another, also where the oracle is too slow to follow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tests.oracle import slow_ring
from tests.oracle.slow_kernels import NAMES
from tests.unit.native import data

from cloister.kernels import _native

_RINGS = pytest.mark.parametrize("ring", data.RINGS, ids=NAMES)


@pytest.fixture(autouse=True)
def same_level_after() -> Iterator[None]:
    before = _native.level()
    yield
    _native.use_level(before)


def agree(results: Callable[[], list[np.ndarray]]) -> None:
    digests = set()
    for level in _native.levels():
        _native.use_level(level)
        assert _native.level() == level
        digests.add(hashlib.sha256(b"".join(array.tobytes() for array in results())).digest())
    assert len(digests) == 1


def test_the_best_level_is_in_use_and_the_portable_one_is_always_there():
    assert _native.level() == _native.levels()[0]
    assert _native.levels()[-1] == "portable"


def test_a_level_that_is_not_there():
    with pytest.raises(ValueError, match="no such level"):
        _native.use_level("avx1024")


@_RINGS
@pytest.mark.parametrize("features", [1000, 4096])
def test_masks(ring: int, features: int) -> None:
    x, fold = data.floats(1, (64, features), 3.0), data.floats(2, (features,), 0.1)
    r, v = data.pads(1, x.shape, ring), data.integers(1, (features,), np.uint64)

    def masked() -> list[np.ndarray]:
        planes, scales, sums = np.empty(r.shape, np.int8), np.empty(64), np.empty(64, np.uint64)
        assert _native.mask(x, fold, 1e7, r, ring, v, planes, scales, sums)
        return [planes, scales, sums]

    agree(masked)


@_RINGS
@pytest.mark.parametrize("out", [1000, 4096])
def test_answers(ring: int, out: int) -> None:
    acc = data.integers(1, (len(data.MODULI[ring]), 64 * out), np.int32)
    u, rho = data.integers(2, (64, out), np.uint32), data.integers(3, (out,), np.uint64)
    scales, channel, bias = data.floats(4, (64,)).astype(np.float64), data.floats(5, (out,)), data.floats(6, (out,))

    def unmasked() -> list[np.ndarray]:
        answer, y = np.empty((64, out), np.uint32), np.empty((64, out), np.float32)
        _native.combine(acc, ring, answer.reshape(-1))
        half = slow_ring.MODULUS[NAMES[ring]] // 2
        y_q = (answer.astype(np.int64) - u + half - 1) % (2 * half) - (half - 1)
        sums = (y_q.astype(np.uint64) * rho).sum(1)
        assert _native.unmask(answer, u, ring, scales, channel, bias, rho, sums, y)
        return [answer, y]

    agree(unmasked)
