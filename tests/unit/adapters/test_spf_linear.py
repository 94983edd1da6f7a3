"""One folded linear: what it computes and learns, and that its trained rows stay a part of its weight."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from cloister.adapters import SpfLinear
from cloister.adapters._spf_layout import Part
from cloister.adapters._spf_linear import fold_columns, fold_rows, plain, unfolded
from cloister.errors import AdapterError, StateMismatchError

# Three sections, as a fused weight has them: 4 units with 2, 1 and 2 rows each.
WIDTHS = (2, 1, 2)
PART = Part("heads", 4, {"x": WIDTHS}, "y", 2)
ORDER = torch.tensor([1, 3, 0, 2])
CHOSEN = [2, 3, 6, 7, 9, 11, 14, 15, 18, 19]
"""Rows of the units 1 and 3, by hand."""


def linear(kind: type = nn.Linear, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    made = Conv1D(20, 6) if kind is Conv1D else nn.Linear(6, 20, bias=bias)
    if made.bias is not None:
        nn.init.normal_(made.bias)
    return made


def folded(kind: type = nn.Linear, *, bias: bool = True) -> SpfLinear:
    return fold_rows(linear(kind, bias=bias), PART, WIDTHS, ORDER, 2)


def dense(module: nn.Module) -> Tensor:
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1))


def same_but_order(spf: SpfLinear, y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected[..., spf.row_order])


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_which_rows_train(kind: type) -> None:
    spf = folded(kind)
    assert spf.segments == ((0, 4), (8, 10), (12, 16))
    chosen = torch.cat([spf.row_order[start:stop] for start, stop in spf.segments])
    assert sorted(chosen.tolist()) == CHOSEN
    weight = dense(linear(kind))
    for row, (start, stop) in zip(spf.rows, spf.segments, strict=True):
        assert torch.equal(row, weight[spf.row_order[start:stop]])
        assert row.requires_grad and row.is_contiguous()
    assert [name for name, p in spf.named_parameters() if p.requires_grad] == ["rows_0", "rows_1", "rows_2"]
    assert "10 rows train" in repr(spf)


@settings(deadline=None, max_examples=20)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), bias=st.booleans(), input_grad=st.booleans(),
    conv=st.booleans(),
)  # fmt: skip
def test_equals_the_plain_linear(shape: list[int], bias: bool, input_grad: bool, conv: bool) -> None:
    kind = Conv1D if conv else nn.Linear
    whole, spf = linear(kind, bias=bias), folded(kind, bias=bias)
    results = []
    for module in (whole, spf):
        x = x_of(*shape).requires_grad_(input_grad)
        y = module(x)
        order = slice(None) if module is whole else torch.argsort(spf.row_order)
        (y[..., order] * torch.linspace(-1, 1, 20)).sum().backward()
        results.append((y.detach()[..., order], x.grad))
    (expected, x_grad), (y, own_x_grad) = results
    torch.testing.assert_close(y, expected)
    if input_grad:
        torch.testing.assert_close(own_x_grad, x_grad)
    grad = whole.weight.grad.t() if conv else whole.weight.grad
    for row, (start, stop) in zip(spf.rows, spf.segments, strict=True):
        torch.testing.assert_close(row.grad, grad[spf.row_order[start:stop]])


def test_rows_that_do_not_train_get_no_gradient() -> None:
    spf = folded()
    spf.rows[1].requires_grad_(False)
    spf(x_of(3)).sum().backward()
    assert [row.grad is None for row in spf.rows] == [False, True, False]


def test_gradients_by_finite_differences() -> None:
    spf = folded().double()
    x = x_of(3).double().requires_grad_()
    # Rows are changed in place, as optimisers do, so the weight sees it.
    assert torch.autograd.gradcheck(lambda x, *_: spf(x), (x, *spf.rows))


def test_a_second_derivative_is_refused() -> None:
    spf = folded()
    x = x_of(3).requires_grad_()
    (grad,) = torch.autograd.grad(spf(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_gradient_of_the_whole_weight_is_ever_there() -> None:
    spf = folded()
    made: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and func._overloadpacket is not torch.ops.aten.t:  # a view is no new memory
                made.append(tuple(out.shape))
            return out

    with Watch():
        spf(x_of(7).requires_grad_()).sum().backward()
    assert not {(20, 6), (6, 20)} & set(made)
    assert (4, 6) in made


def test_a_step_is_seen_without_a_copy_and_moves_no_frozen_row() -> None:
    spf = folded()
    before, address = spf.weight.clone(), spf.weight.data_ptr()
    optimizer = torch.optim.AdamW(spf.rows, lr=0.1, weight_decay=0.0)
    first = spf(x_of(5)).square().mean()
    first.backward()
    optimizer.step()
    assert spf(x_of(5)).square().mean() < first
    assert spf.weight.data_ptr() == address
    trains = torch.zeros(20, dtype=torch.bool)
    for start, stop in spf.segments:
        trains[start:stop] = True
    assert torch.equal(spf.weight[~trains], before[~trains])
    assert (spf.weight[trains] != before[trains]).any(dim=1).all()
    n_state = sum(moment.numel() for state in optimizer.state.values() for moment in state.values() if moment.dim())
    assert n_state == 2 * len(CHOSEN) * 6


# --- ties -------------------------------------------------------------------------------------------------------------


def is_tied(spf: SpfLinear) -> bool:
    with torch.no_grad():
        for row in spf.rows:
            row.fill_(7.0)
    chosen = torch.cat([spf.weight[start:stop] for start, stop in spf.segments])
    spf(x_of(2).to(spf.weight.dtype))
    return bool((chosen == 7).all())


def test_ties_survive_a_deep_copy() -> None:
    spf = folded()
    twin = copy.deepcopy(nn.Sequential(spf))[0]
    assert is_tied(twin)
    assert not (spf.weight == 7).any(), "the copy is a part of the original"


def test_ties_survive_a_pickle() -> None:
    file = io.BytesIO()
    torch.save(folded(), file)
    file.seek(0)
    assert is_tied(torch.load(file, weights_only=False))


@pytest.mark.parametrize(
    "change",
    [lambda m: m.to(torch.float64), lambda m: m.double().float(), lambda m: m.cpu(), lambda m: m.share_memory()],
    ids=["type", "there-and-back", "device", "shared"],
)
def test_ties_survive_a_conversion(change: Callable[[nn.Module], nn.Module]) -> None:
    spf = folded()
    rows = spf.rows
    spf(x_of(2)).sum().backward()
    grads = [row.grad.clone() for row in rows]
    change(nn.Sequential(spf))
    assert all(a is b for a, b in zip(rows, spf.rows, strict=True)), "an optimiser would hold the old ones"
    for row, grad in zip(rows, grads, strict=True):
        assert row.grad.dtype == row.dtype
        torch.testing.assert_close(row.grad, grad.to(row.dtype))
    assert is_tied(spf)


@pytest.mark.parametrize("assign", [False, True])
def test_ties_survive_a_state_dict(assign: bool) -> None:
    spf, other = folded(), folded()
    with torch.no_grad():
        other.rows[0].mul_(2)
    state = other.state_dict()
    assert sorted(state) == ["bias", "row_order", "weight"]
    assert not spf.load_state_dict(copy.deepcopy(state), assign=assign).missing_keys
    assert torch.equal(spf.weight, other.weight)
    assert torch.equal(spf.rows[0], other.rows[0])
    assert is_tied(spf)


def test_a_broken_tie_is_an_error() -> None:
    spf = folded()
    spf.rows[1].data = spf.rows[1].data.clone()
    with pytest.raises(AdapterError, match="no longer a part of its weight"):
        spf(x_of(2))


@pytest.mark.parametrize("what", ["plain", "other-support"])
@pytest.mark.parametrize("strict", [False, True])
def test_weights_in_another_order_are_refused(what: str, strict: bool) -> None:
    spf, twin = nn.Sequential(folded()), linear()
    other = twin if what == "plain" else fold_rows(twin, PART, WIDTHS, torch.tensor([0, 1, 2, 3]), 2)
    with pytest.raises(StateMismatchError, match="another SPF support") as caught:
        spf.load_state_dict(nn.Sequential(other).state_dict(), strict=strict)
    assert caught.value.key == "0.weight"


def test_a_state_dict_without_this_weight_passes() -> None:
    spf = folded()
    assert spf.load_state_dict({"bias": torch.ones(20)}, strict=False).missing_keys
    assert (spf.bias == 1).all()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def test_under_autocast_it_is_the_plain_linear() -> None:
    whole, spf = linear(), folded()
    back = torch.argsort(spf.row_order)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, y = whole(x_of(9)), spf(x_of(9))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y[:, back], expected)
        (expected.float() * torch.linspace(-1, 1, 20)).sum().backward()
        (y[:, back].float() * torch.linspace(-1, 1, 20)).sum().backward()
    for row, (start, stop) in zip(spf.rows, spf.segments, strict=True):
        assert row.grad.dtype == torch.float32
        torch.testing.assert_close(row.grad, whole.weight.grad[spf.row_order[start:stop]], rtol=1e-2, atol=1e-2)


def test_rounded_frozen_rows_with_trained_rows_in_float32() -> None:
    spf, exact = folded(), folded()
    spf.round_frozen(torch.bfloat16)
    assert spf.is_rounded
    assert {row.dtype for row in spf.rows} == {torch.float32}
    y = spf(x_of(5).bfloat16())
    torch.testing.assert_close(y.float(), exact(x_of(5)), rtol=5e-2, atol=5e-2)
    y.sum().backward()
    with torch.no_grad():
        for row in spf.rows:
            assert row.grad.dtype == torch.float32
            row.add_(1.0)
    assert (spf(x_of(5).bfloat16()) != y).any(), "the step is not seen"
    whole = spf.whole_weight()
    for row, (start, stop) in zip(spf.rows, spf.segments, strict=True):
        assert torch.equal(whole[start:stop], row)
    frozen = torch.ones(20, dtype=torch.bool)
    for start, stop in spf.segments:
        frozen[start:stop] = False
    assert torch.equal(whole[frozen], exact.weight[frozen].bfloat16().float())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_over_rounded_rows_is_seen(fused: bool) -> None:
    spf = folded()
    spf.round_frozen(torch.bfloat16)
    optimizer = torch.optim.AdamW(spf.rows, lr=0.5, fused=fused)
    before = spf(x_of(5).bfloat16())
    spf(x_of(4).bfloat16())  # a second pass before the backward pass
    before.sum().backward()
    optimizer.step()
    with torch.inference_mode():
        after = spf(x_of(5).bfloat16())
    expected = x_of(5).bfloat16() @ spf.whole_weight().bfloat16().t() + spf.bias.bfloat16()
    torch.testing.assert_close(after, expected, rtol=2e-2, atol=2e-2)
    trains = [unit for start, stop in spf.segments for unit in range(start, stop)]
    assert (after[:, trains] != before[:, trains]).any(dim=0).all()


def test_rounded_rows_are_kept_by_copies_and_states() -> None:
    spf = folded()
    spf.round_frozen(torch.bfloat16)
    with torch.no_grad():
        spf.rows[0].add_(1.0)  # not yet rounded into the weight
    assert sorted(spf.state_dict()) == ["bias", "row_order", "rows_0", "rows_1", "rows_2", "weight"]
    other = folded()
    other.round_frozen(torch.bfloat16)
    other.load_state_dict(spf.state_dict())
    for twin in (copy.deepcopy(spf), other):
        assert torch.equal(twin.whole_weight(), spf.whole_weight())
        assert torch.equal(twin(x_of(2).bfloat16()), spf(x_of(2).bfloat16()))
    spf.float()
    assert not spf.is_rounded
    assert torch.equal(spf.weight, other.whole_weight())
    assert is_tied(spf)


# --- folding back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_plain_again_bit_for_bit(kind: type) -> None:
    before, spf = linear(kind), folded(kind)
    generator = torch.get_rng_state()
    again = plain(spf)
    assert torch.equal(torch.get_rng_state(), generator)
    assert type(again) is kind
    assert repr(again) == repr(before)
    assert torch.equal(again.weight, before.weight) and torch.equal(again.bias, before.bias)
    assert not any(p.requires_grad for p in again.parameters())
    assert again.weight.is_contiguous()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_columns_move_with_the_rows_before_them(kind: type) -> None:
    whole = Conv1D(5, 8) if kind is Conv1D else nn.Linear(8, 5)
    moved = copy.deepcopy(whole)
    part = Part("heads", 4, {}, "y", 2)
    fold_columns(moved, part, ORDER)
    x = torch.randn(3, 8)
    columns = torch.tensor([2, 3, 6, 7, 0, 1, 4, 5])
    torch.testing.assert_close(moved(x[:, columns]), whole(x))
    assert torch.equal(unfolded(moved, "weight", moved.weight), whole.weight)
    assert torch.equal(unfolded(moved, "bias", moved.bias), whole.bias)
    assert torch.equal(plain(moved).weight, whole.weight)
    with pytest.raises(StateMismatchError):
        moved.load_state_dict(whole.state_dict(), strict=False)
