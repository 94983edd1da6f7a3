"""What the tuned model has to beat: the majority class, a linear head on the frozen backbone, each client alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from cloister.errors import ConfigError, DataError, Problem
from cloister.train._batching import collate
from cloister.train._evaluate import _by_tokens, evaluate, macro_f1
from cloister.train._far import FarTrainer, StepInfo
from cloister.train._features import HELD_OUT
from cloister.train._read_ahead import ReadAhead

if TYPE_CHECKING:
    from cloister.adapters import FarAdapterSpec
    from cloister.slicing import FarSide
    from cloister.train._data import TaskSpec
    from cloister.train._features import ExampleKey, Features
    from cloister.train._schedule import TrainSpec

_L2_GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_HELD_OUT = 0.2
_MAX_ITERATIONS = 300


def majority_baseline(source: Features, task: TaskSpec) -> dict[str, Any]:
    """Accuracy of always answering the class that is most frequent in training; ties go to the lower index.

    Raises:
        ConfigError: the task has no classes.
        DataError: there are no training or no test examples.
    """
    _needs_classes(task, "majority")
    counts = Counter(_labels(source, source.split("train")).tolist())
    if not counts:
        raise DataError("no client has a training example")
    label = min(counts, key=lambda cls: (-counts[cls], cls))
    keys = source.split("test")
    result = _accuracy(keys, _labels(source, keys), torch.full((len(keys),), label))
    return result | {"label": task.labels[label] if label < len(task.labels) else str(label)}


def linear_head_baseline(far: FarSide, source: Features, task: TaskSpec, seed: int = 0) -> dict[str, Any]:
    """Accuracy of multinomial logistic regression on the frozen backbone's pooled features.

    Trained well, so that beating it means something: standardised features, L-BFGS to convergence, and the L2 penalty
    chosen on a fifth of the training examples that is held out, then fitted again on all of them.

    Args:
        far: the frozen far side, before any training.
        source: every client's features.
        task: sequence-classification.
        seed: of the choice of what is held out.

    Raises:
        ConfigError: the task has no classes.
        DataError: there are no training or no test examples.
    """
    _needs_classes(task, "linear-head")
    train, test = source.split("train"), source.split("test")
    if not train:
        raise DataError("no client has a training example")
    x, y = _pooled(far, source, train), _labels(source, train)
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-8)
    x = (x - mean) / std
    n_labels = len(task.labels)
    l2 = _choose_l2(x, y, n_labels, seed)
    weight, bias = _fit(x, y, n_labels, l2)
    predicted = ((_pooled(far, source, test) - mean) / std @ weight + bias).argmax(dim=1) if test else torch.empty(0)
    return _accuracy(test, _labels(source, test), predicted) | {"l2": l2}


def alone_baseline(  # noqa: PLR0917 - as many inputs as FarTrainer has
    far: FarSide,
    source: Features,
    client: str,
    spec: TrainSpec,
    adapter: FarAdapterSpec,
    task: TaskSpec,
    *,
    on_step: Callable[[StepInfo], None] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """What one client reaches alone: the same training on its own examples, tested on everybody's.

    With `spec.patience` it stops early by its own held-out examples. A client that has too few to hold any out trains
    all epochs, on all of them.

    Args:
        far: a fresh far side; it is tuned here and not to be used for anything else.
        source: every client's features.
        client: whose training examples are used.
        spec, adapter, task: as for the common training; SPF's criteria look at this client's examples alone.
        on_step, stop: as FarTrainer. After a stop the figures are of the unfinished model.

    Raises:
        DataError: the client has no training examples.
    """
    own = source.only(client)
    if not own.hold_out(spec.held_out, spec.seed).split(HELD_OUT):
        spec = replace(spec, patience=None)
    FarTrainer(far, spec, adapter, task, own, on_step=on_step, stop=stop).train()
    return evaluate(far, source, task).as_dict()


def _needs_classes(task: TaskSpec, name: str) -> None:
    if task.name != "sequence-classification":
        raise ConfigError([Problem("evaluation.baselines", f"{name!r} exists for sequence-classification only")])


def _labels(source: Features, keys: Sequence[ExampleKey]) -> Tensor:
    return torch.tensor([source.label(key) for key in keys], dtype=torch.long)


def _accuracy(keys: Sequence[ExampleKey], labels: Tensor, predicted: Tensor) -> dict[str, Any]:
    if not keys:
        raise DataError("no client has a test example")
    hits = (labels == predicted).double()
    mine = {client: torch.tensor([key.client == client for key in keys]) for client in {key.client for key in keys}}
    return {
        "name": "accuracy",
        "value": float(hits.mean()),
        "per_client": {client: float(hits[mine[client]].mean()) for client in sorted(mine)},
        "n": {client: int(mine[client].sum()) for client in sorted(mine)},
        "extra": {"macro_f1": macro_f1((*pair, 1) for pair in zip(labels.tolist(), predicted.tolist(), strict=True))},
    }


@torch.no_grad()
def _pooled(far: FarSide, source: Features, keys: Sequence[ExampleKey]) -> Tensor:
    """float64 [n, H], in the order of `keys`."""
    far.eval()
    lengths = [source.n_tokens(key) for key in keys]
    rows: list[Tensor] = [torch.empty(0)] * len(keys)
    order = sorted(range(len(keys)), key=lengths.__getitem__)
    with ReadAhead(source, [keys[i] for i in order]) as ahead:
        for batch in _by_tokens(order, lengths):
            hidden, mask = collate([found.hidden for found in ahead.take([keys[i] for i in batch])])
            for i, row in zip(batch, far.pooled(hidden, mask).double(), strict=True):
                rows[i] = row
    return torch.stack(rows)


def _choose_l2(x: Tensor, y: Tensor, n_labels: int, seed: int) -> float:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    n_held = max(1, int(len(x) * _HELD_OUT))
    held, kept = order[:n_held], order[n_held:]
    if len(kept) == 0:
        return _L2_GRID[0]
    scored: list[tuple[float, float, float]] = []
    start: tuple[Tensor, Tensor] | None = None
    for l2 in _L2_GRID:  # from strong to weak: each solution is a good start for the next
        weight, bias = start = _fit(x[kept], y[kept], n_labels, l2, start)
        logits = x[held] @ weight + bias
        hits = float((logits.argmax(dim=1) == y[held]).double().mean())
        scored.append((hits, -float(functional.cross_entropy(logits, y[held])), l2))
    return max(scored)[2]


def _fit(
    x: Tensor, y: Tensor, n_labels: int, l2: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Minimises mean cross-entropy + l2 / 2 * |W|^2, which is convex, until the gradient vanishes."""
    weight = torch.zeros(x.shape[1], n_labels, dtype=x.dtype) if start is None else start[0].clone()
    bias = torch.zeros(n_labels, dtype=x.dtype) if start is None else start[1].clone()
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-10,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ weight + bias, y) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()
