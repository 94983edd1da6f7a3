"""Trained state comes out, goes back in, and fits exactly or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cloister.adapters import load_trainable_state, n_frozen, n_trainable, trainable_state
from cloister.errors import StateMismatchError


@pytest.fixture
def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    made[0].requires_grad_(False)
    return made


def test_out_and_in_again(module: nn.Module) -> None:
    state = trainable_state(module)
    assert sorted(state) == ["1.bias", "1.weight"]
    with torch.no_grad():
        module[1].weight.zero_()
    assert not torch.equal(state["1.weight"], module[1].weight)
    load_trainable_state(module, state)
    assert torch.equal(state["1.weight"], module[1].weight)
    assert (n_trainable(module), n_frozen(module)) == (6, 8)


def test_the_state_is_plain_and_detached(module: nn.Module) -> None:
    assert not any(t.requires_grad for t in trainable_state(module).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.bias": None}, "1.bias is missing"),
        ({"0.bias": torch.zeros(2)}, "0.bias does not train"),
        ({"nonsense": torch.zeros(2)}, "nonsense does not train"),
        ({"1.bias": torch.zeros(3)}, r"1.bias is \(3,\) float32, expected \(2,\) float32"),
        ({"1.bias": torch.zeros(2, dtype=torch.float64)}, r"\(2,\) float64"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(module: nn.Module, change: dict, message: str) -> None:
    before = trainable_state(module)
    state = {n: torch.full_like(t, 7.0) for n, t in before.items()} | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(StateMismatchError, match=message):
        load_trainable_state(module, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_state(module).items())


def test_many_problems_are_counted(module: nn.Module) -> None:
    with pytest.raises(StateMismatchError, match="and 4 more"):
        load_trainable_state(module, {f"x{i}": torch.zeros(1) for i in range(5)})
