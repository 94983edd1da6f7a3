"""Shard bodies: what goes in comes out, and any other bytes are refused with one of two errors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from cloister import wire
from cloister.errors import DataError, LimitExceededError, MalformedMessageError, WireError
from cloister.train import (
    Feature,
    TaskSpec,
    _shards,
    decode_shard,
    dequantize,
    encode_shard,
    quantize,
    shard_context,
    shard_entries,
)

H = 6
CLASSIFY = TaskSpec("sequence-classification", labels=("a", "b", "c"))
CAUSAL = TaskSpec("causal-lm")
BOUNDARIES = ("int8", "bf16", "fp32")


def _features(task: TaskSpec, n: int = 4) -> list[Feature]:
    generator = torch.Generator().manual_seed(n)
    found = []
    for i in range(n):
        hidden = torch.randn(i + 1, H, generator=generator)
        labels = torch.tensor([-100] + [i + 10] * i) if task is CAUSAL else None
        found.append(Feature(100 - i, hidden, label=None if task is CAUSAL else i % 3, labels=labels))
    return found


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("task", [CLASSIFY, CAUSAL], ids=lambda t: t.name)
def test_what_goes_in_comes_out_quantised(task: TaskSpec, boundary: Any) -> None:
    features = _features(task)
    body = decode_shard(encode_shard(features, boundary=boundary, task=task), hidden_size=H, task=task)
    assert (len(body), body.n_tokens, body.boundary, body.hidden_size) == (4, 10, boundary, H)
    assert body.indices == [100, 99, 98, 97]
    assert body.lengths == [1, 2, 3, 4]
    for i, feature in enumerate(features):
        found = body.example(i)
        assert torch.equal(found.hidden, dequantize(quantize(feature.hidden, boundary)))
        assert (found.index, found.label) == (feature.index, feature.label)
        if feature.labels is not None:
            assert found.labels is not None
            assert torch.equal(found.labels, feature.labels)
    with pytest.raises(IndexError):
        body.example(4)


def test_an_examples_tensors_are_its_own() -> None:
    for task in (CLASSIFY, CAUSAL):
        body = decode_shard(encode_shard(_features(task), boundary="fp32", task=task), hidden_size=H, task=task)
        body.example(1).hidden.zero_()
        assert bool((body.example(1).hidden != 0).any())
        labels = body.example(1).labels
        if labels is not None:
            labels.zero_()
            assert body.example(1).labels.tolist() == [-100, 11]  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_body_is_what_safetensors_itself_reads_and_aligned(boundary: Any) -> None:
    blob = encode_shard(_features(CAUSAL), boundary=boundary, task=CAUSAL)
    assert load(blob)["lengths"].tolist() == [1, 2, 3, 4]
    (size,) = struct.unpack("<Q", blob[:8])
    widths = {"I8": 1, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
    for entry in json.loads(blob[8 : 8 + size]).values():
        assert (8 + size + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("task", [CLASSIFY, CAUSAL], ids=lambda t: t.name)
def test_the_size_forecast_is_an_upper_bound(task: TaskSpec, boundary: Any) -> None:
    builder = _shards.ShardBuilder(boundary, task, H)
    for feature in _features(task, 40):
        forecast = builder.size_with(len(feature.hidden))
        builder.add(feature.index, quantize(feature.hidden, boundary), feature.label, feature.labels)
    blob = bytearray()
    builder.write_to(blob.extend)
    assert len(blob) <= forecast <= len(blob) + 1024


def test_an_unlabelled_question_is_no_training_example() -> None:
    blob = encode_shard([Feature(0, torch.ones(2, H))], boundary="fp32", task=CLASSIFY)
    assert decode_shard(blob, hidden_size=H, task=CLASSIFY, labelled=False).example(0).label is None
    with pytest.raises(MalformedMessageError, match="label is out of range"):
        decode_shard(blob, hidden_size=H, task=CLASSIFY)


def test_what_does_not_fit_is_not_encoded() -> None:
    with pytest.raises(DataError, match="at least one"):
        encode_shard([], boundary="int8", task=CLASSIFY)
    with pytest.raises(DataError, match="one label per token"):
        encode_shard([Feature(0, torch.ones(2, H))], boundary="int8", task=CAUSAL)
    with pytest.raises(DataError, match="does not fit"):
        encode_shard([Feature(0, torch.ones(2, H)), Feature(1, torch.ones(2, H + 1))], boundary="int8", task=CLASSIFY)
    with pytest.raises(DataError, match="does not fit"):
        encode_shard([Feature(0, torch.ones(0, H))], boundary="int8", task=CLASSIFY)


def _changed(task: TaskSpec, boundary: Any, change: Callable[[dict[str, torch.Tensor]], Any]) -> bytes:
    tensors = load(encode_shard(_features(task), boundary=boundary, task=task))
    change(tensors)
    return save(tensors)


def _set(name: str, value: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: value})


def _at(name: str, where: Any, value: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].__setitem__(where, value)


@pytest.mark.parametrize(
    ("task", "boundary", "change", "cause"),
    [
        (CLASSIFY, "int8", lambda t: t.pop("values"), "values are not"),
        (CLASSIFY, "int8", lambda t: t.pop("scales"), "other tensors"),
        (CLASSIFY, "int8", lambda t: t.pop("indices"), "other tensors"),
        (CLASSIFY, "fp32", _set("scales", torch.ones(10)), "other tensors"),
        (CLASSIFY, "int8", _set("more", torch.ones(1)), "other tensors"),
        (CLASSIFY, "int8", _set("values", torch.zeros(10, H + 1, dtype=torch.int8)), "values are not"),
        (CLASSIFY, "int8", _set("values", torch.zeros(10 * H, dtype=torch.int8)), "values are not"),
        (CLASSIFY, "fp32", _set("values", torch.zeros(10, H, dtype=torch.float64)), "values are not"),
        (CLASSIFY, "int8", _set("values", torch.zeros(9, H, dtype=torch.int8)), "scales are of another"),
        (CLASSIFY, "fp32", _set("values", torch.zeros(9, H)), "do not sum"),
        (CLASSIFY, "int8", _set("labels", torch.zeros(10, dtype=torch.int64)), "labels are of another"),
        (CAUSAL, "int8", _set("labels", torch.zeros(4, dtype=torch.int64)), "labels are of another"),
        (CLASSIFY, "int8", _set("lengths", torch.tensor([1, 2, 3, 4])), "lengths are of another"),
        (CLASSIFY, "int8", _at("lengths", 0, 2), "do not sum"),
        (CLASSIFY, "int8", _set("lengths", torch.tensor([0, 3, 3, 4], dtype=torch.int32)), "do not sum"),
        (CLASSIFY, "int8", _at("lengths", 0, 2**31 - 1), "do not sum"),
        (CLASSIFY, "int8", _at("indices", 0, 99), "name one example twice"),
        (CLASSIFY, "int8", _at("indices", 0, -1), "negative"),
        (CLASSIFY, "int8", _at("values", (0, 0), -128), "outside the int8 code"),
        (CLASSIFY, "int8", _at("scales", 3, float("nan")), "outside the int8 code"),
        (CLASSIFY, "int8", _at("scales", 3, -1.0), "outside the int8 code"),
        (CLASSIFY, "int8", _at("scales", 3, 3e38), "outside the int8 code"),
        (CLASSIFY, "fp32", _at("values", (0, 0), float("nan")), "not finite"),
        (CLASSIFY, "bf16", _at("values", (0, 0), float("inf")), "not finite"),
        (CLASSIFY, "int8", _at("labels", 0, 3), "out of range"),
        (CLASSIFY, "int8", _at("labels", 0, -1), "out of range"),
        (CAUSAL, "int8", _at("labels", 0, -1), "out of range"),
        (CAUSAL, "int8", _at("labels", 0, 512), "out of range"),
    ],
)
def test_a_body_that_contradicts_itself_is_refused(task: TaskSpec, boundary: Any, change: Any, cause: str) -> None:
    with pytest.raises(MalformedMessageError, match=cause):
        decode_shard(_changed(task, boundary, change), hidden_size=H, task=task, vocab_size=512)


def test_a_body_without_examples_is_refused() -> None:
    empty = {
        "values": torch.zeros(0, H),
        "indices": torch.zeros(0, dtype=torch.int64),
        "labels": torch.zeros(0, dtype=torch.int64),
        "lengths": torch.zeros(0, dtype=torch.int32),
    }
    with pytest.raises(MalformedMessageError, match="other tensors"):
        decode_shard(save(empty), hidden_size=H, task=CLASSIFY)


def test_a_body_over_the_limit_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "MAX_SHARD_BYTES", 10)
    with pytest.raises(LimitExceededError):
        decode_shard(bytes(11), hidden_size=H, task=CLASSIFY)


_GOOD = encode_shard(_features(CLASSIFY), boundary="int8", task=CLASSIFY)


@settings(deadline=None, max_examples=200)
@example(b"")
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 2) + b"[]")
@example(struct.pack("<Q", 1 << 62))
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(WireError):
        decode_shard(blob, hidden_size=H, task=CLASSIFY)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(_GOOD) - 1), st.integers(1, 255))
def test_any_changed_byte_gives_a_checked_body_or_a_refusal(position: int, flip: int) -> None:
    blob = bytearray(_GOOD)
    blob[position] ^= flip
    try:
        body = decode_shard(blob, hidden_size=H, task=CLASSIFY)
    except WireError:
        return
    for i in range(len(body)):
        assert bool(torch.isfinite(body.example(i).hidden).all())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, len(_GOOD) - 1))
def test_any_truncation_is_refused(length: int) -> None:
    with pytest.raises(MalformedMessageError):
        decode_shard(memoryview(_GOOD)[:length], hidden_size=H, task=CLASSIFY)


def test_contexts_bind_run_client_split_and_place() -> None:
    contexts = {
        shard_context(run, client, split, index)
        for run in ("r", "rs")
        for client in ("s", "a")
        for split in ("train", "test")
        for index in (0, 1)
    }
    assert len(contexts) == 16
    entries = tuple(
        wire.ShardEntry(f"{i:064x}", 1, 1, 1, split)  # pyright: ignore[reportArgumentType]
        for i, split in enumerate(["train", "train", "test"])
    )
    manifest = wire.Manifest("r", "a", bytes(48), bytes(32), H, "int8", "causal-lm", entries, 0)
    assert [context for _, context in shard_entries(manifest)] == [
        shard_context("r", "a", "train", 0),
        shard_context("r", "a", "train", 1),
        shard_context("r", "a", "test", 0),
    ]


def test_nothing_secret_is_shown() -> None:
    body = decode_shard(_GOOD, hidden_size=H, task=CLASSIFY)
    assert repr(body) == "ShardBody(4 examples, 10 tokens, int8)"
    assert repr(body.example(0)) == "Feature(index=100)"
