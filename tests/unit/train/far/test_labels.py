"""Classes that are missing at one client, or in everybody's training data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloister.train import (
    FarTrainer,
    Feature,
    FeatureSource,
    MemoryFeatures,
    TrainSpec,
    evaluate,
    linear_head_baseline,
    majority_baseline,
)

LABELS = st.lists(st.integers(0, 3), max_size=5)


def features(labels: list[int]) -> list[Feature]:
    return [Feature(i, torch.zeros(1, 2), label=label) for i, label in enumerate(labels)]


def source(parts: dict[str, tuple[list[int], list[int]]]) -> MemoryFeatures:
    return MemoryFeatures({c: {"train": features(train), "test": features(test)} for c, (train, test) in parts.items()})


@given(st.dictionaries(st.sampled_from("abc"), st.tuples(LABELS, LABELS), min_size=1))
def test_clients_with_a_class_that_nobody_trains_on(parts):
    seen = {label for train, _ in parts.values() for label in train}
    expected = sorted(c for c, (_, test) in parts.items() if set(test) - seen)
    assert source(parts).clients_with_unseen_labels() == expected


def test_a_class_that_another_client_trains_on_is_seen():
    assert source({"a": ([0], [0, 1]), "b": ([1], [])}).clients_with_unseen_labels() == []
    assert source({"a": ([0], [0, 1]), "b": ([1], [])}).only("a").clients_with_unseen_labels() == ["a"]


def test_a_class_of_which_every_example_is_held_out_is_unseen():
    divided = source({"a": ([0] * 9 + [1], [1])})
    held = next(
        divided.hold_out(0.1, s) for s in range(100) if divided.hold_out(0.1, s).split("held-out")[0].index == 9
    )
    assert held.clients_with_unseen_labels() == ["a"]


def test_causal_lm_has_no_classes(make_job):
    job = make_job("llama", "causal-lm")
    assert job.source().clients_with_unseen_labels() == []
    assert {job.source().label(key) for key in job.source().split("train")} == {None}


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_labels_are_known_without_opening_an_example(make_job, tmp_path, task, budget):
    job = make_job("llama" if task == "causal-lm" else "bert", task)
    parts = [(job.seal(tmp_path, client), tmp_path) for client in job.tokens]
    opened = FeatureSource(parts, task=job.task, memory_budget_bytes=budget)
    for path in tmp_path.iterdir():
        path.unlink()
    plain = job.source()
    for key in (*opened.split("train"), *opened.split("test")):
        assert opened.label(key) == plain.get(key).label
    opened.close()


def test_a_class_missing_at_one_client_trains_and_is_measured(make_job, lora):
    """East has one class only, and nobody has the third."""
    job = make_job()
    parts = {
        client: {
            split: [f for f in job.features(client, split) if f.label == 0 or (f.label == 1 and client != "east")]
            for split in ("train", "test")
        }
        for client in job.tokens
    }
    few = MemoryFeatures(parts)
    far = job.far()
    FarTrainer(far, TrainSpec(epochs=1, batch_size=4), lora, job.task, few).train()
    found = evaluate(far, few, job.task)
    assert found.per_client.keys() == {key.client for key in few.split("test")}
    assert 0 <= found.extra["macro_f1"] <= 1
    assert majority_baseline(few, job.task)["value"] <= 1
    assert linear_head_baseline(job.far(), few, job.task)["value"] <= 1
