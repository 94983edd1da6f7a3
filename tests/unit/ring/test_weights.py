"""Integer weights: against the oracle, norms and limits, the digest, and what is refused."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from tests.oracle import slow_ring as slow

from cloister.errors import OffloadError, RingOverflowError
from cloister.ring import FAITHFUL, FAST, MAX_FEATURES, LimbFormat, QuantizedWeight, RingFormat, quantize_weight
from cloister.ring import _weights as weights

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)


def _gaussian(out: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.fixture
def weight() -> QuantizedWeight:
    return quantize_weight(_gaussian(5, 7), FAITHFUL, layer="block.3.up")


@BOTH
def test_against_the_oracle(fmt: RingFormat) -> None:
    source = _gaussian(40, 30)
    source[3] = 0
    source[4, 5] = 80.0
    source[5] = torch.linspace(-1, 1, 30) * 2047.5  # quotients at a half
    found = quantize_weight(source, fmt, layer="l")
    w_q, scales = slow.quantize_weight(source.tolist(), fmt.weight_bits)
    assert found.w_q.tolist() == w_q
    assert found.scales.tolist() == scales
    assert found.scales[3] == 0
    assert found.row_norms.tolist() == [math.sqrt(sum(x * x for x in row)) for row in w_q]
    assert found.column_norms.tolist() == [math.sqrt(sum(x * x for x in row)) for row in slow.transpose(w_q)]
    assert found.forward_limit == slow.limit(w_q, fmt.modulus)
    assert found.backward_limit == slow.limit(slow.transpose(w_q), fmt.modulus)
    assert found.digest() == slow.digest(fmt.name, fmt.weight_bits, w_q, [float(s) for s in scales])


def test_blocks_of_rows_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_weight(_gaussian(70, 5), FAITHFUL, layer="l")
    monkeypatch.setattr(weights, "_BLOCK_ROWS", 32)
    cut = quantize_weight(_gaussian(70, 5), FAITHFUL, layer="l")
    assert cut.digest() == whole.digest()
    assert torch.equal(cut.row_norms, whole.row_norms)
    assert torch.equal(cut.column_norms, whole.column_norms)
    assert (cut.forward_limit, cut.backward_limit) == (whole.forward_limit, whole.backward_limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read_as_float32(dtype: torch.dtype) -> None:
    source = _gaussian(4, 6).to(dtype)
    expected = quantize_weight(source.float(), FAITHFUL, layer="l").digest()
    assert quantize_weight(source, FAITHFUL, layer="l").digest() == expected
    assert quantize_weight(source.requires_grad_(), FAITHFUL, layer="l").digest() == expected


@pytest.mark.parametrize("bits", [2, 13, 14, 16])
def test_other_bits(bits: int) -> None:
    found = quantize_weight(_gaussian(6, 9), FAITHFUL, layer="l", weight_bits=bits)
    assert found.weight_bits == bits
    assert found.w_q.abs().max() == 2 ** (bits - 1) - 1
    assert found.w_q.tolist() == slow.quantize_weight(_gaussian(6, 9).tolist(), bits)[0]


@pytest.mark.parametrize("tiny", [2**-140, 2**-149, 1e-36])
def test_a_channel_of_next_to_nothing_is_zero(tiny: float) -> None:
    source = _gaussian(3, 4)
    source[1] = tiny
    found = quantize_weight(source, FAITHFUL, layer="l")
    assert found.scales[1] == 0
    assert found.w_q[1].tolist() == [0, 0, 0, 0]
    assert (found.w_q.tolist(), found.scales.tolist()) == slow.quantize_weight(source.tolist(), 12)


def test_the_largest_float_is_no_overflow() -> None:
    source = torch.full((2, 2), torch.finfo(torch.float32).max)
    assert quantize_weight(source, FAITHFUL, layer="l").w_q.tolist() == [[2047, 2047], [2047, 2047]]


@pytest.mark.parametrize("bits", [2, 12, 16])
def test_no_integer_exceeds_its_bits(bits: int) -> None:
    """The largest element of a row, divided by its own rounded scale, rounds to the largest integer and not beyond."""
    source = _gaussian(20000, 1, seed=3) * torch.logspace(-30, 37, 20000).unsqueeze(1)
    found = quantize_weight(source, FAITHFUL, layer="l", weight_bits=bits)
    assert found.w_q.abs().unique().tolist() == [2 ** (bits - 1) - 1]


def test_an_all_zero_weight() -> None:
    found = quantize_weight(torch.zeros(2, 3), FAST, layer="l")
    assert found.forward_limit == found.backward_limit == 2**23 - 1
    assert found.scales.tolist() == [0, 0]


@BOTH
def test_planes(fmt: RingFormat) -> None:
    found = quantize_weight(_gaussian(5, 7), fmt, layer="l")
    forward, backward = found.forward_planes(), found.backward_planes()
    assert forward.shape == (fmt.n_weight_planes, 5, 7)
    assert torch.equal(backward, forward.transpose(1, 2))
    assert [plane.tolist() for plane in forward] == [
        [[slow.encode_weight(w, fmt.name)[i] for w in row] for row in found.w_q.tolist()]
        for i in range(fmt.n_weight_planes)
    ]


def test_fold(weight: QuantizedWeight) -> None:
    gradient = _gaussian(3, 5, seed=1).to(torch.bfloat16)
    folded = weight.fold(gradient)
    assert folded.dtype == torch.float32
    assert torch.equal(folded, gradient.float() * weight.scales)
    with pytest.raises(OffloadError, match=r"block\.3\.up"):
        weight.fold(gradient[:, :4])


def test_any_bit_changes_the_digest(weight: QuantizedWeight) -> None:
    seen = {weight.digest()}
    for tensor in (weight.w_q, weight.scales):
        raw = tensor.view(torch.uint8).reshape(-1)
        for i in range(len(raw)):
            for bit in range(8):
                raw[i] ^= 1 << bit
                seen.add(weight.digest())
                raw[i] ^= 1 << bit
    assert len(seen) == 1 + 8 * (5 * 7 * 2 + 5 * 4)
    others = (
        replace(weight, format=FAST),
        replace(weight, weight_bits=13),
        replace(weight, w_q=weight.w_q.reshape(7, 5)),
        replace(weight, w_q=weight.w_q.T),
    )
    assert len({other.digest() for other in others} | seen) == len(seen) + 4
    assert replace(weight, layer="other").digest() == weight.digest()


def test_the_digest_is_of_values_not_of_memory(weight: QuantizedWeight) -> None:
    strided = torch.stack([weight.w_q, weight.w_q], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert replace(weight, w_q=strided).digest() == weight.digest()
    assert len(weight.digest()) == 48


def test_a_frozen_digest() -> None:
    """So that a change of the framing cannot pass as a change of the oracle too."""
    found = quantize_weight(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), FAST, layer="l")
    framed = bytes.fromhex(
        "0000000000000017" + b"cloister-ring-weight/v1".hex() + "0000000000000004" + b"fast".hex()
        + "0000000000000008" "0000000000000008" + "0000000000000008" "0000000000000002" * 2
        + "0000000000000008" "7f00c0ff00000000" + "0000000000000008" "0402013c00000000"
    )  # fmt: skip
    assert found.w_q.tolist() == [[127, -64], [0, 0]]
    assert found.digest() == hashlib.sha384(framed).digest()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_nan_and_infinity(bad: float, row: int) -> None:
    source = _gaussian(3, 4)
    source[row, 1] = bad
    with pytest.raises(RingOverflowError, match=r"^layer block\.3\.up: .* NaN or infinite"):
        quantize_weight(source, FAITHFUL, layer="block.3.up")


def test_a_wider_float_that_does_not_fit() -> None:
    with pytest.raises(RingOverflowError, match="infinite"):
        quantize_weight(torch.full((2, 2), 1e200, dtype=torch.float64), FAITHFUL, layer="l")


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3), torch.zeros(2, 2, 2), torch.tensor(1.0), torch.zeros((2, 2), dtype=torch.int8),
     torch.zeros(0, 2), torch.zeros(2, 0), torch.zeros(1, MAX_FEATURES + 1), torch.zeros(MAX_FEATURES + 1, 1)],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)  # fmt: skip
def test_other_shapes_and_types(wrong: torch.Tensor) -> None:
    with pytest.raises(OffloadError, match=r"^layer block\.3\.up: a weight"):
        quantize_weight(wrong, FAITHFUL, layer="block.3.up")


@pytest.mark.parametrize(("fmt", "bits"), [(FAITHFUL, 1), (FAITHFUL, 17), (FAST, 0), (FAST, 9)])
def test_bits_beyond_the_format(fmt: RingFormat, bits: int) -> None:
    with pytest.raises(OffloadError, match="bits, not"):
        quantize_weight(torch.ones(2, 2), fmt, layer="l", weight_bits=bits)


@pytest.mark.parametrize("turned", [False, True])
def test_no_room_for_activations(turned: bool) -> None:
    """Rows, or columns, as long as they can be: the fast ring has no units left for what multiplies them."""
    source = torch.ones(1, MAX_FEATURES)
    with pytest.raises(RingOverflowError, match="too long for the format fast"):
        quantize_weight(source.T if turned else source, FAST, layer="l")
    assert quantize_weight(source, FAITHFUL, layer="l").forward_limit > 4 * math.sqrt(MAX_FEATURES)


@pytest.mark.parametrize("ring_bits", [7, 9])
def test_no_room_is_decided_to_the_unit(ring_bits: int) -> None:
    """d ones at 3 bits have the norm 3 sqrt(d), which sets L; it must be at least sqrt(d) + 1. At 2^7, d = 16 is it."""
    small = LimbFormat(name="small", weight_bits=3, n_limbs=ring_bits, limb_bits=1)
    for features in range(1, 200):
        fits = slow.limit_of_square(9 * features, 2**ring_bits) >= math.sqrt(features) + 1
        try:
            quantize_weight(torch.ones(1, features), small, layer="l")
        except RingOverflowError:
            assert not fits, features
        else:
            assert fits, features
    assert slow.limit_of_square(9 * 16, 2**7) == math.sqrt(16) + 1


def test_repr_shows_no_tensor(weight: QuantizedWeight) -> None:
    assert "tensor" not in repr(weight)
    assert "block.3.up" in repr(weight)
