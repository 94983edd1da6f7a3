"""Linears and groups as torch modules: autograd, checkpoints, sharing between members, types, chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cloister.errors import IntegrityError, OffloadError, PadReuseError, RingOverflowError
from cloister.offload import FrozenLinear, OffloadedGroup, OffloadedLinear, OffloadSession
from cloister.offload import _linear as linear_module
from cloister.offload._linear import joint_name
from cloister.ring import FAITHFUL, FAST, RingFormat, quantize_weight
from cloister.testing import FakeAccelerator, FakeLyingAccelerator, FakeStallingAccelerator

SIZES = (24, 8, 16)
N_IN = 20
# Of gradients and outputs against float, for sides of this size.
ERROR = {"faithful": 1e-3, "fast": 3e-2}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frozen() -> list[FrozenLinear]:
    """q, k and v, of which k has a bias."""
    return [
        FrozenLinear(f"block.{name}", randn(size, N_IN, seed=i) * 0.1, randn(size, seed=9) if name == "k" else None)
        for i, (name, size) in enumerate(zip("qkv", SIZES, strict=True))
    ]


class Plain(nn.Module):
    """The group's members as float linears."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList()
        for name, weight, bias in frozen():
            del name
            linear = nn.Linear(N_IN, len(weight), bias=bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias, requires_grad=False)
            self.members.append(linear)


@pytest.fixture(params=[FAITHFUL, FAST], ids=lambda fmt: fmt.name)
def fmt(request: pytest.FixtureRequest) -> RingFormat:
    return request.param


@pytest.fixture
def accelerator() -> FakeAccelerator:
    return FakeAccelerator()


@pytest.fixture
def session(accelerator: FakeAccelerator, fmt: RingFormat):
    with OffloadSession(accelerator, fmt) as made:
        yield made


@pytest.fixture
def group(session: OffloadSession) -> OffloadedGroup:
    return OffloadedGroup(session, frozen())


def counts(session: OffloadSession) -> tuple[int, int]:
    found = session.describe()
    return found["forward"], found["backward"]


def assert_near(found: Tensor, expected: Tensor, fmt: RingFormat) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).norm() / expected.norm()) < ERROR[fmt.name]


# --- one message for all ----------------------------------------------------------------------------------------------


def test_a_group_is_one_message_each_way(group: OffloadedGroup, session: OffloadSession, fmt: RingFormat) -> None:
    x, y = randn(2, 3, N_IN, seed=3).requires_grad_(), randn(2, 3, N_IN, seed=3).requires_grad_()
    plain = Plain()
    outputs = [member(x) for member in group.members]
    expected = [member(y) for member in plain.members]
    for found, wanted in zip(outputs, expected, strict=True):
        assert_near(found, wanted, fmt)
        assert found.is_contiguous()
    assert counts(session) == (1, 0)
    assert group._waiting is None  # all have taken theirs
    sum((out * randn(*out.shape, seed=4)).sum() for out in outputs).backward()
    sum((out * randn(*out.shape, seed=4)).sum() for out in expected).backward()
    assert counts(session) == (1, 1)
    assert_near(x.grad, y.grad, fmt)


def test_the_gradient_is_that_of_the_quantised_layer(group: OffloadedGroup, session: OffloadSession) -> None:
    x = randn(5, N_IN, seed=3).requires_grad_()
    outputs = [member(x) for member in group.members]
    gradients = [randn(*out.shape, seed=i) for i, out in enumerate(outputs)]
    torch.autograd.backward(outputs, gradients)
    assert torch.equal(x.grad, session.backward("block.q+k+v", torch.cat(gradients, dim=1)))


@pytest.mark.parametrize("used", [(0,), (1,), (2, 0), (1, 2)], ids=str)
def test_some_members_alone(group: OffloadedGroup, session: OffloadSession, fmt: RingFormat, used: tuple) -> None:
    plain = Plain()
    x, y = randn(4, N_IN, seed=3).requires_grad_(), randn(4, N_IN, seed=3).requires_grad_()
    outputs, expected = [group.members[i](x) for i in used], [plain.members[i](y) for i in used]
    assert counts(session) == (1, 0)
    sum(out.square().sum() for out in outputs).backward()
    sum(out.square().sum() for out in expected).backward()
    assert counts(session) == (1, 1)
    assert_near(x.grad, y.grad, fmt)
    assert group._waiting is None  # nothing is kept after the step


def test_only_a_taken_output_gets_a_gradient(group: OffloadedGroup, session: OffloadSession, fmt: RingFormat) -> None:
    """All are taken, and the loss needs one."""
    x, y = randn(4, N_IN, seed=3).requires_grad_(), randn(4, N_IN, seed=3).requires_grad_()
    outputs = [member(x) for member in group.members]
    outputs[1].square().sum().backward()
    Plain().members[1](y).square().sum().backward()
    assert_near(x.grad, y.grad, fmt)


def test_outputs_are_no_views(group: OffloadedGroup, fmt: RingFormat) -> None:
    """Code that changes a linear's output in place works on a member's."""
    x, y = randn(4, N_IN, seed=3).requires_grad_(), randn(4, N_IN, seed=3).requires_grad_()
    for source, members in ((x, group.members), (y, Plain().members)):
        first, second, third = (member(source) for member in members)
        first.mul_(2.0)
        second += 1
        (first.sum() + (second * third[:, :8]).sum()).backward()
    assert_near(x.grad, y.grad, fmt)


# --- what is the same tensor, and what is not -------------------------------------------------------------------------


def _again(x: Tensor) -> Tensor:
    return x


def _changed(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(1.0)
    return x


def _requires_grad(x: Tensor) -> Tensor:
    return x.requires_grad_()


@pytest.mark.parametrize(
    ("change", "n_messages"),
    [
        (_again, 1),
        (lambda x: x.view(x.shape), 2),
        (lambda x: x.clone(), 2),
        (lambda x: x.detach(), 2),
        (_changed, 2),
        (_requires_grad, 2),
    ],
    ids=["the same", "a view", "a copy", "detached", "changed in place", "with a gradient"],
)
def test_which_tensors_share(
    group: OffloadedGroup, session: OffloadSession, fmt: RingFormat, change: Callable, n_messages: int
) -> None:
    x = randn(4, N_IN, seed=3)
    group.members[0](x)
    other = change(x)
    found = group.members[1](other)
    assert counts(session)[0] == n_messages
    assert_near(found.detach(), Plain().members[1](other).detach(), fmt)
    assert found.requires_grad == other.requires_grad


def test_a_value_that_changed_is_seen(group: OffloadedGroup, fmt: RingFormat) -> None:
    x = randn(4, N_IN, seed=3)
    group.members[0](x)
    x.mul_(3.0)
    assert_near(group.members[1](x), Plain().members[1](x), fmt)


def test_the_same_member_twice(group: OffloadedGroup, session: OffloadSession) -> None:
    x = randn(4, N_IN, seed=3)
    assert torch.equal(group.members[0](x), group.members[0](x))
    assert counts(session)[0] == 2


def test_gradient_modes_do_not_mix(group: OffloadedGroup, session: OffloadSession) -> None:
    x = randn(4, N_IN, seed=3).requires_grad_()
    with torch.no_grad():
        assert not group.members[0](x).requires_grad
    assert group.members[1](x).requires_grad
    assert counts(session)[0] == 2


def test_inference_mode_does_not_share(group: OffloadedGroup, session: OffloadSession, fmt: RingFormat) -> None:
    """Its tensors do not count their changes."""
    with torch.inference_mode():
        x = randn(4, N_IN, seed=3)
        first = group.members[0](x)
        x.mul_(2.0)
        second = group.members[1](x)
    assert counts(session)[0] == 2
    assert_near(first * 2, Plain().members[0](x), fmt)
    assert_near(second, Plain().members[1](x), fmt)
    assert group._waiting is None


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_no_backward_message_where_the_input_needs_no_gradient(group: OffloadedGroup, session: OffloadSession) -> None:
    x = randn(4, N_IN, seed=3)
    trained = nn.Parameter(torch.ones(SIZES[0]))
    (group.members[0](x) * trained).sum().backward()
    assert trained.grad is not None
    assert counts(session) == (1, 0)


def test_no_grad(group: OffloadedGroup, session: OffloadSession) -> None:
    with torch.no_grad():
        x = randn(4, N_IN, seed=3).requires_grad_()
        assert not any(member(x).requires_grad for member in group.members)
    assert counts(session) == (1, 0)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(
    group: OffloadedGroup, session: OffloadSession, fmt: RingFormat, use_reentrant: bool
) -> None:
    def block(members: nn.ModuleList | tuple, x: Tensor) -> Tensor:
        q, k, v = (member(x) for member in members)
        return q.tanh().sum() + (k.tanh() * v[:, :8].tanh()).sum()

    x, y = randn(4, N_IN, seed=3).requires_grad_(), randn(4, N_IN, seed=3).requires_grad_()
    checkpoint(block, group.members, x, use_reentrant=use_reentrant).backward()
    block(Plain().members, y).backward()
    assert_near(x.grad, y.grad, fmt)
    assert counts(session) == (2, 1)  # computed again, under another pad, and not once for each member
    assert group._waiting is None


def test_recomputed_outputs_are_bit_for_bit_the_same(group: OffloadedGroup) -> None:
    x = randn(64, N_IN, seed=3)
    first, second = ([member(x) for member in group.members] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_there_is_no_second_derivative(group: OffloadedGroup) -> None:
    x = randn(4, N_IN, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(group.members[0](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class _Forgetful(torch.autograd.Function):
    """Has no gradient for its input, which autograd then calls undefined."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> None:
        return None


def test_no_backward_message_without_any_gradient(group: OffloadedGroup, session: OffloadSession) -> None:
    x = randn(4, N_IN, seed=3).requires_grad_()
    _Forgetful.apply(group.members[0](x)).sum().backward()
    assert x.grad is None
    assert counts(session) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(group: OffloadedGroup, fmt: RingFormat, dtype: torch.dtype) -> None:
    x = randn(2, 3, N_IN, seed=3).to(dtype).requires_grad_()
    y = x.detach().float().requires_grad_()
    for source, members in ((x, group.members), (y, Plain().members)):
        outputs = [member(source) for member in members]
        assert {out.dtype for out in outputs} == {source.dtype}
        sum(out.float().square().sum() for out in outputs).backward()
        assert source.grad.dtype == source.dtype
    error = ERROR[fmt.name] + torch.finfo(dtype).eps
    assert float((x.grad.float() - y.grad).norm() / y.grad.norm()) < error


# --- one linear, and many rows ----------------------------------------------------------------------------------------


def test_a_linear_alone(session: OffloadSession, fmt: RingFormat) -> None:
    (linear,) = OffloadedGroup(session, frozen()[1:2]).members
    x = randn(4, N_IN, seed=3)
    assert_near(linear(x), Plain().members[1](x), fmt)
    assert linear(x).grad_fn is None
    assert repr(linear) == "OffloadedLinear(in_features=20, out_features=8, layer='block.k')"
    assert (linear.in_features, linear.out_features) == (N_IN, 8)
    assert list(linear.parameters()) == list(linear.buffers()) == []
    assert linear.state_dict() == {}


@pytest.mark.parametrize("max_rows", [1, 7, 24, 47])
def test_many_rows_are_cut(
    session: OffloadSession, fmt: RingFormat, monkeypatch: pytest.MonkeyPatch, max_rows: int
) -> None:
    monkeypatch.setattr(linear_module, "MAX_ROWS", max_rows)
    members = OffloadedGroup(session, frozen()).members
    n_parts = -(-48 // max_rows)
    assert list(session.describe()["layers"]) == [f"block.q+k+v[{i}]" for i in range(n_parts)]
    x, y = randn(4, N_IN, seed=3).requires_grad_(), randn(4, N_IN, seed=3).requires_grad_()
    for source, given in ((x, members), (y, Plain().members)):
        sum(member(source).square().sum() for member in given).backward()
    assert counts(session) == (n_parts, n_parts)
    assert_near(x.grad, y.grad, fmt)


def test_a_vocabulary_wider_than_the_ring_allows() -> None:
    n_rows = 2**17 + 3
    weight = randn(n_rows, 3)
    with pytest.raises(OffloadError, match="rows"):
        quantize_weight(weight, FAST, layer="head")
    with OffloadSession(FakeAccelerator(), FAST) as session:
        (head,) = OffloadedGroup(session, [FrozenLinear("head", weight)]).members
        x = randn(2, 3, seed=1).requires_grad_()
        y = head(x)
        assert_near(y, x @ weight.T, FAST)
        y.square().sum().backward()
        assert_near(x.grad, 2 * (x @ weight.T) @ weight, FAST)
        assert len(session.describe()["layers"]) == 5


def test_linears_that_do_not_belong_together(session: OffloadSession) -> None:
    with pytest.raises(OffloadError, match="inputs"):
        OffloadedGroup(session, [*frozen(), FrozenLinear("block.o", randn(4, 5))])


def test_weights_that_cannot_be(session: OffloadSession) -> None:
    with pytest.raises(RingOverflowError, match=r"a\.up"):
        OffloadedGroup(session, [FrozenLinear("a.up", torch.full((4, 5), torch.nan))])


def test_weight_bits(session: OffloadSession) -> None:
    weight = randn(4, 5)
    OffloadedGroup(session, [FrozenLinear("a", weight)], weight_bits=5)
    expected = quantize_weight(weight, session.format, layer="a", weight_bits=5).digest().hex()
    assert session.describe()["layers"]["a"]["digest"] == expected


@pytest.mark.parametrize(
    ("names", "joint"),
    [
        (["a.b.q"], "a.b.q"),
        (["a.b.q", "a.b.k", "a.b.v"], "a.b.q+k+v"),
        (["q", "k"], "q+k"),
        (["a.q", "b.k"], "a.q+b.k"),
        (["a.q.base", "a.k.base"], "a.q.base+a.k.base"),
    ],
    ids=str,
)
def test_joint_names(names: list[str], joint: str) -> None:
    assert joint_name(names) == joint


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_lie_in_backward_ends_the_step(fmt: RingFormat) -> None:
    accelerator = FakeLyingAccelerator(lambda _: None)
    with OffloadSession(accelerator, fmt) as session:
        (linear,) = OffloadedGroup(session, frozen()[:1]).members
        x = randn(4, N_IN).requires_grad_()
        loss = linear(x).sum()
        accelerator.change = lambda answer: answer.__iadd__(1)
        with pytest.raises(IntegrityError, match=r"layer block\.q, backward"):
            loss.backward()
        assert x.grad is None


def test_a_stall_in_backward_is_retried(fmt: RingFormat) -> None:
    accelerator = FakeStallingAccelerator(after=1)
    with OffloadSession(accelerator, fmt) as session:
        (linear,) = OffloadedGroup(session, frozen()[:1]).members
        x, y = randn(4, N_IN).requires_grad_(), randn(4, N_IN).requires_grad_()
        linear(x).sum().backward()
        assert accelerator.n_revived == 1
        linear(y).sum().backward()
        assert torch.equal(x.grad, y.grad)


def test_nan_in_one_member_is_the_error_of_all(group: OffloadedGroup, session: OffloadSession) -> None:
    x = randn(4, N_IN)
    x[2, 3] = torch.nan
    with pytest.raises(RingOverflowError):
        group.members[0](x)
    assert group._waiting is None
    x[2, 3] = 0
    group.members[1](x)


def test_a_model_with_masked_layers_is_not_copied(group: OffloadedGroup) -> None:
    model = nn.Sequential(*group.members)
    with pytest.raises(PadReuseError):
        copy.deepcopy(model)
    assert isinstance(model[0], OffloadedLinear)
