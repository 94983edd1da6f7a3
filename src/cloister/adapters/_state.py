"""The trained tensors of a module, in and out. No file is read or written here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cloister.errors import StateMismatchError

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHOWN = 3


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every tensor that trains, by name, on the CPU. Secret: it is the adapter and the head."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` gave. Nothing is changed unless everything fits.

    Raises:
        StateMismatchError: a tensor is missing, unknown, or of another shape or type.
    """
    import torch

    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} does not train here" for name in state if name not in own]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape or own[name].dtype != state[name].dtype:
            problems.append(f"{name} is {_kind(state[name])}, expected {_kind(own[name])}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise StateMismatchError(
            f"the saved state does not fit: {'; '.join(sorted(problems)[:_SHOWN])}{more}",
            hint="it was saved with another model, cut layer, adapter or set of labels",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def n_trainable(module: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def n_frozen(module: nn.Module) -> int:
    """How many numbers stay as they are."""
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
