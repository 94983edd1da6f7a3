"""Exact LoRA: the mean of products, factored anew, against dense matrices; and FFA-LoRA, which needs none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import slow_aggregate as slow

from cloister.adapters import AdapterState, AdapterUpdate, LoraSpec, PrefixSpec, StateSpec
from cloister.federation import AggregationSpec, Aggregator
from cloister.federation import _aggregate_lora as lora

from ._seeded import Seeded

A, B, A2, B2, HEAD = "m.0.x.lora_A.weight", "m.0.x.lora_B.weight", "m.1.x.lora_A.weight", "m.1.x.lora_B.weight", "h"


def spec_of(rank: int, n_in: int, n_out: int, **more: Any) -> StateSpec:
    shapes = {A: (rank, n_in), B: (n_out, rank), A2: (rank, n_out), B2: (n_in, rank), HEAD: (3, n_in)}
    return StateSpec(LoraSpec(r=rank, alpha=6, **more), "sequence-classification", shapes, {})


def drawn(spec: StateSpec, seed: int, kind: type[AdapterState] = AdapterState) -> Any:
    rng = Seeded(seed)
    return kind(spec, {n: rng.normal(size=shape).astype(np.float32) for n, shape in spec.shapes.items()})


def one_round(folder: Path, start: AdapterState, updates: list[AdapterUpdate], *, exact: bool = True) -> Any:
    rule = AggregationSpec(max_norm=1e9, exact_lora=exact)
    ours = Aggregator(rule, start, min_clients=1, folder=folder)
    number = ours.begin([str(i) for i in range(len(updates))])
    for index, update in enumerate(updates):
        ours.add(str(index), index + 1, update.to_bytes(), round=number)
    return ours.finish()


def product(state: AdapterState, a: str, b: str) -> np.ndarray:
    return state.tensors[b].astype(np.float64) @ state.tensors[a].astype(np.float64)


SIZES = {
    "stacked": (2, 40, 50, 3),
    "dense": (2, 7, 5, 6),
    "dense-iterated": (2, 60, 50, 40),
    "rank-above-layer": (4, 3, 9, 3),
    "one-client": (3, 20, 30, 1),
}


@pytest.mark.parametrize(("rank", "n_in", "n_out", "n"), SIZES.values(), ids=SIZES)
def test_the_result_is_the_best_product_of_rank_r(tmp_path: Path, rank: int, n_in: int, n_out: int, n: int) -> None:
    spec = spec_of(rank, n_in, n_out)
    start, updates = drawn(spec, 0), [drawn(spec, seed, AdapterUpdate) for seed in range(1, n + 1)]
    result = one_round(tmp_path, start, updates)
    weighted = [(i + 1, dict(u.tensors)) for i, u in enumerate(updates)]
    errors, norms = [], []
    for a, b in ((A, B), (A2, B2)):
        mean = slow.mean_product(weighted, dict(start.tensors), a, b)
        best, error = slow.best_of_rank(mean, rank)
        np.testing.assert_allclose(product(result.state, a, b), best, atol=2e-5 * np.abs(best).max())
        errors.append(error)
        norms.append(np.linalg.norm(mean))
    assert result.residual == pytest.approx(6 / rank * np.hypot(*errors), rel=1e-5, abs=1e-4)
    assert result.residual_share == pytest.approx(np.hypot(*errors) / np.hypot(*norms), rel=1e-5, abs=1e-6)
    rest = slow.weighted_mean(weighted)[HEAD]
    np.testing.assert_allclose(result.state.tensors[HEAD], start.tensors[HEAD] + rest, atol=1e-5)


def test_the_plain_rule_gives_another_product(tmp_path: Path) -> None:
    spec = spec_of(2, 40, 50)
    start, updates = drawn(spec, 0), [drawn(spec, seed, AdapterUpdate) for seed in (1, 2)]
    exact, apart = (one_round(tmp_path, start, updates, exact=e).state for e in (True, False))
    mean = slow.mean_product([(i + 1, dict(u.tensors)) for i, u in enumerate(updates)], dict(start.tensors), A, B)
    errors = [np.linalg.norm(product(state, A, B) - mean) for state in (exact, apart)]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("n", [2, 30], ids=["stacked", "dense"])
def test_where_nothing_was_learned_every_direction_stays_open(tmp_path: Path, n: int) -> None:
    spec = spec_of(3, 40, 50)
    start = drawn(spec, 0)
    start = AdapterState(spec, {name: t * ("lora_B" not in name) for name, t in start.tensors.items()})
    zeros = AdapterUpdate(spec, {name: np.zeros(shape, np.float32) for name, shape in spec.shapes.items()})
    result = one_round(tmp_path, start, [zeros] * n)
    a = result.state.tensors[A].astype(np.float64)
    assert not result.state.tensors[B].any()
    assert np.linalg.matrix_rank(a) == 3
    length = np.sqrt(np.mean(np.sum(start.tensors[A].astype(np.float64) ** 2, axis=1)))
    np.testing.assert_allclose(a @ a.T, length**2 * np.eye(3), atol=1e-4)
    assert (result.residual, result.residual_share) == (0, 0)


def test_an_a_of_zeros_starts_at_length_one(tmp_path: Path) -> None:
    spec = spec_of(2, 40, 50)
    start = AdapterState(spec, {name: np.zeros(shape, np.float32) for name, shape in spec.shapes.items()})
    result = one_round(tmp_path, start, [drawn(spec, 1, AdapterUpdate)])
    np.testing.assert_allclose(np.linalg.norm(result.state.tensors[A], axis=1), 1, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.permutations(range(4)))
def test_the_order_of_clients_does_not_matter(seed: int, rank: int, order: list[int]) -> None:
    rng = Seeded(seed)
    a, b = rng.normal(size=(rank, 30)), rng.normal(size=(50, rank))
    updates = [(0.1 * rng.normal(size=a.shape), 0.1 * rng.normal(size=b.shape)) for _ in range(4)]
    weights = rng.random(4)
    weights /= weights.sum()
    ways = [range(4), order]
    found = []
    for way in ways:
        chosen = [updates[i] for i in way]
        new_a, new_b, residual, _ = lora.refactor(
            lora.LoraProducts(a, b, weights[list(way)], lambda chosen=chosen: iter(chosen))
        )
        found.append((new_b @ new_a, residual))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-8)
    assert found[0][1] == pytest.approx(found[1][1])


def test_stack_and_matrix_give_the_same() -> None:
    rng = Seeded(5)
    a, b = rng.normal(size=(3, 80)), rng.normal(size=(70, 3))
    updates = [(rng.normal(size=a.shape), rng.normal(size=b.shape)) for _ in range(4)]
    products = lora.LoraProducts(a, b, np.full(4, 0.25), lambda: iter(updates))
    stack, dense = lora._of_stack(products, 3), lora._of_dense(products, 3)
    np.testing.assert_allclose(stack[1], dense[1], rtol=1e-9)
    assert stack[3:] == pytest.approx(dense[3:])


def iterated(monkeypatch: pytest.MonkeyPatch, restarts: int = 10) -> None:
    """Small enough to compare, and still by subspaces."""
    monkeypatch.setattr(lora, "_SMALL", 0)
    monkeypatch.setattr(lora, "_OVERSAMPLING", 1)
    monkeypatch.setattr(lora, "_DEPTH", 3)
    monkeypatch.setattr(lora, "_MAX_RESTARTS", restarts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drift", [1e-3, 1.0], ids=["alike", "apart"])
def test_subspaces_find_what_an_svd_finds(monkeypatch: pytest.MonkeyPatch, seed: int, drift: float) -> None:
    iterated(monkeypatch)
    rng = Seeded(seed)
    a, b = rng.normal(size=(2, 60)), rng.normal(size=(50, 2))
    updates = [(drift * rng.normal(size=a.shape), drift * rng.normal(size=b.shape)) for _ in range(40)]
    products = lora.LoraProducts(a, b, np.full(40, 1 / 40), lambda: iter(updates))
    best, error = slow.best_of_rank(lora._sum(products), 2)
    new_a, new_b, residual, _ = lora.refactor(products)
    np.testing.assert_allclose(new_b @ new_a, best, atol=1e-4 * np.abs(best).max())
    assert residual == pytest.approx(error, rel=1e-6, abs=1e-7)


def test_without_a_gap_any_product_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    iterated(monkeypatch)
    # The identity: all singular values are the same, so any product of rank 1 is as good as any other.
    updates = [(np.eye(60)[i : i + 1], 60 * np.eye(60)[:, i : i + 1]) for i in range(60)]
    products = lora.LoraProducts(np.zeros((1, 60)), np.zeros((60, 1)), np.full(60, 1 / 60), lambda: iter(updates))
    new_a, new_b, residual, norm = lora.refactor(products)
    assert residual == pytest.approx(np.linalg.norm(np.eye(60) - new_b @ new_a), rel=1e-6)
    assert residual == pytest.approx(np.sqrt(59))
    assert norm == pytest.approx(np.sqrt(60))


def test_what_has_not_settled_tells_its_own_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    iterated(monkeypatch, restarts=2)
    monkeypatch.setattr(lora, "_DEPTH", 1)
    rng = Seeded(3)
    updates = [(rng.normal(size=(2, 60)), rng.normal(size=(60, 2))) for _ in range(40)]
    products = lora.LoraProducts(np.zeros((2, 60)), np.zeros((60, 2)), np.full(40, 1 / 40), lambda: iter(updates))
    matrix = lora._sum(products)
    new_a, new_b, residual, _ = lora.refactor(products)
    assert residual == pytest.approx(np.linalg.norm(matrix - new_b @ new_a), rel=1e-6)
    assert residual > slow.best_of_rank(matrix, 2)[1]


def test_subspaces_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    iterated(monkeypatch)
    products = lora.LoraProducts(np.ones((2, 60)), np.zeros((60, 2)), np.ones(40) / 40, lambda: iter(nothing()))
    new_a, new_b, residual, norm = lora.refactor(products)
    assert not new_b.any()
    assert np.linalg.matrix_rank(new_a) == 2
    assert (residual, norm) == (0, 0)


def nothing() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.zeros((2, 60)), np.zeros((60, 2)))] * 40


def test_with_a_frozen_a_the_mean_of_b_is_exact(tmp_path: Path) -> None:
    spec = StateSpec(LoraSpec(r=2, freeze_a=True), "causal-lm", {B: (50, 2)}, {A: (2, 40)}, 7)
    start, updates = drawn(spec, 0), [drawn(spec, seed, AdapterUpdate) for seed in (1, 2, 3)]
    result = one_round(tmp_path, start, updates)
    a = Seeded(9).normal(size=(2, 40))
    mean = sum((i + 1) / 6 * (start.tensors[B] + u.tensors[B]) @ a for i, u in enumerate(updates))
    np.testing.assert_allclose(result.state.tensors[B] @ a, mean, atol=1e-5)
    assert result.residual == 0


def test_a_prefix_has_no_products(tmp_path: Path) -> None:
    spec = StateSpec(PrefixSpec(2), "causal-lm", {"prompt_encoder.embedding.weight": (2, 8)}, {})
    result = one_round(tmp_path, drawn(spec, 0), [drawn(spec, 1, AdapterUpdate)])
    assert result.residual == 0
