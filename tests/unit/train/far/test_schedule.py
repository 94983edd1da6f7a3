"""Steps, order and rates of a training run."""

from __future__ import annotations

import math

import pytest
import torch

from cloister.errors import ConfigError
from cloister.train import StepPlan, TrainSpec


@pytest.mark.parametrize(
    ("n", "batch", "accumulation", "epochs", "most", "steps"),
    [(10, 4, 1, 3, None, 9), (10, 4, 2, 3, None, 6), (1, 16, 1, 2, None, 2), (10, 4, 1, 3, 5, 5), (8, 4, 1, 1, 99, 2)],
)
def test_step_counts(n, batch, accumulation, epochs, most, steps):
    spec = TrainSpec(epochs=epochs, batch_size=batch, grad_accumulation=accumulation, max_steps=most)
    plan = StepPlan(spec, n)
    assert plan.n_steps == steps
    assert [plan.epoch_of(s) for s in range(steps)] == [s // plan.steps_per_epoch for s in range(steps)]
    assert plan.ends_epoch(steps - 1)


def test_every_example_once_an_epoch_in_another_order():
    plan = StepPlan(TrainSpec(batch_size=4, seed=3), 11)
    epochs = [plan.batches(e) for e in range(3)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(11))
        assert [len(batch) for batch in batches] == [4, 4, 3]
    assert epochs[0] != epochs[1]
    assert epochs[1] == plan.batches(1)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(4)).tolist()
    assert [i for batch in epochs[1] for i in batch] == order


def test_largest_seed_still_shuffles():
    plan = StepPlan(TrainSpec(seed=2**63 - 1), 5)
    assert plan.batches(0) != plan.batches(1) or plan.batches(1) != plan.batches(2)


def test_warm_up_then_cosine():
    plan = StepPlan(TrainSpec(epochs=1, batch_size=1, lr=2.0, warmup_ratio=0.2), 10)
    rates = [plan.lr_at(s) for s in range(10)]
    assert rates[:2] == pytest.approx([2 / 3, 4 / 3])
    assert rates[2:] == pytest.approx([1 + math.cos(math.pi * k / 8) for k in range(8)])


def test_line_and_constant():
    line = StepPlan(TrainSpec(epochs=1, batch_size=1, lr=1.0, warmup_ratio=0, schedule="linear"), 4)
    assert [line.lr_at(s) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    flat = StepPlan(TrainSpec(epochs=1, batch_size=1, lr=1.0, warmup_ratio=0.5, schedule="constant"), 4)
    assert [flat.lr_at(s) for s in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_warm_up_may_be_everything():
    plan = StepPlan(TrainSpec(epochs=1, batch_size=1, lr=1.0, warmup_ratio=1.0), 3)
    assert [plan.lr_at(s) for s in range(3)] == pytest.approx([0.25, 0.5, 0.75])


def test_every_wrong_value_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainSpec(
            epochs=0, batch_size=0, grad_accumulation=0, lr=-1.0, warmup_ratio=2.0, max_grad_norm=math.inf,
            seed=-1, checkpoint_every_steps=0, max_steps=0, client_weights=(("a", 0.0),),
        )  # fmt: skip
    assert {problem.key.removeprefix("training.") for problem in caught.value.problems} == {
        "epochs", "batch_size", "grad_accumulation", "lr", "warmup_ratio", "max_grad_norm",
        "seed", "checkpoint_every_steps", "max_steps", "client_weights",
    }  # fmt: skip
