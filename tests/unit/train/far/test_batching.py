"""Cutting a batch into pieces: every example once, and never dearer than the best of all ways."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cloister.offload import FrozenLinear, OffloadedGroup, OffloadSession
from cloister.ring import FAITHFUL
from cloister.testing import FakeAccelerator
from cloister.train._batching import collate, micro_batches, overhead_tokens

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=7)


def cost(pieces, lengths, overhead: int) -> int:
    return sum(overhead + len(piece) * max(lengths[i] for i in piece) for piece in pieces)


def cheapest(lengths, overhead: int, most: int) -> int:
    """All ways to cut the sorted batch, one after the other."""
    order, found = sorted(lengths), []
    for n in range(len(order)):
        for cuts in combinations(range(1, len(order)), n):
            ends = [0, *cuts, len(order)]
            runs = [order[a:b] for a, b in pairwise(ends)]
            if all(len(run) <= most for run in runs):
                found.append(sum(overhead + len(run) * max(run) for run in runs))
    return min(found)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, overhead=st.integers(0, 60), most=st.integers(1, 7))
def test_pieces_are_a_partition_and_cheapest(lengths, overhead, most):
    pieces = micro_batches(lengths, overhead=overhead, max_examples=most)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(lengths)))
    assert max(len(piece) for piece in pieces) <= most
    assert cost(pieces, lengths, overhead) == cheapest(lengths, overhead, most)


def test_longest_piece_comes_first_and_no_overhead_means_no_padding():
    lengths = [3, 9, 3, 9, 5]
    pieces = micro_batches(lengths, overhead=0, max_examples=5)
    assert [[lengths[i] for i in piece] for piece in pieces] == [[9, 9], [5], [3, 3]] or all(
        len({lengths[i] for i in piece}) == 1 for piece in pieces
    )
    assert lengths[pieces[0][0]] == 9


def test_a_huge_batch_is_cut_quickly_into_bounded_pieces():
    pieces = micro_batches([1 + i % 50 for i in range(5000)], overhead=30, max_examples=5000)
    assert sum(len(piece) for piece in pieces) == 5000
    assert max(len(piece) for piece in pieces) <= 256


def test_dear_pieces_are_not_cut():
    assert len(micro_batches([1, 100], overhead=10_000, max_examples=2)) == 1


def test_overhead_is_larger_for_small_models():
    small, large = nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleList([nn.Linear(800, 800)])
    assert overhead_tokens(small, 1) > 100 * overhead_tokens(large, 1)


def test_over_masked_layers_a_batch_is_not_cut():
    """The accelerator sees the sum of a batch's lengths, not those of pieces of like length."""
    with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
        masked = nn.Sequential(
            nn.Linear(2000, 2000), *OffloadedGroup(session, [FrozenLinear("x", torch.ones(4, 4))]).members
        )
        overhead = overhead_tokens(masked, 1)
    lengths = [1, 500] * 8
    assert [len(piece) for piece in micro_batches(lengths, overhead=overhead, max_examples=16)] == [16]
    assert len(micro_batches(lengths, overhead=overhead_tokens(masked[:1], 1), max_examples=16)) == 2


@pytest.mark.parametrize("lengths", [[4], [3, 1, 2], [2, 2]])
def test_collate_pads_on_the_right(lengths):
    parts = [torch.randn(n, 5) for n in lengths]
    batch, mask = collate(parts)
    assert batch.shape == (len(lengths), max(lengths), 5)
    assert mask.sum(dim=1).tolist() == lengths
    for row, part in zip(batch, parts, strict=True):
        assert torch.equal(row[: len(part)], part)
        assert not row[len(part) :].any()
