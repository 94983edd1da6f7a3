"""Methods side by side on one split: figure, interval, difference to a reference, corrected p-value, effect."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloister.errors import DataError
from cloister.evaluate._intervals import N_RESAMPLES, Interval, interval
from cloister.evaluate._pairs import Correction, PairMethod, PairTest, compare_pair, holm
from cloister.evaluate._scores import ExampleScores, seed_mean

_COLUMNS = (
    "method", "metric", "n", "n_seeds", "value", "low", "high", "difference", "difference_low", "difference_high",
    "unit", "p_value", "p_corrected", "test", "effect", "effect_name",
)  # fmt: skip


@dataclass(frozen=True)
class ComparisonRow:
    """One method. *public*.

    Attributes:
        method: its name.
        n: examples.
        n_seeds: runs whose examples were averaged.
        figure: the metric over all examples, with its interval.
        per_client: the metric on each client's own examples.
        pair: this method (ours) against the reference (the peer); None in the reference's own row.
        p_corrected: the pair's p-value, corrected over all rows; None in the reference's own row.
    """

    method: str
    n: int
    n_seeds: int
    figure: Interval
    per_client: dict[str, float]
    pair: PairTest | None
    p_corrected: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method,
            "n": self.n,
            "n_seeds": self.n_seeds,
            "figure": self.figure.as_dict(),
            "per_client": dict(self.per_client),
            "pair": None if self.pair is None else self.pair.as_dict(),
            "p_corrected": self.p_corrected,
        }


@dataclass(frozen=True)
class ComparisonTable:
    """Methods on one split; `docs/evaluate.md` says how to read it. *public*.

    Attributes:
        metric: what all rows are measured by.
        reference: the method that the others are compared with.
        confidence: of every interval; those of differences are not corrected for how many there are.
        correction: of the p-values.
        rows: in the order given.
    """

    metric: str
    reference: str
    confidence: float
    correction: str
    rows: tuple[ComparisonRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.metric,
            "reference": self.reference,
            "confidence": self.confidence,
            "correction": self.correction,
            "rows": [row.as_dict() for row in self.rows],
        }

    def to_csv(self) -> str:
        """One line a method under a line of names; what a row does not have is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(self._cells(row) for row in self.rows)
        return text.getvalue()

    def _cells(self, row: ComparisonRow) -> list[object]:
        figure, pair = row.figure, row.pair
        own: list[object] = [row.method, self.metric, row.n, row.n_seeds, figure.value, figure.low, figure.high]
        if pair is None:
            return own + [""] * (len(_COLUMNS) - len(own))
        return [
            *own, pair.difference, pair.low, pair.high, pair.unit, pair.p_value, row.p_corrected, pair.test,
            pair.effect, pair.effect_name,
        ]  # fmt: skip

    def to_markdown(self) -> str:
        """A table for people, with what its columns mean below it."""
        unit = "ln(reference / method)" if self.metric == "perplexity" else "difference"
        lines = [
            f"| method | {self.metric} | {unit} to {_escaped(self.reference)} | p | p corrected | effect |",
            "|---|---|---|---|---|---|",
            *(self._line(row) for row in self.rows),
            "",
            f"In brackets: {100 * self.confidence:g} % intervals. A positive difference is in the method's favour.",
        ]
        pairs = [row.pair for row in self.rows if row.pair is not None]
        if pairs:
            tests = "; ".join(sorted({pair.test for pair in pairs}))
            effects = "; ".join(sorted({pair.effect_name for pair in pairs}))
            lines.append(f"p by {tests}; corrected by {self.correction}. Effect: {effects}.")
        return "\n".join(lines) + "\n"

    def _line(self, row: ComparisonRow) -> str:
        digits = 2 if self.metric == "perplexity" else 3
        figure = f"{row.figure.value:.{digits}f} [{row.figure.low:.{digits}f}, {row.figure.high:.{digits}f}]"
        if row.pair is None or row.p_corrected is None:
            return f"| {_escaped(row.method)} | {figure} | | | | |"
        pair = row.pair
        difference = f"{pair.difference:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]"
        shown = f"{_p(pair.p_value)} | {_p(row.p_corrected)} | {pair.effect:.3g}"
        return f"| {_escaped(row.method)} | {figure} | {difference} | {shown} |"


def comparison_table(
    scores: Mapping[str, ExampleScores | Sequence[ExampleScores]],
    *,
    reference: str,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    test: PairMethod = "auto",
    correction: Correction = "holm",
) -> ComparisonTable:
    """Every method beside the others, and each against one reference on the same examples.

    Args:
        scores: by method, its figures on the split; of several runs (seeds) one each, which `seed_mean` joins.
        reference: one of the methods.
        confidence: of the intervals.
        n_resamples: of every bootstrap and permutation test.
        seed: of every resampling.
        test: as `compare_pair` has it; "auto" decides for each pair.
        correction: as `holm` has it, over all rows but the reference.

    Raises:
        DataError: the reference is not among the methods, or the methods were not scored on the same examples.
        CloisterError: see `compare_pair`.
    """
    if reference not in scores:
        raise DataError(f"the reference {reference!r} is not among the methods", hint=", ".join(scores) or "none given")
    runs = {name: [each] if isinstance(each, ExampleScores) else list(each) for name, each in scores.items()}
    means = {name: each[0] if len(each) == 1 else seed_mean(each) for name, each in runs.items()}
    found = {
        name: compare_pair(
            mean, means[reference], confidence=confidence, seed=seed, n_resamples=n_resamples, test=test
        )
        for name, mean in means.items()
        if name != reference
    }  # fmt: skip
    corrected = dict(zip(found, holm([pair.p_value for pair in found.values()], method=correction), strict=True))
    rows = [
        ComparisonRow(
            name, mean.n, len(runs[name]), interval(mean, confidence=confidence, n_resamples=n_resamples, seed=seed),
            mean.per_client(), found.get(name), corrected.get(name),
        )
        for name, mean in means.items()
    ]  # fmt: skip
    return ComparisonTable(means[reference].metric, reference, confidence, correction, tuple(rows))


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
