"""Only the real tokens of a padded batch are sent, and what comes out at them is what the whole batch gives."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cloister.errors import RingOverflowError
from cloister.offload import FrozenLinear, OffloadedGroup, OffloadSession, only_real_rows
from cloister.offload import _linear as linear_module
from cloister.offload._real_rows import real_rows_of
from cloister.pad import PadMode
from cloister.ring import FAITHFUL, FAST, FORMATS
from cloister.testing import FakeAccelerator

N_IN, SIZES = 12, (8, 20)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def group_of(session: OffloadSession) -> OffloadedGroup:
    """Two linears of the same inputs, the second with a bias."""
    biases = (None, randn(SIZES[1], seed=9))
    linears = [
        FrozenLinear(f"block.{name}", randn(size, N_IN, seed=i), bias)
        for i, (name, size, bias) in enumerate(zip("kv", SIZES, biases, strict=True))
    ]
    return OffloadedGroup(session, linears)


def step(group: OffloadedGroup, x: Tensor, mask: Tensor, *, is_packed: bool) -> tuple[list[Tensor], Tensor]:
    """Outputs and the input's gradient, of a loss that reads real tokens alone."""
    x = x.clone().requires_grad_()
    if is_packed:
        with only_real_rows(mask):
            outputs = [member(x) for member in group.members]
    else:
        outputs = [member(x) for member in group.members]
    gradients = [randn(*out.shape, seed=i).to(out.dtype) * mask[..., None] for i, out in enumerate(outputs)]
    torch.autograd.backward(outputs, gradients)
    assert x.grad is not None
    return [out.detach() for out in outputs], x.grad


masks = st.integers(1, 4).flatmap(
    lambda n: st.integers(1, 6).flatmap(
        lambda t: st.lists(st.lists(st.integers(0, 1), min_size=t, max_size=t), min_size=n, max_size=n)
    )
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=masks, bucket=st.integers(1, 5), ring=st.sampled_from(sorted(FORMATS)))
def test_real_rows_are_those_of_the_whole_batch_and_the_others_zero(rows: list, bucket: int, ring: str) -> None:
    mask = torch.tensor(rows)
    x, real, accelerator = randn(*mask.shape, N_IN, seed=3), mask.bool(), FakeAccelerator()
    with OffloadSession(accelerator, FORMATS[ring], bucket=bucket) as session:
        group = group_of(session)
        whole, whole_gradient = step(group, x, mask, is_packed=False)
        accelerator.seen.clear()
        packed, gradient = step(group, x, mask, is_packed=True)
    for found, expected in zip(packed, whole, strict=True):
        assert found.is_contiguous() and torch.equal(found[real], expected[real])
        assert bool(real.all()) or not found[~real].any()
    assert torch.equal(gradient, whole_gradient)  # whose rows at padding are zero, as they were given zeros
    n_sent = -(-int(mask.sum()) // bucket) * bucket
    assert [planes.shape[1] for _, _, planes in accelerator.seen] == [n_sent] * (2 if n_sent else 0)


@pytest.mark.parametrize("ring", sorted(FORMATS))
def test_lattice_pads_give_the_same_up_to_their_rounding(ring: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    x = randn(2, 4, N_IN, seed=3)
    with OffloadSession(FakeAccelerator(), FORMATS[ring], pad=PadMode.LATTICE) as session:
        group = group_of(session)
        whole, whole_gradient = step(group, x, mask, is_packed=False)
        packed, gradient = step(group, x, mask, is_packed=True)
    for found, expected in zip((*packed, gradient), (*whole, whole_gradient), strict=True):
        assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=2e-2 * float(expected.abs().max()))
        assert not found[~mask.bool()].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0], [1, 1]])
    with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
        group = group_of(session)
        x = randn(2, 2, N_IN, seed=3).to(dtype)
        whole, whole_gradient = step(group, x, mask, is_packed=False)
        packed, gradient = step(group, x, mask, is_packed=True)
    assert {out.dtype for out in packed} == {gradient.dtype} == {dtype}
    assert torch.equal(gradient, whole_gradient)
    assert all(torch.equal(a[mask.bool()], b[mask.bool()]) for a, b in zip(packed, whole, strict=True))


def test_many_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "MAX_ROWS", 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
        group = group_of(session)
        assert len(session.describe()["layers"]) == 4
        x = randn(2, 3, N_IN, seed=3)
        whole, whole_gradient = step(group, x, mask, is_packed=False)
        packed, gradient = step(group, x, mask, is_packed=True)
    assert torch.equal(gradient, whole_gradient)
    assert all(torch.equal(a[mask.bool()], b[mask.bool()]) for a, b in zip(packed, whole, strict=True))


# --- when everything is sent ------------------------------------------------------------------------------------------


def n_sent(x: Tensor, mask: Tensor | None) -> int:
    accelerator = FakeAccelerator()
    with OffloadSession(accelerator, FAITHFUL) as session:
        member = group_of(session).members[0]
        if mask is None:
            member(x)
        else:
            with only_real_rows(mask):
                member(x)
    return sum(planes.shape[1] for _, _, planes in accelerator.seen)


@pytest.mark.parametrize(
    ("shape", "mask", "n"),
    [
        ((2, 3), [[1, 1, 0], [1, 0, 0]], 3),
        ((2, 3), [[1, 1, 1], [1, 1, 1]], 6),
        ((2, 3), [[0, 0, 0], [0, 0, 0]], 0),
        ((6,), [[1, 1, 0], [1, 0, 0]], 6),
        ((3, 2), [[1, 1, 0], [1, 0, 0]], 6),
        ((2, 1, 3), [[1, 1, 0], [1, 0, 0]], 6),
        ((2, 3), None, 6),
    ],
    ids=["padding", "no padding", "nothing", "flat", "another shape", "another rank", "outside"],
)
def test_how_much_is_sent(shape: tuple[int, ...], mask: list | None, n: int) -> None:
    assert n_sent(randn(*shape, N_IN), None if mask is None else torch.tensor(mask)) == n


def test_it_ends_with_its_block_also_by_an_error() -> None:
    mask, x = torch.tensor([[1, 0]]), randn(1, 2, N_IN)
    with pytest.raises(KeyError), only_real_rows(mask):
        assert real_rows_of(x) is not None
        raise KeyError
    assert real_rows_of(x) is None


def test_another_thread_is_not_in_it() -> None:
    found: list[object] = []
    with only_real_rows(torch.tensor([[1, 0]])):
        thread = threading.Thread(target=lambda: found.append(real_rows_of(randn(1, 2, N_IN))))
        thread.start()
        thread.join()
    assert found == [None]


# --- what waits, what runs again, what fails --------------------------------------------------------------------------


def test_members_with_other_rows_of_the_same_tensor_do_not_share() -> None:
    x, accelerator = randn(1, 3, N_IN), FakeAccelerator()
    with OffloadSession(accelerator, FAST) as session:
        group = group_of(session)
        with only_real_rows(torch.tensor([[1, 1, 0]])):
            group.members[0](x)
        with only_real_rows(torch.tensor([[1, 0, 0]])):
            second = group.members[1](x)
        assert group.members[1](x)[0, 2].any()
    assert [planes.shape[1] for _, _, planes in accelerator.seen] == [2, 1, 3]
    assert second[0, 0].any() and not second[0, 1:].any()


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_layer_that_runs_again_in_backward(use_reentrant: bool) -> None:
    """It sends the whole batch then; the gradient is the same."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def block(x: Tensor) -> Tensor:
        k, v = (member(x) for member in group.members)
        return (k.tanh().sum(-1) * v.tanh().sum(-1) * mask).sum()

    with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
        group = group_of(session)
        found = []
        for is_packed in (False, True):
            x = randn(2, 3, N_IN, seed=3).requires_grad_()
            if is_packed:
                with only_real_rows(mask):
                    loss = checkpoint(block, x, use_reentrant=use_reentrant)
            else:
                loss = block(x)
            loss.backward()
            found.append(x.grad)
    assert torch.equal(*found)


def test_padding_may_hold_anything() -> None:
    """What is not sent is not looked at: attention may leave NaN in rows without any token."""
    x = randn(1, 2, N_IN)
    x[0, 1] = torch.nan
    with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
        member = group_of(session).members[0]
        with only_real_rows(torch.tensor([[1, 0]])):
            assert bool(member(x).isfinite().all())
        with pytest.raises(RingOverflowError):
            member(x)
