"""Shares, supports, and what of them is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloister.adapters import LoraSpec, SpfSpec, SpfSupport
from cloister.errors import AdapterError, StateMismatchError


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": -0.1}, "shares"),
        ({"neurons": 1.01}, "shares"),
        ({"heads": math.nan}, "shares"),
        ({"heads": 0, "neurons": 0}, "LoRA alone"),
        ({"criterion": "l2"}, "fisher"),
        ({"criterion_examples": 0}, "at least 1"),
        ({"r": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_senseless_spec_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(AdapterError) as caught:
        SpfSpec(**wrong)
    assert said in caught.value.hint


def test_its_lora_has_its_numbers() -> None:
    assert SpfSpec(r=3, alpha=5, dropout=0.1, use_rslora=True).lora == LoraSpec(3, 5, 0.1, use_rslora=True)
    assert [SpfSpec(criterion=name).needs_scores for name in ("l1", "random", "gradient", "fisher")] == [
        False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("share", "n_units", "n"),
    [(0.5, 12, 6), (0.5, 3, 2), (0.25, 10, 3), (0.5, 1, 1), (1, 7, 7), (0, 7, 0), (0.05, 10, 1), (0.04, 20, 1)],
)
def test_a_share_counts_to_the_nearest_and_a_half_goes_up(share: float, n_units: int, n: int) -> None:
    assert SpfSpec(heads=share, neurons=0.5).n_chosen("heads", n_units) == n


@given(share=st.floats(0, 1), n_units=st.integers(1, 40_000))
def test_no_share_is_off_by_more_than_a_half(share: float, n_units: int) -> None:
    spec = SpfSpec(heads=1, neurons=share)
    try:
        assert abs(spec.n_chosen("neurons", n_units) - share * n_units) <= 0.5 + 1e-6
    except AdapterError:
        assert 0 < share * n_units < 0.5


@given(n_units=st.integers(2, 40_000))
def test_a_share_that_selects_nothing_is_told_the_least_that_does(n_units: int) -> None:
    with pytest.raises(AdapterError, match="selects none of a block's") as caught:
        SpfSpec(heads=0.49 / n_units).n_chosen("heads", n_units)
    assert "adapter.heads" in caught.value.cause
    least = float(caught.value.hint.rpartition(" ")[2])
    assert SpfSpec(heads=least).n_chosen("heads", n_units) == 1


SUPPORT = SpfSupport(heads=((0, 2), (1,)), neurons=((), (3, 4, 9)))


def test_a_support_survives_as_tensors() -> None:
    tensors = SUPPORT.tensors()
    assert sorted(tensors) == ["heads.0", "heads.1", "neurons.0", "neurons.1"]
    assert all(tensor.dtype == torch.int64 for tensor in tensors.values())
    assert SpfSupport.from_tensors(tensors) == SUPPORT


def test_a_support_shows_counts_and_no_index() -> None:
    assert repr(SUPPORT) == "SpfSupport(2 blocks, 3 head groups, 3 neurons)"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"heads.0": None}, "support"),
        ({"heads.7": torch.tensor([1])}, "support"),
        ({"heads.0": torch.tensor([0.0])}, "heads.0"),
        ({"heads.0": torch.tensor([[0]])}, "heads.0"),
        ({"heads.0": torch.tensor([2, 0])}, "heads"),
        ({"neurons.1": torch.tensor([3, 3])}, "neurons"),
        ({"neurons.1": torch.tensor([-1, 3])}, "neurons"),
    ],
    ids=["missing", "unknown", "float", "matrix", "not-sorted", "twice", "negative"],
)
def test_tensors_that_are_no_support_are_refused(change: dict, key: str) -> None:
    tensors = {name: tensor for name, tensor in (SUPPORT.tensors() | change).items() if tensor is not None}
    with pytest.raises(StateMismatchError) as caught:
        SpfSupport.from_tensors(tensors)
    assert caught.value.key == key


def test_a_support_has_both_lists_for_every_block() -> None:
    with pytest.raises(StateMismatchError, match="as many"):
        SpfSupport(heads=((0,),), neurons=())
