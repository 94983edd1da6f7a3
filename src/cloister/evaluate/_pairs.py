"""Is one model better than another? Paired tests over examples, over seeds and over data sets; docs/evaluate.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cloister.errors import CloisterError, DataError
from cloister.evaluate._intervals import CELLS, N_RESAMPLES, Interval, check_resampling, resampled, t_interval
from cloister.evaluate._libraries import library
from cloister.evaluate._scores import ExampleScores, matched

PairMethod = Literal["auto", "mcnemar", "mcnemar-midp", "permutation"]
SeedMethod = Literal["auto", "permutation", "t"]
Correction = Literal["holm", "fdr_bh"]
_Judged = tuple[float, str, float, str]  # p-value, test, effect, effect's name
_DZ = "Cohen's d_z"
_SEED_METRICS = ("accuracy", "exact_match", "macro_f1", "perplexity", "rouge_l")


@dataclass(frozen=True)
class PairTest:
    """How much better ours is than the peer, on the same examples or seeds. *public*.

    Attributes:
        difference: positive where ours is better. Of perplexity ln(peer / ours); else in the metric's own unit.
        low, high: its interval.
        p_value: two-sided: how often at least such a difference comes where neither is better.
        test: what gave the p-value.
        effect: how large the difference is beside its spread; infinite where it has none, 0 or 1 where there is no
            difference (see `effect_name`).
        effect_name: "Cohen's d_z" (mean over standard deviation of the differences; 0 is none) or the odds ratio of
            discordant pairs (1 is none).
        n: pairs: examples, or seeds.
        method: how the interval was found, as in `Interval`.
        unit: "difference", or "log ratio" for perplexity.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    effect: float
    effect_name: str
    n: int
    method: str = ""
    unit: str = "difference"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an infinite effect is null."""
        return asdict(self) | {"effect": self.effect if math.isfinite(self.effect) else None}


def compare_pair(
    ours: ExampleScores,
    peer: ExampleScores,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
    test: PairMethod = "auto",
) -> PairTest:
    """Two models on the same examples, paired by id: what another draw of examples would show.

    The interval is a paired bootstrap. The p-value:

    - "mcnemar", for figures that are 0 or 1: exact, from the pairs where one model is right and the other wrong.
    - "mcnemar-midp": the same less half the probability of what was seen; less conservative, its level is not
      guaranteed (Fagerland, Lydersen and Laake, 2013).
    - "permutation": signs of the differences flipped, all ways where they are at most `n_resamples`, else so many at
      random. For perplexity over whole examples, by their summed log likelihoods.
    - "auto": "mcnemar" where every figure is 0 or 1, else "permutation".

    Args:
        ours: the one that `difference` is positive for where it is better.
        peer: the other.
        confidence: of the interval.
        seed: of the resampling; the same seed gives the same answer.
        n_resamples: of the bootstrap, and of the permutation test.
        test: see above.

    Raises:
        DataError: other examples, other metrics, other token counts, fewer than two examples, or McNemar's test on
            figures that are not 0 or 1. Names the first example that is wrong.
        CloisterError: scipy or statsmodels is missing, no such test, a confidence not between 0 and 1.
    """
    check_resampling(confidence, n_resamples)
    peer = matched(ours, peer)
    if ours.n < 2:
        raise DataError(f"{ours.metric}: a paired test needs at least two examples")
    moved = ours.values - peer.values if ours.higher_is_better else peer.values - ours.values
    found = resampled((moved, *ours.columns[1:]), confidence=confidence, n_resamples=n_resamples, seed=seed)
    judged = _example_test(moved, (ours, peer), test, n_resamples=n_resamples, seed=seed)
    return _pair_test(found, judged, n=ours.n, metric=ours.metric)


def compare_seeds(
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    metric: str = "accuracy",
    confidence: float = 0.95,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
    test: SeedMethod = "auto",
) -> PairTest:
    """Two methods over the same training seeds, paired by seed: what other seeds would show on this test split.

    The interval is Student's t. The p-value: "permutation" ("auto") flips the signs of the differences and assumes
    nothing else, but of n seeds it is never below 2 / 2^n, 0.0625 for five; "t" assumes normal differences.

    Args:
        ours: the metric of each seed's run.
        peer: the same seeds, in the same order.
        metric: what they are; decides the sign, and for perplexity the log ratio. Also "macro_f1".
        confidence: of the interval.
        seed: of the permutations, where they are too many to try all.
        n_resamples: how many are tried.
        test: see above.

    Raises:
        DataError: lengths that differ, fewer than two seeds, a figure that is not finite, a perplexity of 0 or less.
        CloisterError: scipy is missing, no such test, no such metric, a confidence not between 0 and 1.
    """
    moved = _seed_differences(ours, peer, metric)
    n, mean, spread = len(moved), float(moved.mean()), _spread(moved)
    error = spread / math.sqrt(n)
    found = t_interval(mean, error, n - 1, confidence=confidence)
    if test == "t":
        judged = _t_test(mean, error, n - 1)
    else:
        judged = _seed_flips(moved, test, n_resamples=n_resamples, seed=seed)
    return _pair_test(found, (*judged, _d_z(mean, spread), _DZ), n=n, metric=metric)


def pooled(
    ours: Mapping[str, Sequence[float]],
    peer: Mapping[str, Sequence[float]],
    *,
    metric: str = "accuracy",
    confidence: float = 0.95,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
    test: SeedMethod = "auto",
) -> PairTest:
    """Two methods over several data sets and seeds: the mean over data sets of the mean difference over seeds.

    Every data set counts the same. The interval is Student's t with the variances of the data sets added
    (Welch-Satterthwaite degrees of freedom): it is about these data sets under other seeds. For a claim about other
    data sets like these, give `compare_seeds` one mean a data set.

    Args:
        ours: by data set, the metric of each seed's run.
        peer: the same data sets and seeds.
        metric, confidence, seed, n_resamples, test: as `compare_seeds` has them.

    Returns:
        `n` is the number of pairs over all data sets; the effect is over the mean spread within data sets.

    Raises:
        DataError: see `compare_seeds`, with the data set's name; or data sets that only one side has.
        CloisterError: see `compare_seeds`.
    """
    if not ours or set(ours) != set(peer):
        odd = sorted(set(ours) ^ set(peer))
        raise DataError(f"data set {odd[0]!r} is there for one method only" if odd else "no data set to pool over")
    found = {name: _seed_differences(ours[name], peer[name], metric, f"{name}: ") for name in sorted(ours)}
    moved = list(found.values())
    mean = float(np.mean([part.mean() for part in moved]))
    # Of the mean over k data sets of means over n seeds: sum of s^2 / n, over k^2.
    parts = [_spread(part) ** 2 / len(part) / len(moved) ** 2 for part in moved]
    error = math.sqrt(sum(parts))
    by_freedom = sum(v**2 / (len(part) - 1) for v, part in zip(parts, moved, strict=True))
    freedom = error**4 / by_freedom if error else math.inf
    bounds = t_interval(mean, error, freedom, confidence=confidence)
    shares = np.concatenate([part / (len(part) * len(moved)) for part in moved])  # they add up to the mean
    if test == "t":
        judged = _t_test(mean, error, freedom)
    else:
        judged = _seed_flips(shares, test, n_resamples=n_resamples, seed=seed)
    within = math.sqrt(float(np.mean([_spread(part) ** 2 for part in moved])))
    return _pair_test(bounds, (*judged, _d_z(mean, within), f"{_DZ} within data sets"), n=len(shares), metric=metric)


def holm(p_values: Sequence[float], *, method: Correction = "holm") -> list[float]:
    """p-values corrected for how many there are, in their order; by statsmodels.

    "holm" bounds the probability of any false finding among them (family-wise error), whatever their dependence;
    "fdr_bh" (Benjamini and Hochberg) the expected share of false ones among the findings.

    Raises:
        DataError: something that is no probability.
        CloisterError: statsmodels is missing, or no such correction.
    """
    if method not in ("holm", "fdr_bh"):
        raise CloisterError(f"no correction is called {method!r}", hint="holm or fdr_bh")
    for p_value in p_values:
        if not 0 <= p_value <= 1:  # NaN is not either
            raise DataError(f"{p_value} is no p-value")
    if not p_values:
        return []
    corrected = library("statsmodels.stats.multitest").multipletests(list(p_values), method=method)[1]
    return [float(p_value) for p_value in corrected]


def _pair_test(found: Interval, judged: _Judged, *, n: int, metric: str) -> PairTest:
    unit = "log ratio" if metric == "perplexity" else "difference"
    return PairTest(found.value, found.low, found.high, *judged, n, found.method, unit)


def _example_test(
    moved: NDArray[np.float64], scores: tuple[ExampleScores, ...], test: str, *, n_resamples: int, seed: int
) -> _Judged:
    binary = all(each.weights is None and bool(np.isin(each.values, (0, 1)).all()) for each in scores)
    if test == "auto":
        test = "mcnemar" if binary else "permutation"
    if test in ("mcnemar", "mcnemar-midp"):
        if not binary:
            raise DataError(f"{scores[0].metric}: McNemar's test needs figures of 0 or 1", hint="test='permutation'")
        return *_mcnemar(moved, mid_p=test == "mcnemar-midp"), *_odds_ratio(moved)
    if test != "permutation":
        raise CloisterError(f"no test is called {test!r}", hint="auto, mcnemar, mcnemar-midp or permutation")
    p_value, name = _sign_flip(moved, n_resamples=n_resamples, seed=seed)
    return p_value, name, _d_z(float(moved.mean()), _spread(moved)), _DZ


def _mcnemar(moved: NDArray[np.float64], *, mid_p: bool) -> tuple[float, str]:
    better, worse = int((moved > 0).sum()), int((moved < 0).sum())
    name = "McNemar mid-p" if mid_p else "McNemar exact"
    if better + worse == 0:
        return 1.0, name  # by the formula of mid-p 0.5, though nothing at all speaks for a difference
    table = [[len(moved) - better - worse, better], [worse, 0]]  # the test reads the discordant cells alone
    p_value = float(library("statsmodels.stats.contingency_tables").mcnemar(table, exact=True).pvalue)
    if mid_p:
        seen = float(library("scipy.stats").binom.pmf(min(better, worse), better + worse, 0.5))
        p_value -= seen / 2 if better == worse else seen
    return p_value, name


def _odds_ratio(moved: NDArray[np.float64]) -> tuple[float, str]:
    better, worse = int((moved > 0).sum()), int((moved < 0).sum())
    name = "odds ratio of discordant pairs"
    if better and worse:
        return better / worse, name
    return (better + 0.5) / (worse + 0.5), f"{name}, 0.5 added to both"  # Haldane's, as one of them is 0


def _d_z(mean: float, spread: float) -> float:
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / spread


def _sign_flip(moved: NDArray[np.float64], *, n_resamples: int, seed: int) -> tuple[float, str]:
    """Two-sided p-value of the sum, if each of its terms could as well have had the other sign."""
    moved = moved[moved != 0]  # a zero has no sign: left out, the distribution is the same
    exact = 2 ** len(moved) <= n_resamples
    name = f"sign-flip permutation, {'exact' if exact else f'{n_resamples} resamples'}"
    if len(moved) < 2:
        return 1.0, name  # one term: both of its signs are as extreme
    scale = np.abs(moved).sum()

    def statistic(terms: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        # Sums that are equal but for the order of adding must count as equal.
        return np.round(terms.sum(axis=axis) / scale, 12)

    found = library("scipy.stats").permutation_test(
        (moved,), statistic, permutation_type="samples", vectorized=True, n_resamples=n_resamples,
        batch=max(1, CELLS // (2 * len(moved))), alternative="two-sided", axis=-1, rng=seed,
    )  # fmt: skip
    return float(found.pvalue), name


def _seed_flips(terms: NDArray[np.float64], test: str, *, n_resamples: int, seed: int) -> tuple[float, str]:
    if test not in ("auto", "permutation"):
        raise CloisterError(f"no test of seeds is called {test!r}", hint="auto, permutation or t")
    return _sign_flip(terms, n_resamples=n_resamples, seed=seed)


def _t_test(mean: float, error: float, freedom: float) -> tuple[float, str]:
    if error == 0:
        return float(mean == 0), "Student's t"
    return 2 * float(library("scipy.stats").t.sf(abs(mean) / error, freedom)), "Student's t"


def _seed_differences(
    ours: Sequence[float], peer: Sequence[float], metric: str, where: str = ""
) -> NDArray[np.float64]:
    if metric not in _SEED_METRICS:
        raise CloisterError(f"{metric!r} is no metric of runs", hint="one of " + ", ".join(_SEED_METRICS))
    if len(ours) != len(peer):
        raise DataError(f"{where}{len(ours)} seeds of one method and {len(peer)} of its peer")
    if len(ours) < 2:
        raise DataError(
            f"{where}{len(ours)} seed shows no spread: at least two are needed",
            hint="compare_pair compares one run with one run, over examples",
        )
    a, b = np.array(ours, dtype=np.float64), np.array(peer, dtype=np.float64)
    bad = ~np.isfinite(a) | ~np.isfinite(b) | ((metric == "perplexity") & ((a <= 0) | (b <= 0)))
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(f"{where}seed number {at}: {metric} of {a[at]:g} and {b[at]:g} cannot be compared")
    return np.log(b / a) if metric == "perplexity" else a - b


def _spread(moved: NDArray[np.float64]) -> float:
    """Standard deviation; 0 where all are equal but for rounding."""
    if np.ptp(moved) <= 1e-12 * np.abs(moved).max():
        return 0.0
    return float(moved.std(ddof=1))
