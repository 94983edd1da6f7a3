"""Scores to test on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cloister.evaluate import ExampleScores


@pytest.fixture(scope="session")
def make() -> Callable[..., ExampleScores]:
    """Scores of so many examples, called e0, e1, ..., of the clients a and b in turn."""

    def scores(
        values: Sequence[float], metric: str = "accuracy", weights: Sequence[float] | None = None
    ) -> ExampleScores:
        ids = tuple(f"e{i}" for i in range(len(values)))
        clients = tuple("ab"[i % 2] for i in range(len(values)))
        return ExampleScores(metric, np.array(values), ids, clients, None if weights is None else np.array(weights))

    return scores
