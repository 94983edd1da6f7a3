"""FedProx's proximal term (Li et al., 2018, arXiv 1812.06127): a client is pulled back to where its round began."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cloister.errors import StateMismatchError


def proximal_term(module: nn.Module, start: Mapping[str, Tensor], mu: float) -> Tensor:
    """`mu / 2 * ||w - w_start||^2` over everything that trains; add it to the loss of each step.

    Args:
        module: what is trained. *Secret*.
        start: `adapters.trainable_state(module)` at the start of the round. *Secret*.
        mu: weight of the term; 0 makes FedAvg of it.

    Raises:
        StateMismatchError: something trains that `start` does not have in that shape; names it.
    """
    total = torch.zeros(())
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in start or start[name].shape != parameter.shape:
            raise StateMismatchError(f"{name} has no counterpart at the start of the round", key=name)
        total = total + (parameter - start[name].to(parameter)).float().square().sum()
    return mu / 2 * total
