"""Where the families keep heads and neurons in the weights of a block, found by the paths of its modules.

A layout stands for every family that has these paths: `self_attn.q_proj` is Llama, Mistral, Qwen and Gemma,
`attention.self.query` BERT and its kin. What a family has on top that could tell one head or neuron from another, a
parameter inside attention or feed-forward part that is not listed here, is refused rather than taken as harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cloister.adapters._attach import blocks_of
from cloister.adapters._spf_spec import PartName
from cloister.errors import UnsupportedLayerError

PlainLinear = nn.Linear | Conv1D

_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
_NORMS_OF_A_HEAD = ("q_norm.weight", "k_norm.weight")  # of one head's features, the same for all heads
_SHARES_KEYS = ("is_kv_shared_layer", "store_full_length_kv")  # Gemma 3n: other blocks read this one's keys


@dataclass(frozen=True)
class _Layout:
    """Paths in a block.

    Attributes:
        attention: the module that knows the size of a head.
        qkv: query, key and value, or the one weight that is all three.
        out: the attention's output projection.
        feed_forward: the module that holds the first feed-forward weights.
        up: those whose rows are neurons.
        down: the one whose columns are.
        by_head: all three in one weight lie as [head][query, key, value], not as [query, key, value][head].
    """

    attention: str
    qkv: tuple[str, ...]
    out: str
    feed_forward: str
    up: tuple[str, ...]
    down: str
    by_head: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.out, *self.up, self.down)


_LAYOUTS = (
    _Layout(
        "self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj",
        "mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
    ),
    _Layout(
        "attention.self", ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense", "intermediate", ("intermediate.dense",), "output.dense",
    ),
    _Layout("attn", ("attn.c_attn",), "attn.c_proj", "mlp", ("mlp.c_fc",), "mlp.c_proj"),
    _Layout(
        "attention", ("attention.query_key_value",), "attention.dense",
        "mlp", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", by_head=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The units of one kind in a block: its head groups, or its neurons.

    Attributes:
        name: "heads" or "neurons".
        n_units: how many there are.
        rows: by path of a linear, how many rows a unit has in each section of its weight [out, in]; a section holds
            the rows of all units, one after another, and the sections follow each other.
        column: path of the linear that reads what the units compute.
        width: columns of a unit in it.
    """

    name: PartName
    n_units: int
    rows: Mapping[str, tuple[int, ...]]
    column: str
    width: int


class BlockParts(NamedTuple):
    """Both kinds of units of a block. The heads' `column` is the attention's output projection."""

    heads: Part
    neurons: Part


def block_parts(block: nn.Module) -> BlockParts:
    """Head groups and neurons of a block that has no adapter.

    Raises:
        UnsupportedLayerError: the block's layout is not known, or it has something that permuted heads or neurons
            would not reach.
    """
    layout = next((layout for layout in _LAYOUTS if all(_has(block, path) for path in layout.linears)), None)
    kind = type(block).__name__
    if layout is None:
        raise UnsupportedLayerError(
            f"SPF knows no layout of heads and neurons for {kind}",
            hint="Llama, Mistral, Qwen2, Qwen3, Gemma, BERT, GPT-2 and GPT-NeoX are known; LoRA works on every family",
        )
    linears = {path: _linear(block, path) for path in layout.linears}
    _refuse_what_is_not_listed(block, layout)
    return BlockParts(_heads(block, layout, linears), _neurons(kind, layout, linears))


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a far side, or of a transformers model.

    Raises:
        UnsupportedLayerError: they are not found.
    """
    own = getattr(model, "blocks", None)
    return own if isinstance(own, nn.ModuleList) else blocks_of(model)[1]


def _heads(block: nn.Module, layout: _Layout, linears: Mapping[str, PlainLinear]) -> Part:
    kind, size = type(block).__name__, _head_size(block, layout)
    n_rows = [out_features(linears[path]) for path in layout.qkv]
    if is_fused := len(n_rows) == 1:
        n_rows = [n_rows[0] // 3] * 3
    fits = size > 0 and not any(n % size for n in n_rows)
    if not fits or n_rows[1] != n_rows[2] or n_rows[0] % n_rows[1] or in_features(linears[layout.out]) != n_rows[0]:
        raise UnsupportedLayerError(
            f"the attention of {kind} has query, key and value of {n_rows} features and heads of {size}",
            hint="SPF needs whole heads, and the same number of query heads for every key head",
        )
    n_groups, width = n_rows[1] // size, n_rows[0] // (n_rows[1] // size)
    widths = [(width,), (size,), (size,)]
    if is_fused:
        widths = [(3 * size,) if layout.by_head else (size, size, size)]
    rows = dict(zip(layout.qkv, widths, strict=True))
    return Part("heads", n_groups, rows, layout.out, width)


def _head_size(block: nn.Module, layout: _Layout) -> int:
    """Features of one head, as the attention says; 0 where it does not."""
    attention = block.get_submodule(layout.attention)
    return next((size for name in _HEAD_SIZES if isinstance(size := getattr(attention, name, None), int)), 0)


def _neurons(kind: str, layout: _Layout, linears: Mapping[str, PlainLinear]) -> Part:
    n_neurons = in_features(linears[layout.down])
    if any(out_features(linears[path]) != n_neurons for path in layout.up):
        raise UnsupportedLayerError(
            f"the feed-forward part of {kind} has {n_neurons} columns and another number of rows"
        )
    return Part("neurons", n_neurons, dict.fromkeys(layout.up, (1,)), layout.down, 1)


def _refuse_what_is_not_listed(block: nn.Module, layout: _Layout) -> None:
    """A parameter that is no part of the layout may tell heads or neurons apart, and permuting would not move it."""
    attention, size = block.get_submodule(layout.attention), _head_size(block, layout)
    extra = [f"{layout.attention}.{name}" for name in _SHARES_KEYS if getattr(attention, name, False)]
    for inside in (layout.attention, layout.feed_forward):
        for name, parameter in block.get_submodule(inside).named_parameters():
            is_of_a_head = name in _NORMS_OF_A_HEAD and tuple(parameter.shape) == (size,)
            if not is_of_a_head and f"{inside}.{name}".rpartition(".")[0] not in layout.linears:
                extra.append(f"{inside}.{name}")
    if extra:
        raise UnsupportedLayerError(
            f"{type(block).__name__} has {extra[0]}, which SPF does not know how to permute with its heads or neurons",
            hint="LoRA works on every family",
        )


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _linear(block: nn.Module, path: str) -> PlainLinear:
    module = block.get_submodule(path)
    if type(module) not in (nn.Linear, Conv1D):
        raise UnsupportedLayerError(
            f"{path} is a {type(module).__name__}, not a plain linear",
            hint="SPF needs weights that are neither quantised nor adapted",
        )
    return cast("PlainLinear", module)


# --- rows of units ----------------------------------------------------------------------------------------------------


def dense_weight(linear: Any) -> Float[Tensor, "out in"]:
    """The weight as [out, in], a view where it is stored transposed."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def out_features(linear: PlainLinear) -> int:
    return dense_weight(linear).shape[0]


def in_features(linear: PlainLinear) -> int:
    return dense_weight(linear).shape[1]


def unit_rows(order: Int[Tensor, " units"], widths: Sequence[int]) -> Int[Tensor, " rows"]:
    """Which old row each new row is, where the units come in this order within every section."""
    found, at = [], 0
    for width in widths:
        rows = torch.arange(len(order) * width).view(len(order), width) + at
        found.append(rows[order].reshape(-1))
        at += len(order) * width
    return torch.cat(found)


def unit_segments(n_chosen: int, n_units: int, widths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Where the rows of the first `n_chosen` units lie: one run [start, stop) for each section."""
    starts = [n_units * sum(widths[:i]) for i in range(len(widths))]
    return tuple((start, start + n_chosen * width) for start, width in zip(starts, widths, strict=True))


def unit_sums(values: Float[Tensor, " rows"], n_units: int, widths: Sequence[int]) -> Float[Tensor, " units"]:
    """Sums of a number by row over the rows of each unit."""
    sections = values.split([n_units * width for width in widths])
    parts = [section.view(n_units, -1).sum(dim=1) for section in sections]
    return torch.stack(parts).sum(dim=0)


def rows_of(block: nn.Module, parts: BlockParts) -> Iterator[tuple[Part, str, PlainLinear]]:
    """Every linear of a block whose rows may train, with its part and path."""
    for part in parts:
        for path in part.rows:
            yield part, path, cast("PlainLinear", block.get_submodule(path))
