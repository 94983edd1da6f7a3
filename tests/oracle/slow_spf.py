"""SPF done slowly and obviously: which rows are whose, family by family, from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

BLOCKS = {"bert": "encoder.layer", "gpt2": "h"}
UP = {"bert": ("intermediate.dense",), "gpt2": ("mlp.c_fc",), "gpt_neox": ("mlp.dense_h_to_4h",)}
OUT = {"bert": "attention.output.dense", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}


def blocks_of(model: Any, family: str) -> Any:
    base = model.base_model
    return base.get_submodule(BLOCKS.get(_name(family), "layers"))


def n_units(model: Any, family: str) -> tuple[int, int]:
    """Head groups and neurons of a block."""
    config = model.config
    n_groups = config.num_attention_heads
    if _name(family) not in ("bert", "gpt2", "gpt_neox"):
        n_groups = config.num_key_value_heads
    inner = config.n_inner if _name(family) == "gpt2" else config.intermediate_size
    return n_groups, inner


def rows_of_group(model: Any, family: str, group: int) -> dict[str, list[int]]:
    """Rows of the weights, as [out, in], that belong to one head group."""
    config = model.config
    n_heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    own = list(range(group * size, (group + 1) * size))
    if _name(family) == "bert":
        return {f"attention.self.{name}": own for name in ("query", "key", "value")}
    if _name(family) == "gpt2":
        return {"attn.c_attn": [section * config.hidden_size + row for section in range(3) for row in own]}
    if _name(family) == "gpt_neox":
        return {"attention.query_key_value": list(range(group * 3 * size, (group + 1) * 3 * size))}
    per_group = n_heads // config.num_key_value_heads
    queries = list(range(group * per_group * size, (group + 1) * per_group * size))
    return {"self_attn.q_proj": queries, "self_attn.k_proj": own, "self_attn.v_proj": own}


def rows_of_neuron(family: str, neuron: int) -> dict[str, list[int]]:
    return {path: [neuron] for path in UP.get(_name(family), ("mlp.gate_proj", "mlp.up_proj"))}


def out_path(family: str) -> str:
    return OUT.get(_name(family), "self_attn.o_proj")


def units_of(model: Any, family: str) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    n_groups, n_neurons = n_units(model, family)
    heads = [rows_of_group(model, family, group) for group in range(n_groups)]
    return heads, [rows_of_neuron(family, neuron) for neuron in range(n_neurons)]


def dense(linear: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A weight, or its gradient, as [out, in]."""
    return tensor.t() if type(linear).__name__ == "Conv1D" else tensor


def linears(model: Any, family: str) -> Iterator[tuple[int, str, Any]]:
    """Block, path in it, and linear, of every weight whose rows SPF may train."""
    paths = [*rows_of_group(model, family, 0), *rows_of_neuron(family, 0)]
    for i, block in enumerate(blocks_of(model, family)):
        for path in paths:
            yield i, path, block.get_submodule(path)


def largest(scores: list[float], n: int) -> tuple[int, ...]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return tuple(sorted(order[:n]))


def _name(family: str) -> str:
    return "bert" if family.startswith("bert") else family
