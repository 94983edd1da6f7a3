"""The models that the tuned one is compared with."""

from __future__ import annotations

import pytest
import torch

from cloister.errors import ConfigError, DataError
from cloister.train import (
    Feature,
    MemoryFeatures,
    TaskSpec,
    TrainSpec,
    alone_baseline,
    evaluate,
    linear_head_baseline,
    majority_baseline,
)  # fmt: skip
from cloister.train._baselines import _fit
from cloister.train._far import FarTrainer

TASK = TaskSpec("sequence-classification", ("a", "b", "c"))


class PooledOnly(torch.nn.Module):
    """A far side whose pooled feature is the mean boundary vector."""

    def pooled(self, hidden, mask):
        return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def clusters(n: int, seed: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(3, 8) * 3
    made = []
    for i in range(n):
        label = i % 3
        n_tokens = 1 + i % 4
        hidden = centres[label] + torch.randn(n_tokens, 8, generator=generator) * spread
        made.append(Feature(i, hidden, label=label))
    return made


def two_clients(spread: float) -> MemoryFeatures:
    return MemoryFeatures(
        {
            "a": {"train": clusters(60, 1, spread), "test": clusters(30, 2, spread)},
            "b": {"train": clusters(45, 3, spread), "test": clusters(15, 4, spread)},
        }
    )


def test_majority_is_of_training_and_ties_go_to_the_lower_index():
    hidden = torch.zeros(1, 8)

    def features(*labels):
        return [Feature(i, hidden, label=label) for i, label in enumerate(labels)]

    source = MemoryFeatures({"x": {"train": features(2, 1, 2, 1), "test": features(1, 2)}, "y": {"test": features(1)}})
    found = majority_baseline(source, TASK)
    assert found["label"] == "b"
    assert found["value"] == pytest.approx(2 / 3)
    assert found["per_client"] == {"x": 0.5, "y": 1.0}
    assert found["n"] == {"x": 2, "y": 1}
    assert found["name"] == "accuracy"


def test_linear_head_solves_what_is_linear_and_not_what_is_noise():
    found = linear_head_baseline(PooledOnly(), two_clients(0.3), TASK, seed=1)
    assert found["value"] == 1.0
    assert found["per_client"] == {"a": 1.0, "b": 1.0}
    noisy = linear_head_baseline(PooledOnly(), two_clients(100.0), TASK, seed=1)
    assert noisy["value"] < 0.6
    assert noisy == linear_head_baseline(PooledOnly(), two_clients(100.0), TASK, seed=1)


def test_fit_is_at_the_minimum():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 6, generator=generator).double(), torch.randint(0, 3, (80,), generator=generator)
    weight, bias = _fit(x, y, 3, 0.01)

    def objective(w, b):
        return torch.nn.functional.cross_entropy(x @ w + b, y) + 0.005 * w.square().sum()

    weight.requires_grad_()
    bias.requires_grad_()
    grads = torch.autograd.grad(objective(weight, bias), (weight, bias))
    assert max(float(g.abs().max()) for g in grads) < 1e-5


def test_alone_is_the_same_training_on_one_clients_examples(make_job, lora):
    job, spec = make_job(), TrainSpec(epochs=2, batch_size=4, lr=5e-3)
    steps = []
    found = alone_baseline(job.far(), job.source(), "east", spec, lora, job.task, on_step=steps.append)
    assert len(steps) == 2 * -(-len(job.tokens["east"]["train"]) // 4)
    far = job.far()
    mine = MemoryFeatures({"east": {"train": job.features("east", "train")}})
    FarTrainer(far, spec, lora, job.task, mine).train()
    assert found == evaluate(far, job.source(), job.task).as_dict()
    assert found["per_client"].keys() == {"east", "north", "west"}


def test_errors_name_what_is_missing(make_job, lora):
    causal = TaskSpec("causal-lm")
    empty = MemoryFeatures({"a": {"test": clusters(3, 0, 1.0)}})
    no_test = MemoryFeatures({"a": {"train": clusters(3, 0, 1.0)}})
    for call in (
        lambda task, s: majority_baseline(s, task),
        lambda task, s: linear_head_baseline(PooledOnly(), s, task),
    ):
        with pytest.raises(ConfigError, match="sequence-classification only"):
            call(causal, empty)
        with pytest.raises(DataError, match="training example"):
            call(TASK, empty)
        with pytest.raises(DataError, match="test example"):
            call(TASK, no_test)
    job = make_job()
    with pytest.raises(DataError, match="training example"):
        alone_baseline(job.far(), MemoryFeatures({"a": {"test": []}}), "a", TrainSpec(), lora, job.task)


def test_one_training_example_is_enough_to_run():
    tiny = MemoryFeatures({"a": {"train": clusters(1, 0, 1.0), "test": clusters(3, 0, 1.0)}})
    assert 0 <= linear_head_baseline(PooledOnly(), tiny, TASK)["value"] <= 1
