"""Figures by example: what they add up to, how they are paired, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cloister.errors import DataError
from cloister.evaluate import ExampleScores, compare_pair, seed_mean


def test_accuracy_is_the_mean_and_each_client_has_its_own(make):
    scores = make([1, 0, 1, 1, 1])
    assert scores.n == 5
    assert scores.higher_is_better
    assert scores.overall == pytest.approx(0.8)
    assert scores.per_client() == {"a": 1.0, "b": pytest.approx(0.5)}
    assert scores.of_client("b").ids == ("e1", "e3")


def test_perplexity_weighs_examples_by_their_tokens(make):
    scores = make([10.0, 2.0, 6.0], "perplexity", [5, 1, 2])
    assert not scores.higher_is_better
    assert scores.overall == pytest.approx(math.exp(18 / 8))
    assert scores.per_client() == {"a": pytest.approx(math.exp(16 / 7)), "b": pytest.approx(math.exp(2.0))}


def test_a_useless_model_has_a_finite_perplexity(make):
    assert math.isfinite(make([1e6], "perplexity", [1]).overall)


def test_arrays_are_copies_that_cannot_be_changed():
    mine = np.array([1.0, 0.0])
    scores = ExampleScores("accuracy", mine, ("x", "y"), ("a", "a"))
    mine[0] = 0
    assert scores.overall == 0.5
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0] = 0


def test_repr_names_no_example(make):
    assert "e0" not in repr(make([1, 0]))


def test_mean_over_seeds_is_by_example_whatever_their_order(make):
    first, second = make([1, 0, 1]), make([0, 0, 1])
    assert seed_mean([first, second.rows([2, 0, 1])]).values.tolist() == [0.5, 0, 1]
    assert seed_mean([first]).values.tolist() == first.values.tolist()


def test_mean_over_seeds_of_perplexity_is_geometric(make):
    runs = [make([4.0, 6.0], "perplexity", [2, 2]), make([8.0, 2.0], "perplexity", [2, 2])]
    assert seed_mean(runs).overall == pytest.approx(math.sqrt(runs[0].overall * runs[1].overall))


@pytest.mark.parametrize(
    ("metric", "values", "ids", "clients", "weights", "why"),
    [
        ("accuracy", [], (), (), None, "the split is empty"),
        ("accuracy", [1], ("x", "y"), ("a",), None, "1 figures and 2 ids"),
        ("accuracy", [1], ("x",), (), None, "1 figures and 0 clients"),
        ("perplexity", [1], ("x",), ("a",), [1, 2], "1 figures and 2 token counts"),
        ("accuracy", [1, 0], ("x", "x"), ("a", "a"), None, "example 'x' comes 2 times"),
        ("accuracy", [1, math.nan], ("x", "y"), ("a", "a"), None, "example 'y' is not a finite number"),
        ("rouge_l", [1.5], ("x",), ("a",), None, "example 'x' is not between 0 and 1"),
        ("perplexity", [-1], ("x",), ("a",), [1], "negative log likelihood below 0"),
        ("perplexity", [math.inf], ("x",), ("a",), [1], "not a finite number"),
        ("perplexity", [1], ("x",), ("a",), [0], "has no target token"),
        ("perplexity", [1], ("x",), ("a",), [math.nan], "has no target token"),
        ("perplexity", [1], ("x",), ("a",), None, "token counts go with perplexity"),
        ("accuracy", [1], ("x",), ("a",), [1], "token counts go with perplexity"),
        ("loss", [1], ("x",), ("a",), None, "'loss' is no metric"),
        ("accuracy", ["one"], ("x",), ("a",), None, "no list of numbers"),
        ("accuracy", [[1, 0]], ("x",), ("a",), None, "2 dimensions"),
    ],
)
def test_what_is_refused(metric, values, ids, clients, weights, why):
    with pytest.raises(DataError, match=why):
        ExampleScores(metric, values, ids, clients, weights)


def test_a_client_without_examples_is_refused(make):
    with pytest.raises(DataError, match="client 'c' has no example"):
        make([1, 0]).of_client("c")


def test_no_run_has_no_mean():
    with pytest.raises(DataError, match="no run"):
        seed_mean([])


@pytest.mark.parametrize("combine", [compare_pair, lambda a, b: seed_mean([a, b])], ids=["compare_pair", "seed_mean"])
def test_other_examples_are_refused_by_name(make, combine):
    ours = make([1, 0, 1])
    renamed = ExampleScores("accuracy", ours.values, ("e0", "f1", "f2"), ours.clients)
    with pytest.raises(DataError, match="'e1' was scored for one model and not for its peer"):
        combine(ours, renamed)
    with pytest.raises(DataError, match="'e2' was scored for the peer only"):
        combine(ours.rows([0, 1]), ours)
    with pytest.raises(DataError, match="accuracy and rouge_l cannot be paired"):
        combine(ours, make([1, 0, 1], "rouge_l"))


def test_another_tokeniser_is_refused(make):
    with pytest.raises(DataError, match=r"'e1' has 3 target tokens for one model and 4"):
        compare_pair(make([1, 2], "perplexity", [2, 3]), make([1, 2], "perplexity", [2, 4]))
