"""Rejected bytes get the good spares in order, as the oracle says, on every level."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import slow_kernels as slow
from tests.unit.native import data

from cloister.kernels import _native

pytestmark = pytest.mark.usefixtures("level")
_SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)


def check(row: np.ndarray, modulus: int, spares: np.ndarray) -> list[int]:
    expected, lacking = slow.replace_rejected(row.tolist(), modulus, spares.tolist())
    found = row.copy()
    assert _native.replace_rejected(found, modulus, spares) == lacking
    assert found.tolist() == expected
    return lacking


@_SETTINGS
@given(
    n=data.WIDTHS | st.sampled_from([959, 1023, 1024, 1025, 2048, 3000]), modulus=st.integers(129, 255), seed=data.SEEDS
)
def test_rows(n: int, modulus: int, seed: int) -> None:
    check(data.integers(seed, (n,), np.uint8), modulus, data.integers(seed + 1, (-(-n // 1024) * 64,), np.uint8))


@pytest.mark.parametrize("modulus", [129, 251, 255])
@pytest.mark.parametrize("n_good", [0, 1, 63, 64])
def test_just_enough_spares_and_one_too_few(modulus: int, n_good: int) -> None:
    spares = np.full(128, 255, np.uint8)
    spares[64 : 64 + n_good] = np.arange(n_good) + 1
    for n_rejected in {max(0, n_good - 1), n_good, n_good + 1}:
        row = np.zeros(1500, np.uint8)
        row[1499 - np.arange(n_rejected) * 7] = 255
        assert check(row, modulus, spares) == ([1] if n_rejected > n_good else [])


def test_all_rejected_and_none() -> None:
    spares = data.integers(1, (3 * 64,), np.uint8) % np.uint8(251)
    assert check(np.full(3000, 255, np.uint8), 251, spares) == [0, 1, 2]
    assert check(np.full(3000, 250, np.uint8), 251, spares) == []
    assert check(np.empty(0, np.uint8), 251, np.empty(0, np.uint8)) == []
