"""The shapes of a backbone, from its configuration alone: for planning, before any weight is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cloister.adapters import PartName, spf_units
from cloister.errors import ModelError, UnsupportedLayerError
from cloister.slicing._backbone import BackboneInfo, config_folder, first_line, load_config
from cloister.slicing._families import FAMILIES
from cloister.slicing._frozen_linears import fused


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same tensor, which offload makes one product of.

    Attributes:
        names: of the linears, as `check_offload` gives them.
        n_in: features that they read.
        n_out: features that they give, together.
        block: of which block they are, from 0; None outside of the blocks.
        reads_embeddings: nothing that trains is below them, so that no gradient of what they read is ever asked for.
    """

    names: tuple[str, ...]
    n_in: int
    n_out: int
    block: int | None
    reads_embeddings: bool


@dataclass(frozen=True)
class Outline:
    """A backbone in numbers. *Public*.

    Attributes:
        groups: every linear, in the model's order: of the blocks, and a decoder's head.
        query_size: features of all attention heads together.
        kv_size: features of all keys of a token, which are those of its values.
        has_tied_head: the head's weight is the embedding's.
        n_embedding: parameters of the embeddings.
        n_in_blocks: parameters of the blocks that are no linear's weight: norms and biases.
        n_outside: the same of everything else.
        units: how many head groups and neurons a block has, and the weights of each one's rows (`adapters.spf_units`);
            empty where SPF does not know the layout.
    """

    groups: tuple[LinearGroup, ...]
    query_size: int
    kv_size: int
    has_tied_head: bool
    n_embedding: int
    n_in_blocks: int
    n_outside: int
    units: Mapping[PartName, tuple[int, int]]


def outline_backbone(info: BackboneInfo) -> Outline:
    """The shapes of a whole backbone: a decoder with its language-model head, an encoder without one.

    Fetches its configuration where `info` names a hub model, and no weights.

    Raises:
        ModelError: transformers refuses the configuration, or the hub does not give it.
    """
    model = _empty_model(info)
    family, base = FAMILIES[info.family], cast("nn.Module", model.base_model)
    blocks = cast("nn.ModuleList", base.get_submodule(family.blocks))
    block_of = {module: i for i, block in enumerate(blocks) for module in block.modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    embeddings = {id(p): p for path in family.embeddings for p in base.get_submodule(path).parameters()}
    others = {id(p): p for p in model.parameters() if id(p) not in embeddings}
    for module in linears.values():
        others.pop(id(module.weight), None)
    in_blocks = {key: others.pop(key) for p in blocks.parameters() if (key := id(p)) in others}
    config = model.config
    n_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or info.hidden_size // n_heads
    groups = fused(linears)
    first = [i for i, names in enumerate(groups) if block_of.get(linears[names[0]]) == 0]
    # Attention reads the embeddings, and where both halves of a block run side by side, so does the second one.
    parallel = info.family == "gpt_neox" and config.use_parallel_residual
    lowest = {first[0], *([first[2]] if parallel else [])}
    return Outline(
        groups=tuple(_group(names, linears, block_of, i in lowest) for i, names in enumerate(groups)),
        query_size=head_size * n_heads,
        kv_size=head_size * (getattr(config, "num_key_value_heads", None) or n_heads),
        has_tied_head=any(id(module.weight) in embeddings for module in linears.values()),
        n_embedding=_count(embeddings.values()),
        n_in_blocks=_count(in_blocks.values()),
        n_outside=_count(others.values()),
        units=_units(blocks[0]),
    )


def _units(block: nn.Module) -> Mapping[PartName, tuple[int, int]]:
    try:
        return spf_units(block)
    except UnsupportedLayerError:
        return {}


def empty_blocks(info: BackboneInfo, start: int) -> nn.ModuleList:
    """The blocks from `start` on without any weights, on torch's meta device: to see beforehand what fits them.

    Raises:
        ModelError: as `outline_backbone`.
    """
    base = cast("nn.Module", _empty_model(info).base_model)
    return cast("nn.ModuleList", base.get_submodule(FAMILIES[info.family].blocks))[start:]


def _empty_model(info: BackboneInfo) -> PreTrainedModel:
    """On torch's meta device: every module and shape, and no number."""
    config = load_config(config_folder(info), info.path)
    kind = AutoModel if info.is_encoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            # An encoder's pooler is a head that slicing does not use.
            model: PreTrainedModel = kind.from_config(
                config, **({"add_pooling_layer": False} if info.is_encoder else {})
            )
            model.tie_weights()
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"config.json of {info.path} is refused: {first_line(error)}", path=info.path) from error
    return model


def _group(
    names: tuple[str, ...],
    linears: Mapping[str, nn.Linear | Conv1D],
    block_of: Mapping[nn.Module, int],
    reads_embeddings: bool,
) -> LinearGroup:
    sides = [_sides(linears[name]) for name in names]
    n_out = sum(n_out for _, n_out in sides)
    return LinearGroup(names, sides[0][0], n_out, block_of.get(linears[names[0]]), reads_embeddings)


def _sides(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs; `Conv1D` stores its weight the other way round."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
