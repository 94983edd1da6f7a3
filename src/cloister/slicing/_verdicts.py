"""What becomes of each module of a model under offload: a masked product, a place inside, or a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cloister.errors import RingOverflowError
from cloister.pad import PadMode
from cloister.ring import MAX_FEATURES, RingFormat, quantize_weight

# Up to here no weight can overflow either format, whatever its values and bits: with T < 2^15 (faithful) or 2^7 (fast)
# L >= m / (2 T sqrt(d)) - 1 > sqrt(d) + 1 for both directions; spec/pad.md section 2.2.
ALWAYS_FITS = 1 << 15

_BASE = "base_layer"  # what PEFT calls the layer that it wraps
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)  # types of quantised weights kept as buffers


@dataclass(frozen=True)
class Rules:
    """What decides, beside the module itself. See `check_offload`."""

    fmt: RingFormat
    pad: PadMode = PadMode.OTP
    skip: Sequence[str] = ()
    smallest: int = 1
    weight_bits: int | None = None


@dataclass
class Verdicts:
    """What was found; names are without PEFT's parts."""

    linears: dict[str, nn.Linear | Conv1D] = field(default_factory=dict[str, "nn.Linear | Conv1D"])
    inside: dict[str, str] = field(default_factory=dict[str, str])
    problems: list[str] = field(default_factory=list[str])


def judge(model: nn.Module, rules: Rules, in_blocks: Callable[[str], bool]) -> Verdicts:
    """The verdict on every module that has parameters or buffers of its own, in the model's order.

    Args:
        model: all of it.
        rules: see `check_offload`.
        in_blocks: whether a module of this name is in the blocks, and so neither an embedding nor a head.
    """
    found = Verdicts()
    for name, module in _outside_adapters(model, found):
        if type(module) in {nn.Linear, Conv1D}:
            linear = cast("nn.Linear | Conv1D", module)
            if why := _why_inside(name, linear, rules, in_blocks):
                found.inside[name] = why
            elif problems := list(_linear_problems(linear, rules)):
                found.problems.append(f"{name}: {', '.join(problems)}")
            else:
                found.linears[name] = linear
        elif problem := _other_problem(module, in_block=in_blocks(name)):
            found.problems.append(f"{name}: {problem}")
        elif any(True for _ in module.parameters(recurse=False)):
            found.inside[name] = "an embedding" if isinstance(module, nn.Embedding) else "no product of tokens"
    return found


def weight_of(linear: nn.Linear | Conv1D) -> Tensor:
    """[out, in], whichever way it is stored."""
    return linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()


def _outside_adapters(model: nn.Module, found: Verdicts) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is not an adapter's, once, by name. Adapters are noted as inside, or as a problem."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapters: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in adapters:
            continue
        name = ".".join(part for part in path.split(".") if part != _BASE)
        if isinstance(module, AuxiliaryTrainingWrapper):
            adapters.update(module.modules())
            found.inside[name] = "it trains"
        elif isinstance(module, BaseTunerLayer):
            adapters.update(cast("nn.Module", module).modules())
            adapters.difference_update(cast("Any", module).base_layer.modules())
            if problem := _adapter_problem(module):
                found.problems.append(f"{name}: {problem}")
            found.inside[f"{name} (adapter)"] = "it trains"
        else:
            yield name, module


def _adapter_problem(module: Any) -> str:
    from peft.tuners.lora import Embedding, Linear

    if type(module) not in {Linear, Embedding}:
        return f"its adapter {type(module).__name__} is not proven over masked layers; LoRA is"
    if module.lora_variant:
        return "its LoRA is a variant that reads the weight itself, such as DoRA"
    return "its adapter is merged into the weight" if module.merged else ""


def _why_inside(name: str, linear: nn.Linear | Conv1D, rules: Rules, in_blocks: Callable[[str], bool]) -> str:
    """Why a linear stays in the enclave; empty where it does not."""
    if any(f".{name}".endswith(f".{end}") for end in rules.skip):
        return "asked for"
    if in_blocks(name):
        return ""
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return "it trains"
    return "a head, which lattice pads do not allow" if rules.pad is PadMode.LATTICE else ""


def _linear_problems(linear: nn.Linear | Conv1D, rules: Rules) -> Iterator[str]:
    if any(parameter.requires_grad for parameter in linear.parameters()):
        yield "it trains, and only frozen linears can be offloaded"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        yield "it has hooks, which would be lost"
    weight, bias = weight_of(linear), linear.bias
    if weight.is_meta:
        yield "it has no weights (meta device)"
        return
    if weight.device.type != "cpu":
        yield f"it is on {weight.device}, and the enclave computes on the CPU"
    if not weight.dtype.is_floating_point:
        yield f"its weight is quantised ({weight.dtype})"
        return
    if not _is_finite(weight) or (bias is not None and not _is_finite(bias)):
        yield "it holds NaN or infinite values"
    elif weight.shape[1] > MAX_FEATURES:
        yield f"it has {weight.shape[1]} inputs, over {MAX_FEATURES}"
    elif weight.shape[1] > ALWAYS_FITS:
        try:
            quantize_weight(weight, rules.fmt, layer="it", weight_bits=rules.weight_bits)
        except RingOverflowError:
            yield f"its rows are too long for the format {rules.fmt.name}"


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach().to(torch.float32)).all())


def _other_problem(module: nn.Module, *, in_block: bool) -> str:
    """What a module that is no plain linear might multiply by; empty where it does not."""
    kind = type(module).__name__
    buffers = [buffer for _, buffer in module.named_buffers(recurse=False)]
    if hasattr(module, "_packed_params") or any(b.ndim > 1 and b.dtype in _PACKED for b in buffers):
        return f"a quantised module ({kind})"
    if isinstance(module, nn.Embedding):
        return ""
    wide = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
    if not wide or (any(p.requires_grad for p in wide) and not in_block):
        return ""
    if any(not parameter.dtype.is_floating_point for parameter in wide):
        return f"a quantised module ({kind})"
    if any(parameter.ndim > 2 for parameter in wide):
        return f"a weight of more than two dimensions ({kind}), as experts and convolutions have"
    return f"a module that multiplies in a way of its own ({kind})"
