"""The boundary code: its error bound, its edges, and that nothing non-finite passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import ConfigError, DataError
from cloister.train import BoundaryBlock, dequantize, quantize

_FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)
_ROWS = st.integers(1, 5).flatmap(lambda h: st.lists(st.lists(_FLOATS, min_size=h, max_size=h), min_size=1, max_size=6))


@settings(deadline=None, max_examples=200)
@given(_ROWS)
def test_int8_is_within_half_a_scale(rows: list[list[float]]) -> None:
    hidden = torch.tensor(rows, dtype=torch.float32)
    block = quantize(hidden, "int8")
    assert block.scales is not None
    absmax = hidden.abs().amax(dim=1).double()
    # In float64: the stated bound, the stated slack of two float32 roundings, and the stated floor.
    bound = block.scales.double() / 2 + absmax * 2**-22
    bound = torch.where(block.scales == 0, torch.full_like(bound, 127 * 2.0**-126), bound)
    error = (block.values.double() * block.scales.double()[:, None] - hidden.double()).abs().amax(dim=1)
    assert bool((error <= bound).all())
    assert int(block.values.abs().max()) <= 127
    assert bool(torch.isfinite(dequantize(block)).all())


@settings(deadline=None, max_examples=50)
@given(st.lists(_FLOATS, min_size=3, max_size=3))
def test_bf16_keeps_eight_bits_and_fp32_everything(row: list[float]) -> None:
    hidden = torch.tensor([row], dtype=torch.float32)
    assert torch.equal(dequantize(quantize(hidden, "fp32")), hidden)
    error = (dequantize(quantize(hidden, "bf16")) - hidden).abs()
    assert bool((error <= hidden.abs() * 2**-8 + 2.0**-133).all())


def test_int8_rounds_half_to_even() -> None:
    # absmax 127 makes the scale exactly 1.
    block = quantize(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), "int8")
    assert block.values.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert block.scales is not None
    assert block.scales.tolist() == [1.0]


def test_each_token_has_its_own_scale_and_zeros_stay_zeros() -> None:
    hidden = torch.tensor([[1000.0, -1.0], [0.0, 0.0], [0.001, -0.002]])
    block = quantize(hidden, "int8")
    found = dequantize(block)
    assert found[1].tolist() == [0.0, 0.0]
    assert torch.allclose(found[2], hidden[2], rtol=0, atol=0.002 / 254 * 1.001)
    assert block.n_tokens == 3
    assert block.n_bytes == 6 + 12


@pytest.mark.parametrize("boundary", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_its_row(boundary: str, bad: float) -> None:
    hidden = torch.zeros(4, 3)
    hidden[2, 1] = bad
    with pytest.raises(DataError, match="token 2 is not finite") as caught:
        quantize(hidden, boundary)  # pyright: ignore[reportArgumentType]
    assert caught.value.row == 2


@pytest.mark.parametrize("boundary", ["int8", "bf16", "fp32"])
def test_what_would_become_infinite_on_the_other_side_is_refused(boundary: str) -> None:
    hidden = torch.tensor([[2.0**127], [torch.finfo(torch.float32).max]])
    assert bool(torch.isfinite(dequantize(quantize(hidden[:1], boundary))).all())  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="token 1 is not finite or overflows"):
        quantize(hidden, boundary)  # pyright: ignore[reportArgumentType]


def test_the_same_input_gives_the_same_bytes() -> None:
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    first, second = quantize(hidden, "int8"), quantize(hidden.clone(), "int8")
    assert torch.equal(first.values, second.values)
    assert "tensor" not in repr(first)


def test_no_tokens_and_unknown_names() -> None:
    assert quantize(torch.zeros(0, 4), "int8").n_tokens == 0
    with pytest.raises(ConfigError, match="'int4' is not one of"):
        quantize(torch.zeros(1, 4), "int4")  # pyright: ignore[reportArgumentType]


def test_dequantize_does_not_change_its_block() -> None:
    block = BoundaryBlock(torch.ones(2, 2), None)
    dequantize(block)
    assert torch.equal(block.values, torch.ones(2, 2))
