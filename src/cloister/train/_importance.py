"""Placing the far side's adapter; for SPF by gradients, after a look at some of the training examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cloister.adapters import (
    BlockScores,
    LoraSpec,
    RowScores,
    add_lora,
    add_spf,
    check_spf,
    choose_support,
)
from cloister.errors import DataError
from cloister.train._checkpoint import load_trained, saved_support
from cloister.train._evaluate import _by_tokens
from cloister.train._loss import backward
from cloister.train._read_ahead import ReadAhead

if TYPE_CHECKING:
    from cloister.adapters import FarAdapterSpec, SpfSpec
    from cloister.slicing import FarSide
    from cloister.train._checkpoint import Checkpointer, TrainState
    from cloister.train._features import Features


def prepare_adapter(far: FarSide, adapter: FarAdapterSpec, *, seed: int) -> bool:
    """Place an adapter that needs no look at examples; of one that does, refuse now what would be refused then.

    Returns:
        whether it is placed.

    Raises:
        UnsupportedLayerError, AdapterError: as `add_lora` and `add_spf`, or a share of SPF selects nothing.
    """
    if isinstance(adapter, LoraSpec) or not adapter.needs_scores:
        place_adapter(far, adapter, None, seed=seed)
        return True
    check_spf(far.blocks, adapter)
    return False


def place_adapter(
    far: FarSide, adapter: FarAdapterSpec, source: Features | None, *, seed: int, state: TrainState | None = None
) -> None:
    """Place the adapter on a far side that has none; one that is there stays.

    Args:
        far: frozen.
        adapter: what to place.
        source: the examples that SPF's criteria gradient and fisher look at; only training examples are.
        seed: of LoRA's A, of the criterion random, and of the choice of examples.
        state: a saved state, whose support is placed again in place of a new choice.

    Raises:
        UnsupportedLayerError, AdapterError: as `add_lora`, `choose_support` and `add_spf`.
        StateMismatchError: the state's support does not fit this far side and adapter.
        DataError: there is no training example to look at.
    """
    if any(isinstance(module, BaseTunerLayer) for module in far.blocks.modules()):
        return
    if isinstance(adapter, LoraSpec):
        add_lora(far, adapter, seed=seed)
        return
    support = saved_support(state.tensors) if state else None
    if support is None:
        scores = row_scores(far, adapter, source, seed=seed) if adapter.needs_scores else None
        support = choose_support(far.blocks, adapter, scores=scores, seed=seed)
    add_spf(far, adapter, support, seed=seed)


def restore_tuned(far: FarSide, adapter: FarAdapterSpec, checkpoint: Checkpointer, *, seed: int) -> None:
    """Place the adapter as the finished training had it, and its numbers.

    Raises:
        StateMismatchError: there is no finished state, or it is of another adapter.
        DecryptionError, StoreError: as `Checkpointer.load`.
    """
    state = checkpoint.finished()
    place_adapter(far, adapter, None, seed=seed, state=state)
    load_trained(far, state)


def row_scores(far: FarSide, spec: SpfSpec, source: Features | None, *, seed: int) -> list[BlockScores]:
    """How much the backbone's heads and neurons matter for some training examples, chosen by the seed. *Secret*.

    Each example's gradient is that of its own loss, summed over its targets, at the backbone as it was published and,
    for classification, the head as the seed drew it.

    Raises:
        DataError: there is no training example.
    """
    keys = source.split("train") if source else []
    if source is None or not keys:
        raise DataError(f"there is no training example for the criterion {spec.criterion} to look at")
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))[: spec.criterion_examples]
    keys = sorted((keys[i] for i in order.tolist()), key=lambda key: (source.n_tokens(key), key))
    far.eval()
    with RowScores(far, spec.criterion) as rows, ReadAhead(source, keys) as ahead:
        for batch in _by_tokens(range(len(keys)), [source.n_tokens(key) for key in keys]):
            backward(far, ahead.take([keys[i] for i in batch]), [1.0] * len(batch))
    return rows.scores()
