"""Scores by Gram matrices against the dense gradients of single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.oracle import slow_spf as slow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cloister.adapters import BlockScores, RowScores, SpfSpec, attach_spf, choose_support
from cloister.adapters._spf_layout import find_blocks
from cloister.errors import AdapterError

from .conftest import Load, batch

CASES = (
    "llama-causal-lm", "gemma3_text-causal-lm", "gpt2-causal-lm", "gpt_neox-causal-lm", "bert-sequence-classification",
)  # fmt: skip
MODEL = CASES[0]


def loss_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """A sum over examples and real tokens."""
    out = model(input_ids=ids, attention_mask=mask).logits
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    read = out if out.dim() == 2 else out * mask[:, :, None]
    return (torch.tanh(read) * weights).sum()


def dense_scores(model: Any, family: str, criterion: str) -> list[list[list[float]]]:
    """By block: scores of head groups and of neurons, from one backward pass and dense gradient for each example."""
    units = slow.units_of(model, family)
    scores = [[[0.0] * len(kind) for kind in units] for _ in slow.blocks_of(model, family)]
    given = batch()
    for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
        model.zero_grad()
        loss_of(model, ids[None, : mask.sum()], mask[None, : mask.sum()]).backward()
        for i, path, linear in slow.linears(model, family):
            norms = slow.dense(linear, linear.weight.grad).norm(dim=1)
            found = norms if criterion == "gradient" else norms.square()
            for kind, by_unit in zip(units, scores[i], strict=True):
                for unit, rows in enumerate(kind):
                    by_unit[unit] += float(found[rows.get(path, [])].sum())
    return scores


@pytest.mark.parametrize("criterion", ["gradient", "fisher"])
@pytest.mark.parametrize("case", CASES)
def test_equals_dense_gradients_of_single_examples(load: Load, case: str, criterion: str) -> None:
    model, family = load(case).eval().double(), case.partition("-")[0]
    expected = dense_scores(model, family, criterion)
    model.zero_grad(set_to_none=True)
    with RowScores(model, criterion) as rows:
        given = batch()
        loss_of(model, given["input_ids"], given["attention_mask"]).backward()
    assert rows.n_examples == 2
    found = rows.scores()
    for block, due in zip(found, expected, strict=True):
        for mine, slowly in zip(block, due, strict=True):
            assert mine.dtype == torch.float64
            torch.testing.assert_close(mine, torch.tensor(slowly, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    spec = SpfSpec(heads=0.5, neurons=0.3, criterion=criterion)
    support = choose_support(find_blocks(model), spec, scores=found)
    assert support.neurons[1] == slow.largest(expected[1][1], 19)
    assert attach_spf(model, spec, scores=found) is model


def test_batches_add_up(load: Load) -> None:
    model, given = load(MODEL).eval(), batch()
    with RowScores(model, "fisher") as together:
        loss_of(model, given["input_ids"], given["attention_mask"]).backward()
    with RowScores(model, "fisher") as apart:
        for i in (0, 1):
            loss_of(model, given["input_ids"][i : i + 1], given["attention_mask"][i : i + 1]).backward()
    assert apart.n_examples == together.n_examples == 2
    for one, other in zip(apart.scores(), together.scores(), strict=True):
        torch.testing.assert_close(tuple(one), tuple(other), rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was(load: Load) -> None:
    model, given = load(MODEL).eval(), batch()
    next(model.parameters()).requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), RowScores(model, "gradient"):
        loss_of(model, given["input_ids"], given["attention_mask"]).backward()
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_gradient_of_a_whole_weight_is_ever_there(load: Load) -> None:
    # Sizes that nothing else has: 9 tokens, 32 features, 64 neurons, 16 key features.
    model, given = load(MODEL).eval(), batch()
    weights = {tuple(linear.weight.shape) for _, _, linear in slow.linears(model, "llama")}
    made: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and func._overloadpacket is not torch.ops.aten.t:  # a view is no new memory
                made.append(tuple(out.shape))
            return out

    with RowScores(model, "fisher") as rows, Watch():
        loss_of(model, given["input_ids"], given["attention_mask"]).backward()
    assert rows.n_examples == 2
    assert (9, 9) in made
    assert not (weights | {shape[::-1] for shape in weights}) & set(made)


def test_without_a_loss_there_are_no_scores(load: Load) -> None:
    model, given = load(MODEL), batch()
    with RowScores(model, "gradient") as rows, torch.no_grad():
        model(**given)
    with pytest.raises(AdapterError, match="no example was scored"):
        rows.scores()


class Flat(nn.Module):
    """Calls a block's linear without a batch of texts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = find_blocks(model)


def test_inputs_without_examples_are_refused(load: Load) -> None:
    flat = Flat(load(MODEL))
    with RowScores(flat, "gradient"), pytest.raises(AdapterError, match="not of 2 dimensions"):
        flat.blocks[0].mlp.up_proj(torch.ones(3, 32)).sum().backward()


def scores_of(n_blocks: int = 3, heads: int = 2, neurons: int = 64, value: float = 1.0) -> list[BlockScores]:
    made = [BlockScores(torch.full((heads,), value).double(), torch.ones(neurons).double()) for _ in range(n_blocks)]
    assert repr(made[0]) == f"BlockScores({heads} head groups, {neurons} neurons)"
    return made


@pytest.mark.parametrize(
    ("criterion", "scores", "said"),
    [
        ("fisher", None, "needs scores"),
        ("gradient", None, "needs scores"),
        ("l1", scores_of(), "takes no scores"),
        ("random", scores_of(), "takes no scores"),
        ("fisher", scores_of(2), "of another model"),
        ("fisher", scores_of(heads=4), "of another model"),
        ("fisher", scores_of(neurons=65), "of another model"),
        ("fisher", scores_of(value=float("nan")), "not a finite number"),
        ("fisher", scores_of(value=float("inf")), "not a finite number"),
    ],
    ids=["fisher", "gradient", "l1", "random", "blocks", "heads", "neurons", "nan", "inf"],
)
def test_scores_that_do_not_fit_are_refused(load: Load, criterion: Any, scores: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        choose_support(find_blocks(load(MODEL)), SpfSpec(criterion=criterion), scores=scores)


def test_a_criterion_without_scores_is_refused(load: Load) -> None:
    with pytest.raises(AdapterError, match="l1 takes no scores"):
        RowScores(load(MODEL), "l1")


def test_it_shows_no_score() -> None:
    model = Flat.__new__(Flat)
    nn.Module.__init__(model)
    model.blocks = nn.ModuleList()
    assert repr(RowScores(model, "fisher")) == "RowScores('fisher', 0 examples)"
