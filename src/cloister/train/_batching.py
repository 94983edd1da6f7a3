"""Batches of boundary tensors with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cloister.offload import OffloadedLinear

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# What running a block forwards and backwards costs before it sees any token, and how fast it then computes, as timed
# with the upper half of all-MiniLM-L6-v2 (three blocks, 16 texts of 10 to 123 tokens) at float32 on a server core with
# AVX-512: cuts for an overhead of 20 to 80 tokens were equally fast, for 5 and 10 slower. Only the ratio matters, and
# only for speed. It is a constant so that the same job is cut the same way, and gives the same bits, on every run.
_BLOCK_OVERHEAD_S = 1.5e-3
_FLOP_PER_S = 140e9
_MAX_PIECE_EXAMPLES = 256  # keeps the search quick for huge batches, and a piece this large has no overhead to speak of
_NEVER = 1 << 40
_FLOP_PER_WEIGHT = 4  # a multiplication and an addition, forwards and backwards; frozen weights get no gradient


def overhead_tokens(blocks: nn.Module, n_blocks: int) -> int:
    """How many tokens could be computed in the time that one more piece costs.

    Over masked layers more than any batch has: they leave padding out anyway, and the accelerator would see the lengths
    of each piece in place of the batch's.
    """
    if any(isinstance(module, OffloadedLinear) for module in blocks.modules()):
        return _NEVER
    # Not the parameters: SPF's frozen weights are none, and what trains of them is a part of them.
    n_weights = sum(tensor.numel() for tensor in blocks.state_dict().values() if tensor.dim() >= 2)
    return int(n_blocks * _BLOCK_OVERHEAD_S * _FLOP_PER_S / (_FLOP_PER_WEIGHT * max(1, n_weights)))


def micro_batches(lengths: Sequence[int], *, overhead: int, max_examples: int) -> list[list[int]]:
    """Cuts a batch into pieces of similar length such that padding and pieces together cost least.

    The result is the same sum of losses: a piece only decides which examples are computed side by side. With texts of
    10 to 120 tokens, half of an ordinary padded batch is padding; of these pieces, a tenth is.

    Args:
        lengths: tokens of each example of the batch.
        overhead: cost of a piece, in tokens.
        max_examples: most examples of a piece.

    Returns:
        positions in `lengths`, longest piece first, so that memory reaches its peak at once.
    """
    max_examples = min(max_examples, _MAX_PIECE_EXAMPLES)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    # best[j]: least cost of the j shortest examples; a piece is a run of neighbours, padded to its last, the longest.
    best, cut = [0] * (len(order) + 1), [0] * (len(order) + 1)
    for j in range(1, len(order) + 1):
        longest = lengths[order[j - 1]]
        costs = [best[i] + (j - i) * longest + overhead for i in range(max(0, j - max_examples), j)]
        least = min(costs)
        best[j], cut[j] = least, max(0, j - max_examples) + costs.index(least)
    pieces: list[list[int]] = []
    j = len(order)
    while j > 0:
        pieces.append(order[cut[j] : j])
        j = cut[j]
    return pieces


def collate(
    hidden: Sequence[Float[Tensor, "tokens features"]],
) -> tuple[Float[Tensor, "batch longest features"], Int[Tensor, "batch longest"]]:
    """One padded batch and its attention mask. *secret*, as its parts are."""
    lengths = torch.tensor([len(h) for h in hidden])
    if len(hidden) == 1:
        return hidden[0][None], torch.ones(1, len(hidden[0]), dtype=torch.int64)
    batch = nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
    mask = (torch.arange(batch.shape[1]) < lengths[:, None]).to(torch.int64)
    return batch, mask
