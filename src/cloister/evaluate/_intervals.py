"""Intervals by resampling examples, or by Student's t over seeds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.errors import CloisterError
from cloister.evaluate._libraries import library
from cloister.evaluate._scores import ExampleScores, figure_of, mean_of

N_RESAMPLES = 10_000
CELLS = 2_000_000  # numbers resampled at a time, so that memory stays small: 16 MB an array
# BCa leaves out each example once, which is n^2 work; its correction falls as 1/sqrt(n).
_MOST_FOR_BCA = 20_000


@dataclass(frozen=True)
class Interval:
    """A figure and between which bounds it lies. *public*.

    Attributes:
        value: the figure itself.
        low, high: bounds at the confidence asked for.
        method: how they were found; "point: ..." where the data has no spread to resample.
    """

    value: float
    low: float
    high: float
    method: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def interval(
    scores: ExampleScores, *, confidence: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Interval:
    """The metric over all examples with a bootstrap interval: what another draw of as many examples would give.

    Bias-corrected and accelerated (BCa; Efron and Tibshirani, 1993, section 14.3), by scipy. Where that is not defined
    or the split is above 20,000 examples, plain percentiles, and `method` says so. Figures that are all equal give a
    point: the sample has no spread, which does not make it certain.

    Raises:
        CloisterError: scipy is missing, confidence is not between 0 and 1, or less than 100 resamples.
    """
    found = resampled(scores.columns, confidence=confidence, n_resamples=n_resamples, seed=seed)
    # Perplexity is resampled as the mean log likelihood: exp is monotone, so it takes the bounds along.
    value, low, high = (figure_of(mean, scores.metric) for mean in (found.value, found.low, found.high))
    return Interval(value, low, high, found.method)


def resampled(columns: Sequence[NDArray[np.float64]], *, confidence: float, n_resamples: int, seed: int) -> Interval:
    """`mean_of(*columns)` with a bootstrap interval; examples (rows) are resampled, so columns stay paired."""
    check_resampling(confidence, n_resamples)
    n = len(columns[0])
    value = float(mean_of(*columns))
    if np.ptp(columns[0] if len(columns) == 1 else columns[0] / columns[1]) == 0:
        return Interval(value, value, value, f"point: {n} equal figures" if n > 1 else "point: one example")
    stats = library("scipy.stats")

    def run(method: str, **more: Any) -> Any:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # seen below, as NaN
            return stats.bootstrap(
                columns, mean_of, paired=True, vectorized=True, confidence_level=confidence, method=method,
                batch=max(1, CELLS // n), axis=-1, **more,
            )  # fmt: skip

    method = "BCa" if n <= _MOST_FOR_BCA else "percentile"
    found = run(method, n_resamples=n_resamples, rng=seed)
    if not np.isfinite(found.confidence_interval).all():
        method = "percentile (BCa is not defined)"
        found = run("percentile", n_resamples=0, bootstrap_result=found)
    low, high = (float(bound) for bound in found.confidence_interval)
    return Interval(value, low, high, f"bootstrap, {method}")


def t_interval(value: float, standard_error: float, freedom: float, *, confidence: float) -> Interval:
    """value +- t * standard error, with so many degrees of freedom."""
    check_resampling(confidence, N_RESAMPLES)
    if standard_error == 0:
        return Interval(value, value, value, "point: no spread over seeds")
    reach = float(library("scipy.stats").t.ppf((1 + confidence) / 2, freedom)) * standard_error
    return Interval(value, value - reach, value + reach, f"Student's t, {freedom:.3g} degrees of freedom")


def check_resampling(confidence: float, n_resamples: int) -> None:
    """Refuses what makes no interval."""
    if not 0 < confidence < 1:
        raise CloisterError(f"confidence must be between 0 and 1, not {confidence}", hint="0.95 is the usual one")
    if n_resamples < 100:
        raise CloisterError(f"{n_resamples} resamples make no interval", hint=f"{N_RESAMPLES} are the default")
