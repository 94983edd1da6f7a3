"""What may leave the enclave when a job says so: the adapter, or the tuned weights of the far side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from cloister.adapters import load_trainable_state, trainable_state
from cloister.errors import ConfigError, Problem, StateMismatchError

if TYPE_CHECKING:
    from torch import Tensor, nn

_BASE = ".base_layer"


def export_release(far: nn.Module, what: str) -> bytes:
    """The tuned far side as safetensors. *secret* until the job's parties receive it, each over its own session.

    Args:
        far: the tuned far side.
        what: "none" gives nothing, "adapter" the LoRA matrices and the head, "weights" every weight of the far side
            with LoRA merged into it, under the backbone's own names below `blocks`, `norm` and `head`.

    Raises:
        ConfigError: `what` is none of these.
    """
    if what == "none":
        return b""
    if what == "adapter":
        return export_far_state(far)
    if what == "weights":
        return save_safetensors(_merged(far))
    raise ConfigError([Problem("release.what", f"{what!r} is not none, adapter or weights")])


def export_far_state(far: nn.Module) -> bytes:
    """Adapter and head as safetensors, named as in the far side. *secret*."""
    return save_safetensors({name: tensor.contiguous() for name, tensor in trainable_state(far).items()})


def import_far_state(far: nn.Module, blob: bytes) -> None:
    """Puts what `export_far_state` gave into a far side with the same adapter placed.

    Raises:
        StateMismatchError: it is no such state, or of another model, adapter or set of labels.
    """
    try:
        state = load_safetensors(blob)
    except (SafetensorError, ValueError, TypeError):
        raise StateMismatchError("the saved far side is not a safetensors file") from None
    load_trainable_state(far, state)


@torch.no_grad()
def _merged(far: nn.Module) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    adapted = {name: module for name, module in far.named_modules() if isinstance(module, LoraLayer)}
    for name, tensor in far.state_dict().items():
        if ".lora_" in name or tensor.data_ptr() in seen:
            continue  # a tied weight is written once
        seen[tensor.data_ptr()] = name
        layer = adapted.get(name.removesuffix(f"{_BASE}.weight")) if name.endswith(f"{_BASE}.weight") else None
        value = tensor
        if layer is not None:
            value = tensor + layer.get_delta_weight(layer.active_adapters[0])  # type: ignore[operator]
        merged[name.replace(_BASE, "")] = value.detach().clone().contiguous()
    return merged
