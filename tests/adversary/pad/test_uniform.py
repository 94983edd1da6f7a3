"""Pads are uniform: chi-square of every residue and of pairs, at p > 1e-6 on both sides, on pads that never change.

The statistic's distribution is compared through Wilson and Hilferty's cube root (PNAS 17, 1931), whose error at these
degrees of freedom is far below the tolerance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import pytest

from cloister.pad import Direction, PadKeys

N = 1 << 22
FAITHFUL = (256, 255, 253, 251)
FAST = (256, 256, 256)
Z_BOUND = 4.8916  # two-sided p = 1e-6 of a normal variable


def z_of_chi_square(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square of equal expected counts is off."""
    expected = counts.sum() / counts.size
    assert expected >= 5
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    spread = 2 / (9 * (counts.size - 1))
    return ((chi_square / (counts.size - 1)) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def z_of_pairs(a: np.ndarray, b: np.ndarray, n_a: int, n_b: int) -> float:
    return z_of_chi_square(np.bincount(a.astype(np.int64) * n_b + b, minlength=n_a * n_b))


@pytest.fixture(scope="module")
def fixed_keys() -> Iterator[PadKeys]:
    """Keys of a generator that always says the same, so that the test always says the same."""
    count = iter(range(1 << 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cloister.pad._stream.os.urandom", lambda n: hashlib.sha256(str(next(count)).encode()).digest()[:n]
        )
        keys = PadKeys()
        yield keys
        keys.close()


@pytest.fixture(scope="module", params=[FAITHFUL, FAST, (192, 129)], ids=["faithful", "fast", "many rejected"])
def pad(request: pytest.FixtureRequest, fixed_keys: PadKeys) -> tuple[tuple[int, ...], np.ndarray]:
    stream = fixed_keys.stream(str(request.param), Direction.FORWARD)
    return request.param, stream.draw((N,), request.param).use((N,))


def test_every_residue_is_as_frequent(pad: tuple[tuple[int, ...], np.ndarray]):
    for modulus, plane in zip(*pad, strict=True):
        counts = np.bincount(plane, minlength=modulus)
        assert len(counts) == modulus
        assert abs(z_of_chi_square(counts)) < Z_BOUND, modulus


@pytest.mark.parametrize("lag", [1, 16, 1024])
def test_no_residue_tells_of_a_later_one(pad: tuple[tuple[int, ...], np.ndarray], lag: int):
    for modulus, plane in zip(*pad, strict=True):
        first, second = plane.reshape(-1, 2, lag).transpose(1, 0, 2).reshape(2, -1)
        assert abs(z_of_pairs(first, second, modulus, modulus)) < Z_BOUND, modulus


def test_no_plane_tells_of_another(pad: tuple[tuple[int, ...], np.ndarray]):
    moduli, planes = pad
    for i in range(len(moduli)):
        for j in range(i):
            assert abs(z_of_pairs(planes[i], planes[j], moduli[i], moduli[j])) < Z_BOUND, (i, j)


def test_a_masked_constant_is_uniform(pad: tuple[tuple[int, ...], np.ndarray]):
    """What the accelerator sees of a constant tensor, which is the worst one."""
    for modulus, plane in zip(*pad, strict=True):
        masked = (plane.astype(np.int64) + 77) % modulus
        assert abs(z_of_chi_square(np.bincount(masked, minlength=modulus))) < Z_BOUND


def test_the_pattern_of_rejected_bytes_tells_nothing(fixed_keys: PadKeys, monkeypatch: pytest.MonkeyPatch):
    """Residues where a byte was rejected, and those beside them, are as uniform as all others."""
    modulus, mains = 251, []
    from cloister.pad import _expand

    real = _expand._KeyStream.fill

    def fill(stream, plane, modulus, round_, offset, out):
        real(stream, plane, modulus, round_, offset, out)
        if round_ == 0:
            mains.append(out.copy())

    monkeypatch.setattr(_expand._KeyStream, "fill", fill)
    (r,) = fixed_keys.stream("pattern", Direction.FORWARD).draw((N,), (modulus,)).use((N,))
    rejected = np.flatnonzero(np.concatenate(mains) >= modulus)
    assert 0.9 < len(rejected) / (N * 5 / 256) < 1.1
    for places in (rejected, (rejected + 1) % N):
        assert abs(z_of_chi_square(np.bincount(r[places], minlength=modulus))) < Z_BOUND


@pytest.mark.parametrize("reduce", ["modulo", "repeat", "too even"])
def test_the_tests_have_power(reduce: str):
    """A byte modulo 251, a repeated plane and a counter are found out."""
    bytes_ = np.frombuffer(hashlib.shake_256(b"power").digest(N), np.uint8)
    if reduce == "modulo":
        z = z_of_chi_square(np.bincount(bytes_ % 251, minlength=251))
    elif reduce == "repeat":
        z = z_of_pairs(bytes_, bytes_, 256, 256)
    else:
        z = z_of_chi_square(np.bincount(np.arange(N, dtype=np.uint8), minlength=256))
    assert abs(z) > Z_BOUND
