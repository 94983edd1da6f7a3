"""LoRA on the blocks of the far side, by PEFT (Hu et al., 2021, arXiv 2106.09685).

A frozen linear W gets a trained low-rank term: `y = W x + scale * B A x`, with A: [r, in], B: [out, r] and
`scale = alpha / r` (rank-stabilised: `alpha / sqrt(r)`). B starts at zero, so tuning starts at the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from cloister.errors import AdapterError, UnsupportedLayerError

if TYPE_CHECKING:
    from torch import Tensor, nn

_ADAPTER_NAME = "default"


@dataclass(frozen=True)
class LoraSpec:
    """What LoRA to place, and where.

    Attributes:
        r: rank, at least 1.
        alpha: scale of the trained term, above 0.
        dropout: share of the term's input that is dropped while training, in [0, 1).
        targets: "all-linear", or names of linears: the last part ("q_proj") or more of the path ("mlp.up_proj").
        use_rslora: scale by `alpha / sqrt(r)` in place of `alpha / r` (Kalajdzievski, 2023, arXiv 2312.03732).
        freeze_a: FFA-LoRA (Sun et al., 2024, arXiv 2403.12313): every A stays as its seed drew it, only B trains, so
            that the mean of the clients' products B A is exactly the product with the mean B.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    use_rslora: bool = False
    freeze_a: bool = False

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise AdapterError(
                f"LoRA with r = {self.r}, alpha = {self.alpha}, dropout = {self.dropout} is not possible",
                hint="r is at least 1, alpha above 0 and finite, dropout in [0, 1)",
            )
        if not self.targets:
            raise AdapterError("LoRA has no targets", hint='name linears, or set targets = "all-linear"')


class _Tunable(Protocol):
    """What the far side of `slicing` has that an adapter needs. (`adapters` lies below it and does not import it.)"""

    blocks: nn.ModuleList
    head: nn.Module
    task: str


def add_lora(far: nn.Module, spec: LoraSpec, *, seed: int) -> None:
    """Place LoRA on the linears of the far side's blocks, in place, and choose what trains.

    Trains: the LoRA matrices, and the head where the task is classification (it is new). All else is frozen: the
    backbone's blocks and norm, and a language-model head, which comes with the backbone.

    Args:
        far: a `slicing.FarSide`.
        spec: the adapter.
        seed: of A; the same seed gives the same A on every machine, whatever the state of torch's global generator.

    Raises:
        UnsupportedLayerError: a target is not a linear of the blocks; the hint lists those there are.
        AdapterError: there is an adapter already, or A is to be frozen, which is for aggregated adapters only.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    if spec.freeze_a:
        raise AdapterError("FFA-LoRA is for adapters that are aggregated; the far side trains A and B")
    side = cast("_Tunable", far)
    linears = linears_of(side.blocks)
    names = chosen_linears(linears, spec.targets)
    config = LoraConfig(**lora_fields(spec), target_modules=names, fan_in_fan_out=is_transposed(linears, names))
    with torch.random.fork_rng(devices=[]):  # PEFT draws a first A from the global generator, which is not ours to move
        inject_adapter_in_model(config, side.blocks, _ADAPTER_NAME)
    draw_a([parameter for name, parameter in side.blocks.named_parameters() if ".lora_A." in name], seed)
    far.requires_grad_(False)
    for name, parameter in side.blocks.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if side.task == "sequence-classification":
        side.head.requires_grad_(True)


def lora_fields(spec: LoraSpec) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig` that a spec decides alone."""
    return {
        "r": spec.r,
        "lora_alpha": spec.alpha,  # PEFT divides by r; a fraction is fine
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
    }


def is_transposed(linears: Mapping[str, nn.Module], names: Iterable[str]) -> bool:
    """Whether weights are stored as GPT-2 does, transposed (`Conv1D`); a family has one kind only."""
    return all(_is_conv1d(linears[name]) for name in names)


def linears_of(blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """Every linear of the blocks, by its path in them.

    Raises:
        AdapterError: there is an adapter already.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    if any(isinstance(module, BaseTunerLayer) for module in blocks.modules()):
        raise AdapterError("the model has an adapter already")
    return {n: m for n, m in blocks.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def chosen_linears(linears: Mapping[str, Any], targets: tuple[str, ...] | Literal["all-linear"]) -> list[str]:
    """The paths of the linears that targets name, in the blocks' order.

    Raises:
        UnsupportedLayerError: a target is not a linear of the blocks; the hint lists those there are.
    """
    if targets == "all-linear":
        return list(linears)
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not found:
            there = sorted({name.rpartition(".")[2] for name in linears})
            paths = sorted({name.partition(".")[2] for name in linears})
            raise UnsupportedLayerError(
                f"adapter target {target!r} is not a linear of this backbone",
                hint=f"linears: {', '.join(there)} (paths: {', '.join(paths)})",
            )
        chosen.update(found)
    return [name for name in linears if name in chosen]


def draw_a(matrices: Iterable[Tensor], seed: int) -> None:
    """Draw every A as PEFT does (Kaiming uniform, a = sqrt(5)), but from our own generator, in the order given."""
    import torch
    from torch.nn.init import kaiming_uniform_

    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices:
        kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
