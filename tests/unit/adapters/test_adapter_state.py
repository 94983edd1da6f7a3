"""States as bytes: what goes out comes in, bit by bit, and anything else is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save

from cloister.adapters import (
    AdapterState,
    AdapterUpdate,
    LoraSpec,
    PrefixLayout,
    PrefixSpec,
    StateSpec,
    applied,
    difference,
)
from cloister.adapters._spec import LABEL
from cloister.errors import (
    AdapterError,
    LimitExceededError,
    MalformedMessageError,
    StateMismatchError,
    WireError,
)
from cloister.wire import enc

SHAPES = {"b.lora_B.weight": (3, 2), "b.lora_A.weight": (2, 4), "head.weight": (2, 4)}
SPEC = StateSpec(LoraSpec(r=2), "causal-lm", SHAPES, {})

floats = st.floats(-(2.0**100), 2.0**100, width=32)


def filled(value: float = 1.0, spec: StateSpec = SPEC) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in spec.shapes.items()}


@st.composite
def states(draw: st.DrawFn, kind: type[AdapterState] = AdapterState) -> AdapterState:
    return kind(SPEC, {n: draw(npst.arrays(np.float32, s, elements=floats)) for n, s in SHAPES.items()})


@given(states())
def test_out_and_in_again(state: AdapterState) -> None:
    again = AdapterState.parse(state.to_bytes(), SPEC)
    assert list(again.tensors) == sorted(SHAPES)
    assert all(np.array_equal(again.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert len(state.to_bytes()) <= SPEC.n_bytes


@given(states(), states())
def test_an_update_leads_from_one_state_to_the_other(one: AdapterState, two: AdapterState) -> None:
    update = difference(two, one)
    assert isinstance(update, AdapterUpdate)
    for name, tensor in applied(one, update).tensors.items():
        scale = np.maximum(np.abs(one.tensors[name]), np.abs(two.tensors[name]))
        assert np.all(np.abs(tensor - two.tensors[name]) <= 2e-7 * scale)


@given(states())
def test_the_norm_is_over_all_numbers_together(state: AdapterState) -> None:
    whole = np.concatenate([t.reshape(-1).astype(np.float64) for t in state.tensors.values()])
    assert state.norm() == pytest.approx(np.linalg.norm(whole))


def test_the_norm_of_a_tensor_of_many_pieces() -> None:
    spec = StateSpec(PrefixSpec(2), "causal-lm", {"x": (3, 50_000)}, {})
    assert AdapterState(spec, filled(2.0, spec)).norm() == pytest.approx(2 * np.sqrt(150_000))


def test_nothing_secret_is_in_the_repr_and_nothing_can_be_written() -> None:
    state = AdapterState(SPEC, filled(0.123))
    assert "123" not in repr(state)
    with pytest.raises(ValueError, match="read-only"):
        state.tensors["head.weight"][0, 0] = 1


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"head.weight": None}, "head.weight", "missing"),
        ({"other": np.zeros(1, np.float32)}, "other", "unknown"),
        ({"head.weight": np.zeros((4, 2), np.float32)}, "head.weight", r"\(4, 2\) float32, expected \(2, 4\)"),
        ({"head.weight": np.zeros((2, 4))}, "head.weight", "float64"),
        ({"head.weight": np.zeros((2, 4), np.float16)}, "head.weight", "float16"),
        ({"head.weight": np.zeros((2, 4), np.int32)}, "head.weight", "int32"),
        ({"head.weight": np.full((2, 4), np.nan, np.float32)}, "head.weight", "not finite"),
        ({"head.weight": np.full((2, 4), -np.inf, np.float32)}, "head.weight", "not finite"),
    ],
    ids=["missing", "unknown", "shape", "float64", "float16", "int32", "nan", "inf"],
)
def test_what_does_not_fit_is_named(change: dict, key: str, message: str) -> None:
    tensors = {name: tensor for name, tensor in (filled() | change).items() if tensor is not None}
    with pytest.raises(StateMismatchError, match=message) as caught:
        AdapterState.parse(enc(LABEL + b" state", SPEC.digest, save(tensors)), SPEC)
    assert caught.value.key == key
    with pytest.raises(StateMismatchError) as caught:
        AdapterState(SPEC, tensors)
    assert caught.value.key == key


def test_an_update_is_no_state() -> None:
    with pytest.raises(MalformedMessageError, match="not an encoded adapter state"):
        AdapterState.parse(AdapterUpdate(SPEC, filled()).to_bytes(), SPEC)


@pytest.mark.parametrize(
    "other",
    [
        StateSpec(LoraSpec(r=2, alpha=8), "causal-lm", SHAPES, {}),
        StateSpec(LoraSpec(r=2, use_rslora=True), "causal-lm", SHAPES, {}),
        StateSpec(LoraSpec(r=2), "sequence-classification", SHAPES, {}),
        StateSpec(LoraSpec(r=2), "causal-lm", SHAPES, {}, is_transposed=True),
        StateSpec(LoraSpec(r=2, freeze_a=True), "causal-lm", SHAPES, {}),
        StateSpec(LoraSpec(r=2), "causal-lm", SHAPES, {"a": (1, 2)}, 3),
        StateSpec(PrefixSpec(2), "causal-lm", SHAPES, {}, layout=PrefixLayout(1, 1, 2)),
    ],
    ids=["alpha", "rslora", "task", "transposed", "ffa", "fixed", "prefix"],
)
def test_a_state_of_another_spec_is_refused_though_its_shapes_fit(other: StateSpec) -> None:
    state = AdapterState(other, filled())
    with pytest.raises(StateMismatchError, match="another adapter") as caught:
        AdapterState.parse(state.to_bytes(), SPEC)
    assert caught.value.key == "spec"
    for combine in (difference, applied):
        with pytest.raises(StateMismatchError, match="another adapter") as caught:
            combine(AdapterState(SPEC, filled()), state)  # type: ignore[arg-type]
        assert caught.value.key == "adapter"


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    with pytest.raises(LimitExceededError):
        AdapterState.parse(bytes(SPEC.n_bytes + 1), SPEC)


@given(st.binary(max_size=400))
def test_any_bytes_give_a_state_or_a_refusal(blob: bytes) -> None:
    with pytest.raises((WireError, StateMismatchError)):
        AdapterState.parse(blob, SPEC)


@given(st.binary(max_size=300))
def test_any_tensor_bytes_give_a_state_or_a_refusal(body: bytes) -> None:
    with pytest.raises((WireError, StateMismatchError)):
        AdapterState.parse(enc(LABEL + b" state", SPEC.digest, body), SPEC)


@given(st.data())
def test_a_changed_byte_gives_a_state_or_a_refusal(data: st.DataObject) -> None:
    blob = bytearray(AdapterState(SPEC, filled()).to_bytes())
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        state = AdapterState.parse(bytes(blob), SPEC)
    except (WireError, StateMismatchError):
        return
    assert all(np.isfinite(tensor).all() for tensor in state.tensors.values())


def test_a_type_without_a_numpy_name_is_refused() -> None:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    body = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises((MalformedMessageError, StateMismatchError)):
        AdapterState.parse(enc(LABEL + b" state", SPEC.digest, body), SPEC)


def test_a_sum_or_difference_beyond_float32_is_refused() -> None:
    large, small = AdapterState(SPEC, filled(3e38)), AdapterState(SPEC, filled(-3e38))
    with pytest.raises(StateMismatchError, match="finite"):
        difference(large, small)
    with pytest.raises(StateMismatchError, match="finite"):
        applied(large, AdapterUpdate(SPEC, filled(3e38)))


def test_pairs_are_those_where_both_halves_train() -> None:
    assert SPEC.lora_pairs() == (("b.lora_A.weight", "b.lora_B.weight"),)
    ffa = StateSpec(LoraSpec(freeze_a=True), "causal-lm", {"b.lora_B.weight": (3, 2)}, {"b.lora_A.weight": (2, 4)}, 0)
    assert ffa.lora_pairs() == ()


def test_an_adapter_that_is_too_large_is_refused() -> None:
    with pytest.raises(AdapterError, match="limit"):
        StateSpec(PrefixSpec(2), "causal-lm", {"x": (1 << 16, 1 << 13)}, {})


def test_the_digest_does_not_depend_on_the_order_of_names() -> None:
    turned = StateSpec(LoraSpec(r=2), "causal-lm", dict(reversed(SHAPES.items())), {})
    assert turned.digest == SPEC.digest
    SPEC.require(turned)
