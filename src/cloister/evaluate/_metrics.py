"""Figures of classification and of perplexity, by example; macro F1, which is no mean over examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cloister.errors import DataError
from cloister.evaluate._libraries import library
from cloister.evaluate._scores import ExampleScores, column

Label = int | str
Labels = Sequence[int] | Sequence[str] | NDArray[np.int64]


def classification_scores(
    labels: Labels, predicted: Labels, *, ids: Sequence[str], clients: Sequence[str]
) -> ExampleScores:
    """Accuracy by example: 1 where the prediction is the label. Labels are *secret* of their client.

    Args:
        labels: [n], numbers or names of classes.
        predicted: [n], of the same kind.
        ids: [n], what each example is called.
        clients: [n], whose it is.

    Raises:
        DataError: an empty split, lengths that differ, numbers on one side and names on the other, or neither.
    """
    truth, guesses = _both(labels, predicted)
    hits = np.array([a == b for a, b in zip(truth, guesses, strict=True)], dtype=np.float64)
    return ExampleScores("accuracy", hits, tuple(ids), tuple(clients))


def macro_f1(labels: Labels, predicted: Labels) -> float:
    """Mean F1 over the classes that occur among labels or predictions (scikit-learn's, undefined ones 0).

    Raises:
        DataError: see `classification_scores`; or all labels are of one class, where macro F1 says nothing.
    """
    truth, _ = _both(labels, predicted)
    if len(set(truth)) == 1:
        raise DataError(
            f"all {len(truth)} labels are of one class: macro F1 needs examples of two",
            hint="report accuracy there, or macro F1 over all clients",
        )
    return float(np.mean([row["f1"] for row in f1_report(labels, predicted).values()]))


def f1_report(labels: Labels, predicted: Labels) -> dict[Label, dict[str, float]]:
    """By class that occurs: `precision`, `recall`, `f1` (scikit-learn's, undefined ones 0) and `n`, its examples.

    Raises:
        DataError: see `classification_scores`.
    """
    truth, guesses = _both(labels, predicted)
    classes = sorted({*truth, *guesses}, key=lambda label: (str(type(label)), label))
    found = library("sklearn.metrics").precision_recall_fscore_support(
        truth, guesses, labels=classes, average=None, zero_division=0.0
    )
    return {
        label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "n": int(n)}
        for label, precision, recall, f1, n in zip(classes, *found, strict=True)
    }


def perplexity_scores(
    nll_sums: Iterable[float], n_tokens: Iterable[float], *, ids: Sequence[str], clients: Sequence[str]
) -> ExampleScores:
    """Perplexity from each example's summed negative log likelihood.

    Args:
        nll_sums: [n], over the example's target tokens, in nats.
        n_tokens: [n], how many target tokens that are, at least 1.
        ids: [n], what each example is called.
        clients: [n], whose it is.

    Raises:
        DataError: an empty split, lengths that differ, a sum that is NaN or negative, an example without a token.
    """
    sums, counts = column(list(nll_sums), "perplexity: the sums"), column(list(n_tokens), "perplexity: the counts")
    return ExampleScores("perplexity", sums, tuple(ids), tuple(clients), counts)


def _both(labels: Labels, predicted: Labels) -> tuple[list[Label], list[Label]]:
    truth, guesses = _labels(labels, "labels"), _labels(predicted, "predictions")
    if len(truth) != len(guesses):
        raise DataError(f"{len(truth)} labels and {len(guesses)} predictions")
    if not truth:
        raise DataError("the split is empty, there is no label to score")
    if isinstance(truth[0], str) != isinstance(guesses[0], str):
        raise DataError("labels and predictions must be both numbers of classes, or both names")
    return truth, guesses


def _labels(values: Labels, what: str) -> list[Label]:
    # Of an array Python's own numbers; any other kind would compare unequal to every class without a word.
    found: list[Label] = [v.item() if isinstance(v, np.generic) else v for v in values]
    kinds = {"a name" if isinstance(v, str) else "a number" if isinstance(v, int) else type(v).__name__ for v in found}
    if len(kinds) > 1 or not kinds <= {"a name", "a number"}:
        raise DataError(f"{what} must be all numbers or all names of classes: there is {' and '.join(sorted(kinds))}")
    return found
