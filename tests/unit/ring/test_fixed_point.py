"""Activations to integers: the norm bound at its edges, rows of all sizes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from tests.oracle import slow_ring as slow

from cloister import ring
from cloister.errors import OffloadError, RingOverflowError
from cloister.ring import FAITHFUL, FAST, MAX_FEATURES, RingFormat, dequantize, quantize_rows, quantize_weight
from cloister.ring._fixed_point import norm_limit, smallest_limit

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)


def _gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("slack", [0.0, 1e-6, 1.0, 1e3, 1e9])
def test_the_bound_holds_and_is_used(features: int, slack: float) -> None:
    limit = smallest_limit(features) + slack
    x = _gaussian(12, features)
    x[1], x[2, 0], x[3] = 1.0, 1e30, 1e-38
    x[4] = torch.finfo(torch.float32).max
    x[5] = 2.0**-149
    x_q, scale = quantize_rows(x, limit)
    for row, whole, s in zip(x.tolist(), x_q.tolist(), scale.tolist(), strict=True):
        assert slow.fits(whole, limit)
        assert s == pytest.approx(slow.ideal_scale(row, limit), rel=1e-8)
        assert all(abs(q - v / s) <= 0.5 + 1e-6 for q, v in zip(whole, row, strict=True))


def test_rounding_that_adds_to_every_element() -> None:
    """All elements round up by nearly a half at once: the case that the bound is made for."""
    features, limit = 4096, 96.5
    # T = limit - 32. The first element takes what norm the others leave; those lie just above half a unit.
    first = math.sqrt((limit - 32) ** 2 - 0.501**2 * (features - 1))
    x = torch.full((1, features), 0.501)
    x[0, 0] = first
    x_q, scale = quantize_rows(x, limit)
    assert scale.item() == pytest.approx(1, rel=1e-6)
    assert x_q[0].tolist() == [round(first)] + [1] * (features - 1)
    assert slow.fits(x_q[0].tolist(), limit)
    assert math.sqrt(float((x_q**2).sum())) > limit - 32 + 15  # so without room for rounding the limit would break


@pytest.mark.parametrize("limit", [65.0, 65.5, 96.0])
def test_equal_elements_at_the_smallest_limits(limit: float) -> None:
    x_q, scale = quantize_rows(torch.full((1, 4096), 3.7), limit)
    assert slow.fits(x_q[0].tolist(), limit)
    assert x_q.unique().tolist() == [round(3.7 / scale.item())]


def test_rows_of_zeros_and_no_rows() -> None:
    x = _gaussian(3, 5)
    x[1] = 0
    x_q, scale = quantize_rows(x, 1000.0)
    assert x_q[1].tolist() == [0] * 5
    assert scale[1] == 0
    x_q, scale = quantize_rows(torch.zeros(0, 5), 1000.0)
    assert (x_q.shape, scale.shape) == ((0, 5), (0,))


def test_types_and_what_a_token_does_not_know() -> None:
    x = _gaussian(4, 8)
    x_q, scale = quantize_rows(x, 1e4)
    assert (x_q.dtype, scale.dtype) == (torch.int64, torch.float64)
    for t in range(4):  # a token's integers do not depend on the others of its batch
        alone, alone_scale = quantize_rows(x[t : t + 1], 1e4)
        assert torch.equal(alone[0], x_q[t])
        assert alone_scale == scale[t]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(quantize_rows(x.to(dtype), 1e4)[0], quantize_rows(x.to(dtype).float(), 1e4)[0])
    assert not quantize_rows(x.clone().requires_grad_(), 1e4)[1].requires_grad


def test_head_room_is_a_larger_limit() -> None:
    x = _gaussian(6, 50)
    for h in (1.5, 16.0):
        wide, scale = quantize_rows(x, 200.0, head_room=h)
        expected, expected_scale = quantize_rows(x, 200.0 * h)
        assert torch.equal(wide, expected)
        assert torch.equal(scale, expected_scale)
        assert all(slow.fits(row, 200.0 * h) and not slow.fits(row, 200.0) for row in wide.tolist())


@BOTH
def test_at_the_bound_and_one_beyond(fmt: RingFormat) -> None:
    """A row at the limit, in the direction of the longest weight, stays below m/2; the next whole norm does not."""
    weight = quantize_weight(torch.ones(1, 1), fmt, layer="l")
    w = int(weight.w_q[0, 0])
    limit = int(weight.forward_limit)
    assert (2 * w * limit < fmt.modulus) and (2 * w * (limit + 1) >= fmt.modulus)
    for x, same in ((limit, True), (-limit, True), (limit + 1, False), (-limit - 1, False)):
        found = fmt.centre(torch.tensor([[w * x]])).item()
        assert (found == w * x) is same
        assert found == slow.centre(w * x, fmt.modulus)


@pytest.mark.parametrize("m", [8, 15, 60, 64])
def test_limits_of_tiny_rings_whole(m: int) -> None:
    """For every weight norm, the limit is the largest whole norm whose product stays below m/2, or that of norm 1."""
    for square in range(m * m):
        assert norm_limit(square, m) == slow.limit_of_square(max(square, 1), m)


def test_tiny_ring_no_product_of_the_bound_overflows() -> None:
    """All weights and all integer rows of two features in a ring of 60: under the limit, centring gives the integer."""
    fmt = ring.ResidueFormat(name="tiny", weight_bits=3, moduli=(4, 3, 5))
    side = torch.arange(-14, 15)
    rows = torch.cartesian_prod(side, side)
    broken = 0
    for w in torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4)):
        inside = (rows**2).sum(1) <= norm_limit(int((w**2).sum()), fmt.modulus) ** 2
        y = rows @ w
        exact = fmt.centre(y) == y
        assert bool(exact[inside].all())
        broken += int((~exact).sum())
    assert broken > 0  # beyond the limit there are products that do not come back


def test_dequantize() -> None:
    y = torch.tensor([[5, -(2**30)], [0, 7]])
    found = dequantize(y, torch.tensor([0.5, 2.0**-60], dtype=torch.float64), torch.tensor([2.0, 0.25]))
    assert found.dtype == torch.float32
    assert found.tolist() == [[5.0, -(2.0**27)], [0.0, 7 * 2.0**-62]]
    assert dequantize(y, torch.tensor([0.5, 1.0], dtype=torch.float64)).tolist() == [[2.5, -(2.0**29)], [0.0, 7.0]]
    assert dequantize(y[:1], torch.tensor([1e38], dtype=torch.float64)).isinf().tolist() == [[True, True]]


@pytest.mark.parametrize(("tokens", "channels"), [(3, 2), (2, 3), (2, 1), (1, 2)])
def test_dequantize_takes_only_its_own_scales(tokens: int, channels: int) -> None:
    y = torch.zeros((2, 2), dtype=torch.int64)
    with pytest.raises(OffloadError, match="do not belong"):
        dequantize(y, torch.ones(tokens, dtype=torch.float64), torch.ones(channels))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_tell_nothing_of_where(bad: float) -> None:
    x = _gaussian(9, 4)
    x[7, 2] = bad
    with pytest.raises(RingOverflowError) as caught:
        quantize_rows(x, 1e4)
    assert str(caught.value) == "a batch of 9 tokens holds NaN or infinite values"
    x[1, 1] = bad
    with pytest.raises(RingOverflowError) as again:
        quantize_rows(x, 1e4)
    assert str(again.value) == str(caught.value)


def test_a_wider_float_that_does_not_fit() -> None:
    with pytest.raises(RingOverflowError, match="3 tokens"):
        quantize_rows(torch.full((3, 2), 1e200, dtype=torch.float64), 1e4)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros((2, 2), dtype=torch.int64), torch.zeros(2, 0),
     torch.zeros(1, MAX_FEATURES + 1)],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)  # fmt: skip
def test_other_rows_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(OffloadError, match="rows are"):
        quantize_rows(wrong, 1e9)


@pytest.mark.parametrize("limit", [math.nan, math.inf, -1.0, 0.0, math.nextafter(11.0, 0)])
def test_a_limit_without_room(limit: float) -> None:
    quantize_rows(torch.ones(2, 100), 11.0)
    with pytest.raises(RingOverflowError, match="too small for 100 features"):
        quantize_rows(torch.ones(2, 100), limit)


@pytest.mark.parametrize("head_room", [math.nan, math.inf, 0.99, 0.0, -1.0])
def test_head_room_that_is_none(head_room: float) -> None:
    with pytest.raises(OffloadError, match="head-room"):
        quantize_rows(torch.ones(2, 100), 1e4, head_room=head_room)


def test_shapes_are_as_the_signatures_say() -> None:
    checked = jaxtyped(typechecker=beartype)
    weight = checked(quantize_weight)(_gaussian(5, 8), FAST, layer="l")
    x_q, scale = checked(quantize_rows)(_gaussian(3, 8), weight.forward_limit)
    planes = checked(type(FAST).encode)(FAST, x_q)
    accumulators = checked(ring.product)(planes, checked(type(weight).forward_planes)(weight), FAST)
    y = checked(type(FAST).decode_product)(FAST, accumulators)
    checked(dequantize)(checked(type(FAST).centre)(FAST, y), scale, weight.scales)
    folded = checked(type(weight).fold)(weight, _gaussian(3, 5))
    g_q, _ = checked(quantize_rows)(folded, weight.backward_limit)
    accumulators = ring.product(FAITHFUL.encode(g_q), FAITHFUL.encode_weight(weight.w_q.T), FAITHFUL)
    checked(type(FAITHFUL).decode_product)(FAITHFUL, accumulators)
    with pytest.raises(TypeCheckError):
        checked(quantize_rows)(x_q, 1e4)
