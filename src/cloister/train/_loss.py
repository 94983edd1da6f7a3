"""What is minimised and measured, for either task: sums over examples or tokens, so that pieces of a batch add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from cloister.train._batching import collate

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from cloister.slicing import FarSide
    from cloister.train._shards import Feature

IGNORED = -100
_MAX_LOGITS = 1 << 24  # numbers at once, 64 MiB: the logits of a large vocabulary would otherwise exceed all else


@dataclass(frozen=True)
class Scored:
    """What a piece of a batch scored, one entry per example. *secret*: it depends on the examples' labels.

    Attributes:
        loss_sum: sum of the negative log likelihoods of its targets.
        n_targets: labels, or tokens that carry loss.
        n_correct: targets that were the most likely.
        predicted: most likely class (sequence-classification), else None.
    """

    loss_sum: Float[Tensor, " batch"]
    n_targets: Int[Tensor, " batch"]
    n_correct: Int[Tensor, " batch"]
    predicted: Int[Tensor, " batch"] | None = None


def n_targets(feature: Feature) -> int:
    """How many predictions of this example carry loss: 1, or its completion's tokens (the first token has none)."""
    return 1 if feature.labels is None else int((feature.labels[1:] != IGNORED).sum())


def backward(far: FarSide, features: Sequence[Feature], weights: Sequence[float]) -> float:
    """Adds the gradient of `sum_i weights[i] * loss_sum_i` to the far side's trainable parameters.

    Args:
        far: the far side with its adapter.
        features: secret; examples that are computed side by side.
        weights: of each example; whoever calls has divided by the number of targets of the whole step.

    Returns:
        that sum.
    """
    hidden, mask = collate([feature.hidden for feature in features])
    scale = torch.tensor(weights)
    if features[0].labels is None:
        losses = functional.cross_entropy(far(hidden, mask), _classes(features), reduction="none")
        loss = (losses * scale).sum()
        loss.backward()
        return float(loss.detach())
    read, targets, rows = _tokens_with_loss(far.features(hidden, mask), features)
    if len(targets) == 0:
        return 0.0
    # The head runs on few tokens at a time and gives back only their gradient, so the logits of a whole batch, which
    # for a large vocabulary are larger than everything else together, never exist at once.
    grads: list[Tensor] = []
    total = 0.0
    for part in torch.arange(len(targets)).split(_tokens_at_once(far)):
        leaf = read.detach()[part].requires_grad_()
        losses = functional.cross_entropy(far.head(leaf), targets[part], reduction="none")
        loss = (losses * scale[rows[part]]).sum()
        loss.backward()
        total += float(loss.detach())
        grads.append(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
    read.backward(torch.cat(grads))
    return total


@torch.no_grad()
def score(far: FarSide, features: Sequence[Feature]) -> Scored:
    """Loss and hits of a piece, without gradients."""
    hidden, mask = collate([feature.hidden for feature in features])
    if features[0].labels is None:
        logits, classes = far(hidden, mask), _classes(features)
        losses = functional.cross_entropy(logits, classes, reduction="none")
        predicted = logits.argmax(dim=-1)
        return Scored(losses, torch.ones_like(classes), (predicted == classes).long(), predicted)
    read, targets, rows = _tokens_with_loss(far.features(hidden, mask), features)
    loss_sum = torch.zeros(len(features))
    hits, counts = torch.zeros(len(features), dtype=torch.long), torch.bincount(rows, minlength=len(features))
    for part in torch.arange(len(targets)).split(_tokens_at_once(far)) if len(targets) else ():
        logits = far.head(read[part])
        loss_sum.index_add_(0, rows[part], functional.cross_entropy(logits, targets[part], reduction="none"))
        hits.index_add_(0, rows[part], (logits.argmax(dim=-1) == targets[part]).long())
    return Scored(loss_sum, counts, hits)


def _classes(features: Sequence[Feature]) -> Tensor:
    return torch.tensor([feature.label for feature in features])


def _tokens_with_loss(
    features: Float[Tensor, "batch tokens features"], examples: Sequence[Feature]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the head reads, what it should say, and whose token it is: position t predicts the token at t + 1."""
    at, targets, rows = [], [], []
    for row, example in enumerate(examples):
        labels = example.labels if example.labels is not None else torch.empty(0, dtype=torch.long)
        positions = (labels[1:] != IGNORED).nonzero()[:, 0]
        at.append(positions + row * features.shape[1])
        targets.append(labels[1:][positions])
        rows.append(torch.full_like(positions, row))
    return features.flatten(0, 1).index_select(0, torch.cat(at)), torch.cat(targets), torch.cat(rows)


def _tokens_at_once(far: FarSide) -> int:
    return max(1, _MAX_LOGITS // far.info.vocab_size)
