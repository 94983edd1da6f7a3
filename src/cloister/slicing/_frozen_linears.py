"""The frozen linears of a Hugging Face model: which can run masked on an accelerator, and putting them there.

What trains, what is not a product, and what is too small to pay stays inside. Everything is looked at, and every
problem listed, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from cloister.errors import UnsupportedLayerError
from cloister.offload import FrozenLinear, OffloadedGroup, OffloadSession
from cloister.pad import PadMode
from cloister.ring import RingFormat
from cloister.slicing._families import FAMILIES, Family, unproven_variant
from cloister.slicing._verdicts import Rules, Verdicts, judge, weight_of

SMALLEST_SIDE = 32
"""A product with fewer inputs or outputs stays inside: masking a row costs more than so short a product."""

# Siblings that are always given the same tensor.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class OffloadReport:
    """What `offload_model` did. *Public*.

    Attributes:
        groups: names of the linears that were replaced; those of one group are one product.
        inside: names of the modules with parameters that stay in the enclave, and why each does.
        n_offloaded: weights on the accelerator.
        n_inside: parameters in the enclave.
    """

    groups: tuple[tuple[str, ...], ...]
    inside: Mapping[str, str]
    n_offloaded: int
    n_inside: int


def check_offload(
    model: nn.Module,
    fmt: RingFormat,
    *,
    pad: PadMode = PadMode.OTP,
    skip: Sequence[str] = (),
    smallest: int = SMALLEST_SIDE,
    weight_bits: int | None = None,
) -> list[tuple[str, ...]]:
    """The names of the linears that `offload_model` would replace, by product. Changes nothing.

    Args:
        model: a transformers model of a proven family, with PEFT's LoRA or prefix in it or without, or a `FarSide`.
        fmt: of the session.
        pad: of the session. With lattice pads only linears of the blocks are offloaded: what a head gives leaves the
            enclave, and raw outputs of a masked layer would give its keys away.
        skip: linears to leave inside, by the end of their path ("lm_head", "mlp.up_proj").
        smallest: see `SMALLEST_SIDE`.
        weight_bits: see `ring.quantize_weight`.

    Raises:
        UnsupportedLayerError: something cannot be offloaded; lists all of it.
    """
    return _plan(model, Rules(fmt, pad, skip, smallest, weight_bits))[0]


def offload_model(
    model: nn.Module,
    session: OffloadSession,
    *,
    skip: Sequence[str] = (),
    smallest: int = SMALLEST_SIDE,
    weight_bits: int | None = None,
) -> OffloadReport:
    """Replace the frozen linears of a model by masked ones, in place. Adapters must be there already.

    Args:
        model, skip, smallest, weight_bits: see `check_offload`.
        session: that multiplies; without layers of these names.

    Raises:
        UnsupportedLayerError: see `check_offload`; nothing was changed.
        OffloadError: the session cannot take a layer; the model was not changed.
    """
    rules = Rules(session.format, session.pad_mode, skip, smallest, weight_bits)
    groups, found = _plan(model, rules)
    instead: dict[nn.Module, nn.Module] = {}
    n_offloaded = 0
    for group in groups:
        linears = [found.linears[name] for name in group]
        frozen = [FrozenLinear(name, weight_of(old), old.bias) for name, old in zip(group, linears, strict=True)]
        members = OffloadedGroup(session, frozen, weight_bits=weight_bits).members
        instead |= {old: new.train(old.training) for old, new in zip(linears, members, strict=True)}
        n_offloaded += sum(linear.weight.numel() for linear in frozen)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):  # a module may hang in several places
            if child in instead:
                setattr(parent, attribute, instead[child])
    n_inside = sum(parameter.numel() for parameter in model.parameters())
    return OffloadReport(tuple(groups), found.inside, n_offloaded, n_inside)


def _plan(model: nn.Module, rules: Rules) -> tuple[list[tuple[str, ...]], Verdicts]:
    """The linears to replace, by product, and what was found of everything."""
    family, problems = _family(model)
    found = judge(model, rules, _block_test(model, family))
    groups: list[tuple[str, ...]] = []
    for group in fused(found.linears):
        shapes = [weight_of(found.linears[name]).shape for name in group]
        if min(sum(out for out, _ in shapes), shapes[0][1]) < rules.smallest:
            found.inside |= dict.fromkeys(group, "too small to pay")
        else:
            groups.append(group)
    missing = [end for end in rules.skip if not any(f".{name}".endswith(f".{end}") for name in found.inside)]
    problems += [f"{end!r} is to be left inside, and is not a linear of the model" for end in missing]
    problems += found.problems
    if problems:
        n = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise UnsupportedLayerError(
            f"the model cannot be offloaded, {n}: {'; '.join(problems)}",
            hint="freeze what trains, or name in `skip` what shall stay inside",
        )
    return groups, found


def _family(model: nn.Module) -> tuple[Family | None, list[str]]:
    """The model's family; else why it has none that is proven."""
    config = getattr(model, "config", None)
    info = getattr(model, "info", None)  # of a FarSide, whose loading has refused variants
    name = getattr(info, "family", None) or getattr(config, "model_type", None)
    if not isinstance(name, str) or name not in FAMILIES:
        return None, [f"it is of family {name!r}, not one of {', '.join(sorted(FAMILIES))}"]
    variant = unproven_variant(name, cast("Any", config).to_dict()) if info is None else ""
    return FAMILIES[name], [f"it is a variant: {variant}"] if variant else []


def _block_test(model: nn.Module, family: Family | None) -> Callable[[str], bool]:
    """Whether a module of this name is in the blocks, and so neither an embedding nor a head."""
    ends = ("blocks", family.blocks) if family else ()
    prefixes = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(f".{name}".endswith(f".{end}") for end in ends)
    )
    return lambda name: name.startswith(prefixes)


def fused(linears: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The names by product, in the model's order: siblings that read the same tensor together."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        together = next((names for names in _FUSED if leaf in names), (leaf,))
        groups.setdefault((parent, together), []).append(name)
    return [tuple(names) for names in groups.values()]
