"""Noise on the grid, and what it costs: against the exact formula, and without the extra by a clear error."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cloister.errors import ConfigError, FederationError
from cloister.train import gaussian_epsilon, noised, on_grid
from cloister.train._privacy import MAX_SUM


def exact_epsilon(noise_multiplier: float, n: int, delta: float) -> float:
    """Balle and Wang, 2018, arXiv 1805.06530, theorem 8: n Gaussians are one with the multiplier over sqrt(n)."""
    mu = math.sqrt(n) / noise_multiplier

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 1000.0
    for _ in range(200):
        epsilon = (low + high) / 2
        found = phi(-epsilon / mu + mu / 2) - math.exp(min(epsilon, 700)) * phi(-epsilon / mu - mu / 2)
        low, high = (epsilon, high) if found > delta else (low, epsilon)
    return high


@pytest.mark.parametrize(("noise", "n"), [(0.5, 1), (1.0, 10), (2.0, 3), (8.0, 40), (30.0, 5)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_epsilon_is_above_the_exact_one_and_not_by_much(noise: float, n: int, delta: float) -> None:
    exact = exact_epsilon(noise, n, delta)
    assert exact <= gaussian_epsilon(noise, n, delta=delta) <= 1.35 * exact


def test_no_release_costs_nothing_and_sampling_helps() -> None:
    assert gaussian_epsilon(1.0, 0, delta=1e-5) == 0
    assert gaussian_epsilon(1.0, 10, delta=1e-5, sample_rate=0.1) < gaussian_epsilon(1.0, 10, delta=1e-5)


@settings(deadline=None)
@given(npst.arrays(np.float64, 20, elements=st.floats(-1e3, 1e3)), st.floats(1e-3, 1e3))
def test_the_grid_rounds_towards_zero_by_less_than_a_step(values: np.ndarray, sigma: float) -> None:
    steps = on_grid(values, sigma)
    back = steps * (sigma / 2**30)
    assert np.all(np.abs(back) <= np.abs(values) * (1 + 1e-12))
    assert np.all(np.abs(back - values) <= sigma / 2**30 + 1e-12 * np.abs(values))


def test_noise_is_centred_on_the_sum_and_of_its_size() -> None:
    found = noised(on_grid(np.full((2, 40_000), 5.0), 3.0), 3.0)
    assert found.shape == (2, 40_000)
    assert found.mean() == pytest.approx(5.0, abs=0.05)
    assert found.std() == pytest.approx(3.0, rel=0.02)
    # Kurtosis of a Gaussian, and no value twice beyond chance: a generator that repeats would show here.
    assert np.mean(((found - 5) / 3) ** 4) == pytest.approx(3.0, rel=0.1)
    assert len(np.unique(found)) > 0.999 * found.size


def test_noise_differs_between_calls_and_nothing_comes_of_nothing() -> None:
    zeros = np.zeros(10, dtype=np.int64)
    assert not np.array_equal(noised(zeros, 1.0), noised(zeros, 1.0))
    assert noised(np.zeros((0, 3), dtype=np.int64), 1.0).shape == (0, 3)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_could_overflow_is_refused(sign: int) -> None:
    with pytest.raises(FederationError, match="too large"):
        noised(np.array([sign * (MAX_SUM + 1)]), 1.0)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("opendp", "opendp.prelude", "opacus", "opacus.accountants"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="opendp") as caught:
        noised(np.zeros(1, dtype=np.int64), 1.0)
    assert "cloister[dp]" in caught.value.hint
    with pytest.raises(ConfigError, match="opacus"):
        gaussian_epsilon(1.0, 1, delta=1e-5)
