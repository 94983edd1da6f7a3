"""The adapter's forward and backward in few passes over memory; the same function as PEFT's modules compute.

PEFT evaluates `base(x) + B(A(x)) * scaling` operator by operator, which writes three tensors of the output's size and
keeps what autograd needs of each. Here the low-rank term is added into the output by the matrix product itself, and
backward does the same for the input's gradient. The frozen weight's gradient is never formed. Over a masked base, whose
output comes from elsewhere, the term is added into that output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from cloister.offload import OffloadedLinear


class _LowRank(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T, W and b frozen. x [..., in], W [out, in], A [r, in], B [out, r]."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        # Products in the frozen weight's type, which may be bfloat16 where the adapter is float32; autograd gives every
        # gradient the type of what it is of.
        x2, a, b = (t.to(weight.dtype) for t in (x.reshape(-1, x.shape[-1]), a, b))
        h = torch.mm(x2, a.t())
        y = torch.mm(x2, weight.t()) if bias is None else torch.addmm(bias.to(weight.dtype), x2, weight.t())
        y.addmm_(h, b.t(), alpha=scaling)
        ctx.save_for_backward(x2, h, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x2, h, weight, a, b = ctx.saved_tensors
        g = grads[0].reshape(-1, weight.shape[0])
        gh = torch.mm(g, b).mul_(ctx.scaling)
        # Below the first adapted layer nothing trains, so its input's gradient, a third of its work, is not asked for.
        gx = torch.mm(g, weight).addmm_(gh, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        ga = torch.mm(gh.t(), x2) if ctx.needs_input_grad[3] else None
        gb = torch.mm(h.t(), g).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None  # lying: many times faster
        return gx, None, None, ga, gb, None


class _Added(torch.autograd.Function):
    """y + s (x A^T) B^T, written into y. x [..., in], y [..., out], A [r, in], B [out, r].

    What has r columns is kept lying, as r rows: products that give few columns are several times slower than the same
    ones that give few rows (torch 2.13 with MKL; for B's gradient up to 8 times).
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        h = torch.mm(a, x2.t())
        y.view(-1, y.shape[-1]).addmm_(h.t(), b.t(), alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x2, h, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x2, h, a, b = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        gh = torch.mm(b.t(), g.t()).mul_(ctx.scaling)
        gx = torch.mm(gh.t(), a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        ga = torch.mm(gh, x2) if ctx.needs_input_grad[2] else None
        gb = torch.mm(h, g).mul_(ctx.scaling).t() if ctx.needs_input_grad[3] else None
        return grads[0] if ctx.needs_input_grad[0] else None, gx, ga, gb, None


def accelerate_lora(module: nn.Module) -> int:
    """Replaces the forward of the module's LoRA layers by the functions above, where they are the same function.

    Layers with dropout, biases in the adapter, a variant such as DoRA, or a base that is neither `nn.Linear` nor masked
    keep PEFT's.

    Args:
        module: the far side, after `add_lora`.

    Returns:
        number of layers that were replaced.
    """
    n = 0
    for layer in module.modules():
        if isinstance(layer, LoraLinear) and _is_plain(layer):
            layer.forward = _forward_of(layer)  # type: ignore[method-assign]
            n += 1
    return n


def _is_plain(layer: LoraLinear) -> bool:
    active = layer.active_adapters
    return (
        type(layer.base_layer) in (nn.Linear, OffloadedLinear)
        and len(active) == 1
        and active[0] in layer.lora_A
        and active[0] not in layer.lora_variant
        and isinstance(layer.lora_dropout[active[0]], nn.Identity)
        and layer.lora_A[active[0]].bias is None
        and layer.lora_B[active[0]].bias is None
    )


def _forward_of(layer: LoraLinear) -> Callable[[Tensor], Tensor]:
    name = layer.active_adapters[0]
    base, a, b, scaling = layer.base_layer, layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name])

    if isinstance(base, OffloadedLinear):
        return lambda x, *_, **__: _Added.apply(base(x), x, a.weight, b.weight, scaling)  # type: ignore[no-any-return]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return _LowRank.apply(x, base.weight, base.bias, a.weight, b.weight, scaling)  # type: ignore[no-any-return]

    return forward
