"""FedProx's term: its value, its pull, and that it needs the round's start whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cloister.adapters import trainable_state
from cloister.errors import StateMismatchError
from cloister.train import proximal_term


@pytest.fixture
def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    made[0].requires_grad_(False)
    return made


def test_value_and_gradient(module: nn.Module) -> None:
    start = trainable_state(module)
    assert proximal_term(module, start, 0.7) == 0
    with torch.no_grad():
        module[1].weight.add_(2.0)
        module[0].weight.add_(5.0)  # frozen: not in it
    term = proximal_term(module, start, 0.7)
    torch.testing.assert_close(term, torch.tensor(0.35 * 4 * 4.0))
    term.backward()
    torch.testing.assert_close(module[1].weight.grad, torch.full((2, 2), 0.7 * 2))


@pytest.mark.parametrize("start", [{}, {"1.weight": torch.zeros(3), "1.bias": torch.zeros(2)}], ids=["none", "shape"])
def test_a_start_that_lacks_something_is_refused(module: nn.Module, start: dict[str, torch.Tensor]) -> None:
    with pytest.raises(StateMismatchError, match=r"1\.weight"):
        proximal_term(module, start, 0.1)
