"""The weights of a tuned model as a plain model has them, without changing it."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from cloister.adapters._spf_linear import ORDERS, SpfLinear, unfolded

_BASE = ".base_layer"


@torch.no_grad()
def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every weight under the backbone's own names: LoRA is added in, SPF's rows and columns are put back.

    *Secret*: it is the tuned model.

    Args:
        model: with LoRA or SPF, as `add_lora`, `add_spf` or `attach_spf` placed it, or without an adapter.

    Returns:
        contiguous tensors by name; a tied weight is there once, under the first of its names.
    """
    merged: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        is_folded_row = isinstance(module, SpfLinear) and leaf not in ("weight", "bias")
        if ".lora_" in name or leaf in ORDERS or is_folded_row or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        value = module.whole_weight() if isinstance(module, SpfLinear) and leaf == "weight" else tensor
        if path.endswith(_BASE) and leaf == "weight":
            layer = cast("Any", model.get_submodule(path.removesuffix(_BASE)))
            if isinstance(layer, LoraLayer):
                value = tensor + layer.get_delta_weight(layer.active_adapters[0])  # type: ignore[operator]
        value = unfolded(module, leaf, value)
        merged[name.replace(_BASE, "")] = value.detach().clone().contiguous()
    return merged
