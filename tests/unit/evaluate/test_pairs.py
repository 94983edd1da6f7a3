"""Paired tests: against enumeration and textbook figures, their symmetries, and what they refuse."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.oracle import slow_evaluate as slow

from cloister.errors import CloisterError, DataError
from cloister.evaluate import ExampleScores, PairTest, compare_pair, compare_seeds, holm, pooled

few = settings(max_examples=40, deadline=None)
FEW = {"n_resamples": 300}


def scored(values, metric: str = "accuracy", weights=None) -> ExampleScores:
    names = tuple(f"e{i}" for i in range(len(values)))
    return ExampleScores(metric, np.array(values, float), names, names, weights)


def of_pairs(both: int, better: int, worse: int, neither: int) -> tuple[ExampleScores, ExampleScores]:
    ours = [1] * both + [1] * better + [0] * worse + [0] * neither
    peer = [1] * both + [0] * better + [1] * worse + [0] * neither
    return scored(ours), scored(peer)


hundredths = st.integers(0, 100)
some = st.lists(st.tuples(hundredths, hundredths), min_size=2, max_size=10)
bits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)


def test_mcnemar_of_the_paper():
    # Fagerland, Lydersen and Laake, 2013, table 1 (Bentur et al.): 7 children worsened, 1 improved, of 21.
    ours, peer = of_pairs(1, 7, 1, 12)
    exact, mid_p = compare_pair(ours, peer, **FEW), compare_pair(ours, peer, test="mcnemar-midp", **FEW)
    assert exact.p_value == pytest.approx(0.0703, abs=5e-5)
    assert mid_p.p_value == pytest.approx(0.0391, abs=5e-5)
    assert (exact.test, mid_p.test) == ("McNemar exact", "McNemar mid-p")
    assert (exact.effect, exact.effect_name) == (7, "odds ratio of discordant pairs")
    assert exact.difference == pytest.approx(6 / 21)
    assert exact.low < 6 / 21 < exact.high
    assert exact.n == 21


@few
@given(st.integers(0, 25), st.integers(0, 25), st.integers(1, 5))
def test_mcnemar_is_the_binomial_by_hand(better, worse, both):
    ours, peer = of_pairs(both, better, worse, 1)
    assert compare_pair(ours, peer, **FEW).p_value == pytest.approx(float(slow.mcnemar_p(better, worse)))
    if better + worse:
        expected = float(slow.mcnemar_p(better, worse, mid=True))
        assert compare_pair(ours, peer, test="mcnemar-midp", **FEW).p_value == pytest.approx(expected)


@pytest.mark.parametrize(("better", "worse", "ratio"), [(4, 0, 9.0), (0, 4, 1 / 9), (0, 0, 1.0)])
def test_odds_with_an_empty_cell_are_finite_and_say_so(better, worse, ratio):
    found = compare_pair(*of_pairs(3, better, worse, 3), **FEW)
    assert found.effect == pytest.approx(ratio)
    assert found.effect_name == "odds ratio of discordant pairs, 0.5 added to both"


@few
@given(some)
def test_permutation_is_the_enumeration(pairs):
    ours, peer = zip(*pairs, strict=True)
    found = compare_pair(scored(np.array(ours) / 100, "rouge_l"), scored(np.array(peer) / 100, "rouge_l"),
                         n_resamples=1024, test="permutation")  # fmt: skip
    assert found.p_value == pytest.approx(float(slow.sign_flip_p([Fraction(a - b, 100) for a, b in pairs])))
    assert "exact" in found.test
    moved = (np.array(ours) - np.array(peer)) / 100
    if moved.std(ddof=1) > 0:
        assert found.effect == pytest.approx(moved.mean() / moved.std(ddof=1))
    assert found.effect_name == "Cohen's d_z"


def test_permutation_by_draws_is_close_to_the_enumeration(monkeypatch):
    moved = [3, -1, 4, 1, -5, 9, 2, 6, -5, 3, 5]
    exact = float(slow.sign_flip_p([Fraction(x) for x in moved]))
    ours, peer = scored(np.array(moved) / 20 + 0.5, "rouge_l"), scored(np.full(11, 0.5), "rouge_l")
    drawn = compare_pair(ours, peer, n_resamples=2000)
    assert drawn.test == "sign-flip permutation, 2000 resamples"
    assert drawn.p_value == pytest.approx(exact, abs=0.03)
    assert compare_pair(ours, peer, n_resamples=2048).p_value == pytest.approx(exact)
    monkeypatch.setattr("cloister.evaluate._pairs.CELLS", 100)
    assert compare_pair(ours, peer, n_resamples=2000) == drawn  # memory is bounded without changing the result


@few
@given(bits | some)
def test_swapping_the_models_swaps_the_sign(pairs):
    a, b = (np.array(side) / max(1, *map(max, pairs)) for side in zip(*pairs, strict=True))
    there, back = compare_pair(scored(a), scored(b), **FEW), compare_pair(scored(b), scored(a), **FEW)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    if there.effect_name == "Cohen's d_z":
        assert there.effect == pytest.approx(-back.effect)
    else:
        assert there.effect == pytest.approx(1 / back.effect)
    assert 0 < there.p_value <= 1
    assert there.low <= there.difference + 1e-12
    assert there.difference <= there.high + 1e-12


@few
@given(bits | some, st.sampled_from(["auto", "permutation"]))
def test_a_model_is_no_better_than_itself(pairs, test):
    values = np.array([a for a, _ in pairs]) / max(1, *map(max, pairs))
    found = compare_pair(scored(values), scored(values), test=test, **FEW)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert found.effect == (1 if "odds" in found.effect_name else 0)


def test_a_model_is_no_better_than_itself_by_mid_p_either():
    ours, _ = of_pairs(3, 0, 0, 3)
    assert compare_pair(ours, ours, test="mcnemar-midp", **FEW).p_value == 1


def test_examples_pair_by_id_whatever_their_order():
    ours, peer = of_pairs(5, 4, 1, 3)
    assert compare_pair(ours, peer.rows(list(reversed(range(13)))), **FEW) == compare_pair(ours, peer, **FEW)


def test_perplexity_is_compared_on_the_log_ratio():
    tokens = np.array([4.0, 1.0, 5.0, 2.0, 8.0])
    ours = scored([4.0, 2.0, 9.0, 5.0, 12.0], "perplexity", tokens)
    peer = scored([6.0, 2.5, 9.5, 4.0, 15.0], "perplexity", tokens)
    found = compare_pair(ours, peer, **FEW)
    assert found.unit == "log ratio"
    assert found.difference == pytest.approx(math.log(peer.overall / ours.overall))
    moved = [Fraction(4, 2), Fraction(1, 2), Fraction(1, 2), Fraction(-1), Fraction(3)]
    assert found.p_value == pytest.approx(float(slow.sign_flip_p(moved)))
    assert found.low < found.difference < found.high


def test_the_paired_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(150):
        common = stats.uniform.rvs(0.2, 0.6, size=80, random_state=seed)
        moved = stats.norm.rvs(0.02, 0.05, size=80, random_state=1000 + seed)
        found = compare_pair(scored(np.clip(common + moved, 0, 1), "rouge_l"), scored(common, "rouge_l"),
                             n_resamples=200, seed=seed)  # fmt: skip
        held += found.low <= 0.02 <= found.high
    assert 0.89 <= held / 150 <= 0.99


@pytest.mark.parametrize(
    ("call", "kind", "why"),
    [
        (lambda: compare_pair(scored([1]), scored([0])), DataError, "at least two examples"),
        (lambda: compare_pair(scored([1, 0.5]), scored([0, 1]), test="mcnemar"), DataError, "figures of 0 or 1"),
        (lambda: compare_pair(scored([1, 0]), scored([0, 1]), test="wilcoxon"), CloisterError, "'wilcoxon'"),
        (lambda: compare_pair(scored([1, 0]), scored([0, 1]), confidence=2), CloisterError, "confidence"),
        (lambda: compare_seeds([0.5, 0.6], [0.5]), DataError, "2 seeds of one method and 1"),
        (lambda: compare_seeds([0.5], [0.5]), DataError, "1 seed shows no spread"),
        (lambda: compare_seeds([], []), DataError, "0 seed shows no spread"),
        (lambda: compare_seeds([0.5, math.nan], [0.5, 0.5]), DataError, "seed number 1"),
        (lambda: compare_seeds([5.0, 0.0], [5.0, 5.0], metric="perplexity"), DataError, "seed number 1"),
        (lambda: compare_seeds([1, 2], [1, 2], metric="seconds"), CloisterError, "'seconds' is no metric"),
        (lambda: compare_seeds([1, 2], [1, 3], test="mcnemar"), CloisterError, "no test of seeds"),
        (lambda: compare_seeds([1, 2], [1, 3], confidence=1.0), CloisterError, "confidence"),
        (lambda: pooled({}, {}), DataError, "no data set"),
        (lambda: pooled({"x": [1, 2]}, {"y": [1, 2]}), DataError, "data set 'x' is there for one method only"),
        (lambda: pooled({"x": [1, 2]}, {"x": [1]}), DataError, "x: 2 seeds"),
        (lambda: holm([0.5, math.nan]), DataError, "nan is no p-value"),
        (lambda: holm([1.5]), DataError, "1.5 is no p-value"),
        (lambda: holm([0.5], method="sidak"), CloisterError, "'sidak'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(call, kind, why):
    with pytest.raises(kind, match=why):
        call()


def test_seeds_by_hand():
    ours, peer = [0.62, 0.66, 0.60, 0.64, 0.63], [0.60, 0.61, 0.60, 0.60, 0.62]
    moved = np.array([0.02, 0.05, 0, 0.04, 0.01])
    found = compare_seeds(ours, peer)
    reach = 2.776445 * moved.std(ddof=1) / math.sqrt(5)  # t of 4 degrees of freedom
    assert found.difference == pytest.approx(0.024)
    assert (found.low, found.high) == pytest.approx((0.024 - reach, 0.024 + reach), rel=1e-5)
    assert found.p_value == pytest.approx(2 / 16)  # four seeds moved, all one way
    assert found.effect == pytest.approx(0.024 / moved.std(ddof=1))
    assert (found.n, found.test, found.unit) == (5, "sign-flip permutation, exact", "difference")
    by_t = compare_seeds(ours, peer, test="t")
    assert by_t.p_value == pytest.approx(stats.ttest_rel(ours, peer).pvalue)
    assert (by_t.low, by_t.high) == (found.low, found.high)


@few
@given(st.lists(st.tuples(hundredths, hundredths), min_size=2, max_size=8))
def test_seeds_are_the_enumeration_and_swap(pairs):
    ours, peer = ([x / 100 for x in side] for side in zip(*pairs, strict=True))
    there, back = compare_seeds(ours, peer), compare_seeds(peer, ours)
    assert there.p_value == pytest.approx(float(slow.sign_flip_p([Fraction(a - b) for a, b in pairs])))
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert there.p_value == pytest.approx(back.p_value)


def test_a_perplexity_of_seeds_is_a_log_ratio():
    found = compare_seeds([10, 12], [20, 18], metric="perplexity")
    assert found.difference == pytest.approx((math.log(2) + math.log(1.5)) / 2)
    assert found.unit == "log ratio"


@pytest.mark.parametrize("test", ["permutation", "t"])
def test_seeds_that_all_agree_are_a_point(test):
    same = compare_seeds([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], test=test)
    assert (same.difference, same.low, same.high, same.p_value, same.effect) == (0, 0, 0, 1, 0)
    moved = compare_seeds([0.6, 0.7, 0.8], [0.5, 0.6, 0.7], test=test)  # 0.1 each, but for rounding
    assert moved.low == moved.high == pytest.approx(0.1)
    assert moved.method == "point: no spread over seeds"
    assert moved.effect == math.inf
    assert moved.as_dict()["effect"] is None
    assert moved.p_value == (0 if test == "t" else 0.25)


def test_pooled_of_one_data_set_is_that_data_set():
    ours, peer = [0.62, 0.66, 0.60, 0.64], [0.60, 0.61, 0.60, 0.60]
    alone, together = compare_seeds(ours, peer), pooled({"hoc": ours}, {"hoc": peer})
    assert together.as_dict() == pytest.approx(alone.as_dict() | {"effect_name": "Cohen's d_z within data sets"})


def test_pooled_by_hand():
    ours, peer = {"x": [3.0, 5.0], "y": [2.0, 3.0, 7.0]}, {"x": [1.0, 1.0], "y": [1.0, 1.0, 1.0]}
    found = pooled(ours, peer)
    # Means 3 and 3, variances 2 and 7: error^2 = (2/2 + 7/3) / 4.
    error2 = (1 + 7 / 3) / 4
    freedom = (1 + 7 / 3) ** 2 / (1 / 1 + (7 / 3) ** 2 / 2)
    assert found.difference == pytest.approx(3)
    assert found.high - 3 == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(error2))
    assert found.effect == pytest.approx(3 / math.sqrt(4.5))
    shares = [Fraction(2, 4), Fraction(4, 4), Fraction(1, 6), Fraction(2, 6), Fraction(6, 6)]
    assert found.p_value == pytest.approx(float(slow.sign_flip_p(shares)))
    assert found.n == 5


def test_pooled_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(300):
        ours = {name: list(stats.norm.rvs(0.7 + 0.01, spread, size=5, random_state=10 * seed + i))
                for i, (name, spread) in enumerate([("x", 0.01), ("y", 0.02), ("z", 0.005)])}  # fmt: skip
        found = pooled(ours, {name: [0.7] * 5 for name in ours}, test="t")
        held += found.low <= 0.01 <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_seeds_that_agree_in_every_data_set_are_a_point():
    found = pooled({"x": [0.6, 0.6], "y": [0.7, 0.7]}, {"x": [0.5, 0.5], "y": [0.5, 0.5]})
    assert found.low == found.high == pytest.approx(0.15)


@settings(max_examples=10, deadline=None)  # statsmodels collects garbage each time, which takes a test process long
@given(st.lists(st.floats(0, 1), max_size=12))
def test_corrections_are_the_textbook(p_values):
    assert holm(p_values) == pytest.approx(slow.holm(p_values))
    assert holm(p_values, method="fdr_bh") == pytest.approx(slow.benjamini_hochberg(p_values))


def test_results_are_plain_data(make):
    found = compare_pair(make([1, 0, 1]), make([0, 0, 1]), **FEW)
    assert PairTest(**found.as_dict()) == found


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("statsmodels.stats.contingency_tables", "statsmodels", lambda: compare_pair(scored([1, 0]), scored([0, 0]))),
        ("statsmodels.stats.multitest", "statsmodels", lambda: holm([0.5])),
        ("scipy.stats", "scipy", lambda: compare_seeds([1, 2], [1, 3])),
    ],
    ids=["mcnemar", "holm", "scipy"],
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, module, package, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CloisterError, match=f"needs {package}") as caught:
        call()
    assert caught.value.hint == "pip install 'cloister[evaluate]'"
