"""Which arithmetic the far side computes in, and whether this machine's processor has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from cloister.errors import ConfigError, Problem

if TYPE_CHECKING:
    from cloister.slicing import FarSide

Precision = Literal["fp32", "bf16"]
Wanted = Literal["fp32", "bf16", "auto"]

# By the names of `torch.cpu.get_capabilities`: x86 with AVX-512 or AMX, and Arm.
_BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")


def has_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether the processor multiplies bfloat16 numbers itself. Elsewhere it is emulated, and slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _BF16_PRODUCTS)


def resolve_precision(wanted: Wanted, device: torch.device | str = "cpu") -> Precision:
    """What `training.precision` means on this machine: "auto" is bf16 where the processor has it.

    Raises:
        ConfigError: bf16 is asked for, and the processor has no such arithmetic.
    """
    if wanted == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if wanted == "bf16" and not has_bf16(device):
        hint = 'set it to "auto", which takes bf16 only where the processor has it, or to "fp32"'
        problem = Problem("training.precision", "is bf16, and this machine's processor does not compute in it", hint)
        raise ConfigError([problem], hint=hint)
    return wanted


def set_precision(far: FarSide, wanted: Wanted) -> Precision:
    """Makes a far side compute in this precision, for training, evaluation and answers alike; returns which it is.

    The adapter must be there already: what trains stays float32. A far side that computes in bf16 keeps doing so.

    Raises:
        ConfigError: as `resolve_precision`.
    """
    precision = resolve_precision(wanted, next(far.parameters()).device)
    if precision == "bf16":
        far.compute_in_bf16()
    return precision
