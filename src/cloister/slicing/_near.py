"""The near side: embeddings and early blocks, frozen and public, on the client's own machine."""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cloister.slicing._backbone import BackboneInfo, resolve_cut
from cloister.slicing._blocks import BlockRunner, check_batch, take_blocks
from cloister.slicing._families import FAMILIES
from cloister.slicing._weights import Skeleton


class NearSide(nn.Module):
    """Embeddings and blocks [0, `cut_layer`) of a backbone: text goes in, the boundary tensor comes out.

    Weights are public; input and output are *secret* and stay with the client until they are sealed. It is frozen and
    always in evaluation mode, so the same batch gives the same boundary tensor.
    """

    def __init__(self, info: BackboneInfo, cut_layer: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.info = info
        self.cut_layer = resolve_cut(info, cut_layer)
        skeleton = Skeleton(info, with_head=False)
        family = FAMILIES[info.family]
        self.embeddings = nn.ModuleList(skeleton.base.get_submodule(path) for path in family.embeddings)
        for module in self.embeddings:
            skeleton.take(module, dtype=dtype)
            _fill_computed_buffers(module, skeleton.config.hidden_size)
        self.blocks, self.rotary = take_blocks(skeleton, 0, self.cut_layer, dtype=dtype)
        self._runner = BlockRunner(skeleton.config, 0, self.cut_layer)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a frozen side has no other."""
        return super().train(False)

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"],
        token_type_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens features"]:
        """Compute the boundary tensor of a batch of texts, padded on the right.

        Args:
            input_ids: secret; token ids.
            attention_mask: 1 at real tokens, 0 at padding.
            token_type_ids: secret; BERT's first and second text of a pair. Other families have none and ignore it.

        Returns:
            Secret; fp32 features. Rows at padding are meaningless and must be dropped.

        Raises:
            ValueError: padding is not on the right, or shapes differ.
        """
        check_batch(input_ids, attention_mask)
        hidden = self._embed(input_ids, token_type_ids)
        return self._runner.run(self.blocks, self.rotary, hidden, attention_mask).float()

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if self.info.family == "bert":
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            return self.embeddings[0](input_ids=input_ids, token_type_ids=types, position_ids=positions)
        hidden = self.embeddings[0](input_ids)
        if self.info.family == "gpt2":
            hidden = hidden + self.embeddings[1](positions)
        return hidden


def load_near(info: BackboneInfo, cut_layer: int, *, dtype: torch.dtype = torch.float32) -> NearSide:
    """Load the near side of a backbone; the far side's weights are not read.

    Args:
        info: from `inspect_backbone`.
        cut_layer: number of near-side blocks, from `resolve_cut`.
        dtype: of weights and compute; the output is fp32 in any case.

    Raises:
        ModelError: the weights do not load, or the cut is outside the layers.
    """
    return NearSide(info, cut_layer, dtype=dtype)


def _fill_computed_buffers(module: nn.Module, hidden_size: int) -> None:
    """Give values to the buffers that a checkpoint does not store."""
    for name, buffer in list(module.named_buffers()):
        if name == "embed_scale":  # Gemma; the same tensor as transformers makes, so that rounding is the same
            module.register_buffer(name, torch.tensor(hidden_size**0.5), persistent=False)
        else:  # BERT's default position and type ids, which are always given here
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
