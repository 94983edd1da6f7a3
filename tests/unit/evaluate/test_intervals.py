"""Bootstrap intervals: how often they hold the truth, and what they say where there is no spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cloister.errors import CloisterError
from cloister.evaluate import ExampleScores, classification_scores, interval, perplexity_scores


def scored(values: np.ndarray, weights: np.ndarray | None = None) -> ExampleScores:
    names = tuple(str(i) for i in range(len(values)))
    if weights is None:
        return ExampleScores("rouge_l", values, names, names)
    return perplexity_scores(values, weights, ids=names, clients=names)


@pytest.mark.parametrize(("confidence", "least", "most"), [(0.95, 0.93, 0.975), (0.8, 0.76, 0.86)])
def test_accuracy_is_held_about_as_often_as_it_says(confidence, least, most):
    # Every count of right answers out of 150, weighed by how often a model that is right 8 times of 10 has it.
    held = 0.0
    for n_right in range(90, 146):
        found = interval(
            scored(np.repeat([1.0, 0.0], [n_right, 150 - n_right])), n_resamples=1000, confidence=confidence
        )
        held += stats.binom.pmf(n_right, 150, 0.8) * (found.low <= 0.8 <= found.high)
    assert least <= held <= most


def test_a_skewed_figure_is_held_about_as_often_as_it_says():
    held = 0
    for seed in range(300):
        found = interval(scored(stats.beta.rvs(2, 6, size=60, random_state=seed)), n_resamples=400, seed=seed)
        held += found.low <= 0.25 <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_perplexity_holds_the_truth_too():
    held = 0
    for seed in range(150):
        tokens = 1 + stats.poisson.rvs(20, size=80, random_state=seed).astype(float)
        losses = tokens * stats.gamma.rvs(4, scale=0.5, size=80, random_state=1000 + seed)  # mean 2 nats a token
        found = interval(scored(losses, tokens), n_resamples=400, seed=seed)
        held += found.low <= math.exp(2) <= found.high
    assert 0.89 <= held / 150 <= 0.99


def test_it_is_close_to_the_textbook_and_the_same_each_time():
    values = stats.bernoulli.rvs(0.7, size=500, random_state=1).astype(float)
    found = interval(scored(values), n_resamples=2000)
    reach = 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / 500)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.006)
    assert found.method == "bootstrap, BCa"
    assert found == interval(scored(values), n_resamples=2000)
    assert found != interval(scored(values), n_resamples=2000, seed=1)
    assert found.as_dict()["low"] == found.low


def test_memory_is_bounded_without_changing_the_result(monkeypatch):
    values = stats.beta.rvs(2, 6, size=300, random_state=0)
    whole = interval(scored(values), n_resamples=500)
    monkeypatch.setattr("cloister.evaluate._intervals.CELLS", 300 * 7)
    assert interval(scored(values), n_resamples=500) == whole


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_figures_are_a_point_and_say_so(value):
    found = interval(scored(np.full(20, value)))
    assert (found.value, found.low, found.high, found.method) == (value, value, value, "point: 20 equal figures")


def test_one_example_is_a_point_and_says_so():
    scores = classification_scores([1], [1], ids=["x"], clients=["a"])
    assert interval(scores).method == "point: one example"


def test_equal_loss_of_every_token_is_a_point():
    found = interval(scored(np.array([2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0])))
    assert found.low == found.high == pytest.approx(math.exp(2))


def test_where_bca_is_not_defined_percentiles_are_named(monkeypatch):
    real = stats.bootstrap

    def degenerate(*args, method, **kwargs):
        found = real(*args, method=method, **kwargs)
        if method == "BCa":
            found.confidence_interval = type(found.confidence_interval)(math.nan, math.nan)
        return found

    monkeypatch.setattr(stats, "bootstrap", degenerate)
    values = stats.beta.rvs(2, 6, size=50, random_state=0)
    found = interval(scored(values), n_resamples=500)
    assert found.method == "bootstrap, percentile (BCa is not defined)"
    assert found.low < values.mean() < found.high


def test_of_a_long_split_the_percentiles_are_taken(monkeypatch):
    monkeypatch.setattr("cloister.evaluate._intervals._MOST_FOR_BCA", 10)
    found = interval(scored(stats.beta.rvs(2, 6, size=50, random_state=0)), n_resamples=500)
    assert found.method == "bootstrap, percentile"


@pytest.mark.parametrize(("confidence", "n_resamples", "why"), [(0, 500, "confidence"), (1, 500, "confidence"),
                         (math.nan, 500, "confidence"), (0.95, 99, "99 resamples")])  # fmt: skip
def test_what_makes_no_interval_is_refused(confidence, n_resamples, why):
    with pytest.raises(CloisterError, match=why):
        interval(scored(np.array([0.1, 0.2])), confidence=confidence, n_resamples=n_resamples)
