"""What a client may not do to the global adapter: each try is refused by name, and the round goes on without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from cloister.adapters import AdapterState, AdapterUpdate, LoraSpec, StateSpec
from cloister.errors import UpdateRejectedError
from cloister.federation import AggregationSpec, Aggregator
from cloister.wire import enc

NAME = "m.0.x.lora_A.weight"
SPEC = StateSpec(LoraSpec(r=2), "causal-lm", {NAME: (2, 4), "m.0.x.lora_B.weight": (3, 2)}, {})
OTHER = StateSpec(LoraSpec(r=3), "causal-lm", {NAME: (3, 4), "m.0.x.lora_B.weight": (3, 3)}, {})
LABEL = b"cloister-adapter/v1 update"


def tensors(value: float = 1.0, spec: StateSpec = SPEC) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in spec.shapes.items()}


def honest() -> bytes:
    return AdapterUpdate(SPEC, tensors()).to_bytes()


def forged(**changes: np.ndarray | None) -> bytes:
    """An update of the right spec by its label, with other tensors in it."""
    found = {n: t for n, t in (tensors() | changes).items() if t is not None}
    return enc(LABEL, SPEC.digest, save(found))


@pytest.fixture
def ours(tmp_path: Path) -> Aggregator:
    start = AdapterState(SPEC, tensors(0.0))
    made = Aggregator(AggregationSpec(max_norm=10.0), start, min_clients=1, folder=tmp_path)
    made.begin(["north", "south"])
    made.add("north", 5, honest(), round=1)
    return made


def header(**fields: object) -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "update"),
    "noise": (lambda: b"\x80\x04\x95" * 40, "update"),
    "cut-short": (lambda: honest()[:-1], "update"),
    "one-byte-more": (lambda: honest() + b"\x00", "update"),
    "too-long": (lambda: bytes(SPEC.n_bytes + 1), "update"),
    "a-state": (lambda: AdapterState(SPEC, tensors()).to_bytes(), "update"),
    "another-label": (lambda: enc(b"cloister-adapter/v2 update", SPEC.digest, save(tensors())), "update"),
    "pickle": (lambda: enc(LABEL, SPEC.digest, b"\x80\x04N."), "update"),
    "header-of-a-gigabyte": (lambda: enc(LABEL, SPEC.digest, (1 << 30).to_bytes(8, "little") + b"{}"), "update"),
    "overlapping-tensors": (
        lambda: enc(
            LABEL,
            SPEC.digest,
            header(
                a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            )
            + bytes(12),
        ),
        "update",
    ),
    "another-adapter": (lambda: AdapterUpdate(OTHER, tensors(1.0, OTHER)).to_bytes(), "spec"),
    "another-adapter-that-claims-to-be-ours": (lambda: enc(LABEL, SPEC.digest, save(tensors(1.0, OTHER))), NAME),
    "missing-tensor": (lambda: forged(**{NAME: None}), NAME),
    "unknown-tensor": (lambda: forged(more=np.ones(1, np.float32)), "more"),
    "transposed": (lambda: forged(**{NAME: np.ones((4, 2), np.float32)}), NAME),
    "broadcasts": (lambda: forged(**{NAME: np.ones((1, 4), np.float32)}), NAME),
    "float64": (lambda: forged(**{NAME: np.ones((2, 4))}), NAME),
    "float16": (lambda: forged(**{NAME: np.ones((2, 4), np.float16)}), NAME),
    "nan": (lambda: forged(**{NAME: np.full((2, 4), np.nan, np.float32)}), NAME),
    "one-infinity": (lambda: forged(**{NAME: np.array([[0, 0, 0, np.inf]] * 2, np.float32)}), NAME),
    "too-large": (lambda: AdapterUpdate(SPEC, tensors(4.0)).to_bytes(), "norm"),
    "norm-beyond-float32": (lambda: AdapterUpdate(SPEC, tensors(3e38)).to_bytes(), "norm"),
}


@pytest.mark.parametrize(("blob", "key"), CASES.values(), ids=CASES)
def test_it_is_refused_by_name_and_the_round_goes_on(ours: Aggregator, blob: Callable[[], bytes], key: str) -> None:
    with pytest.raises(UpdateRejectedError, match="client south") as caught:
        ours.add("south", 5, blob(), round=1)
    assert (caught.value.peer, caught.value.key, caught.value.code) == ("south", key, "federation.update")
    result = ours.finish()
    assert result.clients == ("north",)
    assert result.rejected == {"south": (key, caught.value.cause)}
    assert all((tensor == 1).all() for tensor in result.state.tensors.values())


@pytest.mark.parametrize("claim", [0, -1, True, 1.5, "7", None, float("nan")], ids=repr)
def test_a_claim_that_is_no_count_is_refused(ours: Aggregator, claim: int) -> None:
    with pytest.raises(UpdateRejectedError, match="no examples") as caught:
        ours.add("south", claim, honest(), round=1)
    assert caught.value.key == "n_examples"


@pytest.mark.parametrize("number", [0, 2, -1])
def test_an_update_of_another_round_is_refused_and_the_right_one_still_counts(ours: Aggregator, number: int) -> None:
    with pytest.raises(UpdateRejectedError, match="round") as caught:
        ours.add("south", 5, honest(), round=number)
    assert caught.value.key == "round"
    assert ours.add("south", 5, honest(), round=1)


def test_a_stranger_is_refused(ours: Aggregator) -> None:
    with pytest.raises(UpdateRejectedError, match="no part") as caught:
        ours.add("east", 5, honest(), round=1)
    assert caught.value.peer == "east"
    assert ours.finish().clients == ("north",)


@pytest.mark.parametrize("second", ["other-update", "other-count"])
def test_a_second_other_update_is_refused_and_the_first_counts(ours: Aggregator, second: str) -> None:
    n_examples, value = (5, 2.0) if second == "other-update" else (6, 1.0)
    with pytest.raises(UpdateRejectedError, match="second") as caught:
        ours.add("north", n_examples, AdapterUpdate(SPEC, tensors(value)).to_bytes(), round=1)
    assert (caught.value.peer, caught.value.key) == ("north", "update")
    result = ours.finish()
    assert result.clients == ("north",)
    assert all((tensor == 1).all() for tensor in result.state.tensors.values())


def test_who_was_refused_has_no_second_try_in_the_round(ours: Aggregator) -> None:
    causes = []
    for blob in (b"", honest()):
        with pytest.raises(UpdateRejectedError) as caught:
            ours.add("south", 5, blob, round=1)
        causes.append((caught.value.key, caught.value.cause))
    assert causes[0] == causes[1]
    assert ours.finish().clients == ("north",)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_refused_or_is_another_finite_update(tmp_path: Path, data: st.DataObject) -> None:
    blob = bytearray(honest())
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    start = AdapterState(SPEC, tensors(0.0))
    ours = Aggregator(AggregationSpec(max_norm=10.0), start, min_clients=1, folder=tmp_path)
    ours.begin(["north", "south"])
    ours.add("north", 1, honest(), round=1)
    try:
        ours.add("south", 1, bytes(blob), round=1)
    except UpdateRejectedError as error:
        assert error.peer == "south"
    assert ours.finish().state.norm() <= 10.0
