"""One figure for each example, with whose example it is: what every interval and paired test is computed from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloister.errors import DataError

METRICS = ("accuracy", "exact_match", "perplexity", "rouge_l")
_MOST_LOSS = 700.0  # nats; beyond 709 a float overflows, and such a model is equally useless


@dataclass(frozen=True, eq=False)
class ExampleScores:
    """How one model did on each example of a split. *public*, as metrics are: no text, no label.

    Attributes:
        metric: "accuracy", "exact_match", "rouge_l" or "perplexity".
        values: float64 [n], read-only. 0 or 1 (accuracy, exact match; between them in a `seed_mean`), the ROUGE-L F1
            from 0 to 1, or for perplexity the summed negative log likelihood of the example's target tokens, in nats.
        ids: [n], what the example is called; two models are paired by it.
        clients: [n], whose example it is.
        weights: float64 [n], read-only: the target tokens of each example, for perplexity only.

    Raises:
        DataError: no example, lengths that differ, an id that comes twice, a figure that is NaN or out of range.
    """

    metric: str
    values: NDArray[np.float64] = field(repr=False)
    ids: tuple[str, ...] = field(repr=False)
    clients: tuple[str, ...] = field(repr=False)
    weights: NDArray[np.float64] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise DataError(f"{self.metric!r} is no metric of examples", hint="one of " + ", ".join(METRICS))
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "clients", tuple(self.clients))
        object.__setattr__(self, "values", column(self.values, f"{self.metric}: the figures"))
        if self.weights is not None:
            object.__setattr__(self, "weights", column(self.weights, f"{self.metric}: the token counts"))
        self._check_shape()
        self._check_range()

    def _check_shape(self) -> None:
        if self.n == 0:
            raise DataError(f"{self.metric}: the split is empty, there is no example to score")
        lengths = {"ids": len(self.ids), "clients": len(self.clients)}
        if self.weights is not None:
            lengths["token counts"] = len(self.weights)
        for name, length in lengths.items():
            if length != self.n:
                raise DataError(f"{self.metric}: {self.n} figures and {length} {name}")
        (first, count), *_ = Counter(self.ids).most_common(1)
        if count > 1:
            raise DataError(f"{self.metric}: example {first!r} comes {count} times", hint="ids must be unique")

    def _check_range(self) -> None:
        self._refuse(~np.isfinite(self.values), "is not a finite number")
        if (self.metric == "perplexity") != (self.weights is not None):
            raise DataError(f"{self.metric}: token counts go with perplexity, and with no other metric")
        if self.weights is None:
            self._refuse((self.values < 0) | (self.values > 1), "is not between 0 and 1")
            return
        self._refuse(self.values < 0, "is a negative log likelihood below 0")
        self._refuse(~np.isfinite(self.weights) | (self.weights <= 0), "has no target token")

    def _refuse(self, bad: NDArray[np.bool_], why: str) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            raise DataError(f"{self.metric}: example {self.ids[at]!r} {why} ({self.values[at]:g})")

    @property
    def n(self) -> int:
        """How many examples."""
        return len(self.values)

    @property
    def higher_is_better(self) -> bool:
        """True but for perplexity."""
        return self.metric != "perplexity"

    @property
    def overall(self) -> float:
        """The metric over all examples: their mean, or exp(sum of log likelihoods / sum of tokens)."""
        return figure_of(float(mean_of(*self.columns)), self.metric)

    @property
    def columns(self) -> tuple[NDArray[np.float64], ...]:
        """What `mean_of` takes."""
        return (self.values,) if self.weights is None else (self.values, self.weights)

    def per_client(self) -> dict[str, float]:
        """The metric on each client's own examples, by name; only clients that have some."""
        return {client: self.of_client(client).overall for client in sorted(set(self.clients))}

    def of_client(self, client: str) -> ExampleScores:
        """One client's examples.

        Raises:
            DataError: it has none.
        """
        rows = [i for i, owner in enumerate(self.clients) if owner == client]
        if not rows:
            raise DataError(f"{self.metric}: client {client!r} has no example")
        return self.rows(rows)

    def rows(self, rows: Sequence[int]) -> ExampleScores:
        """The examples at these places, in this order."""
        return ExampleScores(
            self.metric,
            self.values[list(rows)],
            tuple(self.ids[i] for i in rows),
            tuple(self.clients[i] for i in rows),
            None if self.weights is None else self.weights[list(rows)],
        )


def mean_of(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None, *, axis: int = -1) -> NDArray:
    """Mean of the values; with weights the sum of the values over that of the weights."""
    return values.mean(axis=axis) if weights is None else values.sum(axis=axis) / weights.sum(axis=axis)


def figure_of(mean: float, metric: str) -> float:
    """The metric from the mean over examples or tokens."""
    return math.exp(min(mean, _MOST_LOSS)) if metric == "perplexity" else mean


def matched(ours: ExampleScores, peer: ExampleScores) -> ExampleScores:
    """The peer's figures in the order of ours.

    Raises:
        DataError: another metric, an example that only one of them has, or one with another count of target tokens.
    """
    if ours.metric != peer.metric:
        raise DataError(f"{ours.metric} and {peer.metric} cannot be paired", hint="score both models by one metric")
    place = {name: i for i, name in enumerate(peer.ids)}
    for name in ours.ids:
        if name not in place:
            raise DataError(f"{ours.metric}: example {name!r} was scored for one model and not for its peer")
    if peer.n != ours.n:
        extra = next(name for name in peer.ids if name not in set(ours.ids))
        raise DataError(f"{ours.metric}: example {extra!r} was scored for the peer only")
    found = peer.rows([place[name] for name in ours.ids])
    if ours.weights is not None and found.weights is not None and (ours.weights != found.weights).any():
        at = int(np.argmax(ours.weights != found.weights))
        raise DataError(
            f"perplexity: example {ours.ids[at]!r} has {ours.weights[at]:g} target tokens for one model and"
            f" {found.weights[at]:g} for its peer",
            hint="perplexities compare only under one tokeniser and one truncation",
        )
    return found


def seed_mean(runs: Sequence[ExampleScores]) -> ExampleScores:
    """The mean of several runs on the same examples (one method, several seeds), example by example.

    For perplexity that is the mean log likelihood, so `overall` is the geometric mean of the runs' perplexities.

    Raises:
        DataError: no run, or runs that `compare_pair` would not pair.
    """
    if not runs:
        raise DataError("no run to take the mean of")
    first = runs[0]
    values = np.mean([first.values, *(matched(first, run).values for run in runs[1:])], axis=0)
    return ExampleScores(first.metric, values, first.ids, first.clients, first.weights)


def column(values: object, what: str) -> NDArray[np.float64]:
    """A read-only copy as float64 [n].

    Raises:
        DataError: no list of numbers.
    """
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{what} are no list of numbers") from None
    if found.ndim != 1:
        raise DataError(f"{what} have {found.ndim} dimensions in place of one")
    found.setflags(write=False)
    return found
