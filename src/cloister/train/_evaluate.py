"""How good a far side is on held-out features, of every client and overall; and its answers to questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cloister.errors import DataError
from cloister.train._batching import collate
from cloister.train._loss import Scored, score
from cloister.train._read_ahead import ReadAhead

if TYPE_CHECKING:
    from cloister.slicing import FarSide
    from cloister.train._data import TaskSpec
    from cloister.train._features import ExampleKey, Features
    from cloister.train._shards import Feature

_TOKENS_AT_ONCE = 4096  # padding included; enough for the kernels, small beside the backbone


@dataclass(frozen=True)
class EvalResult:
    """A metric on held-out examples.

    Attributes:
        name: "accuracy" (higher is better) or "perplexity" (lower is better, at least 1).
        value: over all examples of all clients.
        per_client: the same on each client's own examples; only clients that have some.
        n: examples of each client.
        loss: mean negative log likelihood, in nats, per label or per token.
        extra: "macro_f1", or "token_accuracy".
    """

    name: str
    value: float
    per_client: dict[str, float]
    n: dict[str, int]
    loss: float
    extra: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As result.json has it."""
        return {
            "name": self.name,
            "value": self.value,
            "per_client": dict(self.per_client),
            "n": dict(self.n),
            "loss": self.loss,
            "extra": dict(self.extra),
        }


@dataclass(frozen=True)
class EvalSums:
    """What one client's held-out examples add to a metric; sums of several clients make the metric of all.

    Attributes:
        client: whose.
        n: examples.
        n_targets: labels, or tokens that carry loss.
        n_correct: targets that were the most likely.
        loss_sum: of the targets' negative log likelihoods, in nats.
        pairs: how often a label was predicted as which, as (label, predicted, count); empty for causal-lm.
    """

    client: str
    n: int
    n_targets: int
    n_correct: int
    loss_sum: float
    pairs: tuple[tuple[int, int, int], ...] = ()


def evaluate(far: FarSide, source: Features, task: TaskSpec, split: str = "test") -> EvalResult:
    """Measures a far side on one split of every client.

    Accuracy for sequence-classification; for causal-lm the perplexity of the completions.

    Raises:
        DataError: the split is empty.
    """
    return merge_sums(evaluate_sums(far, source, split), task)


def evaluate_sums(far: FarSide, source: Features, split: str = "test") -> list[EvalSums]:
    """The sums of every client that has examples in the split; raises `DataError` where nobody has."""
    far.eval()
    keys = source.split(split)
    if not keys:
        raise DataError(f"no client has an example in its {split} split", hint="look at the clients' `test` files")
    # Examples of one length side by side need no padding, and a metric does not depend on their order.
    order = sorted(range(len(keys)), key=lambda i: source.n_tokens(keys[i]))
    rows: list[_Row] = []
    with ReadAhead(source, [keys[i] for i in order]) as ahead:
        for batch in _by_tokens(order, [source.n_tokens(key) for key in keys]):
            features = ahead.take([keys[i] for i in batch])
            rows += _rows([keys[i] for i in batch], features, score(far, features))
    return [_sums(client, rows) for client in sorted({row.client for row in rows})]


@torch.no_grad()
def predict(far: FarSide, features: Sequence[Feature], task: TaskSpec) -> Tensor:
    """Answers to questions, in their order. *secret*: for the client that asked.

    Returns:
        sequence-classification: probabilities, float [n, n_labels]. causal-lm: most likely next token, int64 [n].
    """
    far.eval()
    answers: list[Tensor] = [torch.empty(0)] * len(features)
    lengths = [len(feature.hidden) for feature in features]
    order = sorted(range(len(features)), key=lengths.__getitem__)
    for batch in _by_tokens(order, lengths):
        hidden, mask = collate([features[i].hidden for i in batch])
        if task.name == "sequence-classification":
            found = far(hidden, mask).softmax(dim=-1)
        else:
            read = far.features(hidden, mask)
            found = far.head(read[torch.arange(len(batch)), mask.sum(dim=1) - 1]).argmax(dim=-1)
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
    if answers:
        return torch.stack(answers)
    return torch.empty(0, len(task.labels)) if task.labels else torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class _Row:
    client: str
    label: int | None
    predicted: int | None
    loss_sum: float
    n_targets: int
    n_correct: int


def _rows(keys: Sequence[ExampleKey], features: Sequence[Feature], scored: Scored) -> list[_Row]:
    predicted = [None] * len(keys) if scored.predicted is None else scored.predicted.tolist()
    parts = (scored.loss_sum.tolist(), scored.n_targets.tolist(), scored.n_correct.tolist())
    return [
        _Row(key.client, feature.label, guess, loss_sum, n_targets, n_correct)
        for key, feature, guess, loss_sum, n_targets, n_correct in zip(keys, features, predicted, *parts, strict=True)
    ]


def _sums(client: str, rows: Sequence[_Row]) -> EvalSums:
    mine = [row for row in rows if row.client == client]
    pairs = Counter((row.label, row.predicted) for row in mine if row.label is not None and row.predicted is not None)
    return EvalSums(
        client,
        len(mine),
        sum(row.n_targets for row in mine),
        sum(row.n_correct for row in mine),
        math.fsum(row.loss_sum for row in mine),
        tuple((label, predicted, count) for (label, predicted), count in sorted(pairs.items())),
    )


def merge_sums(sums: Sequence[EvalSums], task: TaskSpec) -> EvalResult:
    """The metric over all clients' examples, and each client's own."""
    n = {found.client: found.n for found in sums}
    loss = _mean_loss(sums)
    if task.name == "sequence-classification":
        per_client = {found.client: _hit_rate([found]) for found in sums}
        pairs = [pair for found in sums for pair in found.pairs]
        return EvalResult("accuracy", _hit_rate(sums), per_client, n, loss, {"macro_f1": macro_f1(pairs)})
    per_client = {found.client: _perplexity(_mean_loss([found])) for found in sums}
    return EvalResult("perplexity", _perplexity(loss), per_client, n, loss, {"token_accuracy": _hit_rate(sums)})


def macro_f1(pairs: Iterable[tuple[int, int, int]]) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN), over the classes that occur among labels or predictions.

    Args:
        pairs: (label, predicted, count), in any order and as often as one likes.
    """
    hits: Counter[int] = Counter()
    labelled: Counter[int] = Counter()
    predicted: Counter[int] = Counter()
    for label, guess, count in pairs:
        hits[label] += count if label == guess else 0
        labelled[label] += count
        predicted[guess] += count
    classes = set(labelled) | set(predicted)
    return sum(2 * hits[c] / (labelled[c] + predicted[c]) for c in classes) / len(classes)


def _hit_rate(sums: Sequence[EvalSums]) -> float:
    return sum(found.n_correct for found in sums) / max(1, sum(found.n_targets for found in sums))


def _mean_loss(sums: Sequence[EvalSums]) -> float:
    return math.fsum(found.loss_sum for found in sums) / max(1, sum(found.n_targets for found in sums))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond 709 a float overflows, and such a model is equally useless


def _by_tokens(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Runs of `order`, which is sorted by length, that stay under the token limit when padded."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
