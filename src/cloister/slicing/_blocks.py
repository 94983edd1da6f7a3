"""Running a stretch of a backbone's blocks, on either side of the cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from cloister.slicing._families import FAMILIES, LayerType
from cloister.slicing._weights import Skeleton

_MASKS = {
    "bidirectional": create_bidirectional_mask,
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class BlockRunner:
    """Runs the blocks [start, stop) of a backbone, with the masks and rotary positions they need.

    It holds no module: blocks and rotary module belong to the side that runs them, so an adapter may change them in
    place. Positions count from 0 at the first token, so padding must be on the right.
    """

    def __init__(self, config: PreTrainedConfig, start: int, stop: int) -> None:
        self._family = FAMILIES[config.model_type]
        self._config = config
        self._layer_types = layer_types(config)[start:stop]

    def run(
        self,
        blocks: nn.ModuleList,
        rotary: nn.Module | None,
        hidden: Float[Tensor, "batch tokens features"],
        attention_mask: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens features"]:
        """Run the blocks. `attention_mask` is 1 at real tokens and 0 at the padding after them."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        kinds = set(self._layer_types)
        masks = {kind: self._mask(kind, hidden, attention_mask, positions) for kind in kinds}
        turns = self._turns(kinds, rotary, hidden, positions)
        for block, kind in zip(blocks, self._layer_types, strict=True):
            hidden = block(hidden, attention_mask=masks[kind], position_ids=positions, **turns.get(kind, {}))
        return hidden

    def _mask(self, kind: LayerType, hidden: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor | None:
        kwargs: dict[str, Any] = {"config": self._config, "inputs_embeds": hidden, "attention_mask": attention_mask}
        if kind != "bidirectional":
            kwargs |= {"past_key_values": None, "position_ids": positions}
        return _MASKS[kind](**kwargs)

    def _turns(
        self, kinds: Iterable[LayerType], rotary: nn.Module | None, hidden: Tensor, positions: Tensor
    ) -> dict[str, dict[str, Any]]:
        """Per layer type, the keyword that carries cosines and sines."""
        if rotary is None:
            return {}
        if self._family.rotary_per_layer_type:
            return {kind: {"position_embeddings": rotary(hidden, positions, kind)} for kind in kinds}
        turn = rotary(hidden, positions)
        return {kind: {"position_embeddings": turn} for kind in kinds}


def take_blocks(
    skeleton: Skeleton, start: int, stop: int, *, dtype: torch.dtype
) -> tuple[nn.ModuleList, nn.Module | None]:
    """The blocks [start, stop) of a backbone with their weights, and its rotary module (None if it has none)."""
    family = FAMILIES[skeleton.info.family]
    # The blocks keep their place in the whole model (`layer_idx`): GPT-2 may scale attention by it.
    blocks = nn.ModuleList(cast("nn.ModuleList", skeleton.base.get_submodule(family.blocks))[start:stop])
    for block in blocks:
        skeleton.take(block, dtype=dtype)
    if not family.rotary or start == stop:
        return blocks, None
    # Its buffers are computed, not stored, so the skeleton's have no values.
    rotary = type(skeleton.base.get_submodule(family.rotary))
    return blocks, rotary(config=skeleton.config)


def layer_types(config: PreTrainedConfig) -> tuple[LayerType, ...]:
    """The attention of each block of a backbone: which earlier (or all) tokens it sees."""
    if config.model_type == "bert" and not config.is_decoder:
        return ("bidirectional",) * config.num_hidden_layers
    listed = getattr(config, "layer_types", None)
    if listed:
        return tuple(listed)
    sliding = config.model_type == "mistral" and config.sliding_window is not None
    return ("sliding_attention" if sliding else "full_attention",) * config.num_hidden_layers


def check_batch(first: Tensor, attention_mask: Tensor) -> None:
    """Refuse a batch that these positions would be wrong for.

    Raises:
        ValueError: shapes differ, or padding is not on the right.
    """
    if attention_mask.shape != first.shape[:2]:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, the batch is {tuple(first.shape[:2])}")
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError("padding must be on the right: positions are counted from the first token")
