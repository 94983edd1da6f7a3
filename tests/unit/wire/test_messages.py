from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cloister import wire
from cloister.errors import (
    DecryptionError,
    LimitExceededError,
    MalformedMessageError,
    UnsupportedVersionError,
    WireError,
    error_for_code,
)
from cloister.wire import _envelope, _messages

_SHA = b"\x01" * 48
_ENTRY = wire.ShardEntry("a" * 64, 1000, 3, 20, "train")
_MANIFEST = wire.Manifest(
    run_id="20261122-2101-quickstart-ab12",
    client="north",
    job_sha384=_SHA,
    feature_key=b"\x7f" * 32,
    hidden_size=384,
    boundary="int8",
    task="sequence-classification",
    shards=(_ENTRY, dataclasses.replace(_ENTRY, name="b" * 64, split="test")),
    n_truncated=0,
)
_RECORD_MESSAGES: list[wire.RecordMessage] = [
    wire.PrepareRequest(_SHA, 10.0),
    wire.PrepareProgress(1, 2, 3),
    _MANIFEST,
    wire.AdmitRequest(_SHA, 10.0),
    wire.AdmitAnswer(_SHA, bytes(48), bytes(48), 7, 0),
    wire.RoundRequest(1, "train", b"adapter", 10.0),
    wire.RoundProgress(1, 2, False),
    wire.RoundAnswer(1, "train", b"update", 7, b"{}"),
    wire.FinishRequest(b"{}", b"", b"weights"),
    wire.FinishAnswer(_SHA),
    wire.PredictRequest(b"tensors"),
    wire.PredictAnswer(b"scores"),
    wire.ErrorAnswer("store.full"),
]
_ANY_OF_THE_TYPE = ("body", "patience_s", "shards", "adapter", "facts", "is_lost")
_CLEAR = [
    wire.Header("run-1", 3, "prepare", "server", "north", 2),
    wire.Envelope("record", b"xyz"),
    wire.Envelope("error", b"channel.replay"),
    wire.Evidence("simulated", b"quote", b"{}"),
]


@pytest.mark.parametrize("message", _RECORD_MESSAGES + _CLEAR, ids=lambda m: type(m).__name__)
def test_round_trip(message: Any) -> None:
    assert type(message).parse(message.to_bytes()) == message


@pytest.mark.parametrize("message", _RECORD_MESSAGES, ids=lambda m: type(m).__name__)
def test_record_messages_are_told_apart_by_kind(message: wire.RecordMessage) -> None:
    assert wire.parse_message(message.to_bytes()) == message


@pytest.mark.parametrize("message", _RECORD_MESSAGES + _CLEAR, ids=lambda m: type(m).__name__)
def test_unknown_missing_and_mistyped_fields_are_refused(message: Any) -> None:
    cls = type(message)
    body = wire.unpack(message.to_bytes(), cls.KIND)
    with pytest.raises(MalformedMessageError):
        cls.parse(wire.pack(cls.KIND, {**body, "extra": 1}))
    for field in body:
        with pytest.raises(MalformedMessageError):
            cls.parse(wire.pack(cls.KIND, {k: v for k, v in body.items() if k != field}))
        for wrong in (None, True, -1, 1 if isinstance(body[field], float) else "\n", 0.5, b"", [], {}, [1], "ä"):
            if type(wrong) is type(body[field]) and cls in (wire.Envelope, wire.Evidence, wire.FinishRequest):
                continue  # an empty byte string is a right value there
            if type(wrong) is type(body[field]) and field in _ANY_OF_THE_TYPE and wrong != [1]:
                continue  # empty bodies, half a second and no shards at all are right values
            with pytest.raises(MalformedMessageError):
                cls.parse(wire.pack(cls.KIND, {**body, field: wrong}))


def test_a_message_of_no_known_kind() -> None:
    with pytest.raises(MalformedMessageError, match="unknown message kind header"):
        wire.parse_message(_CLEAR[0].to_bytes())
    with pytest.raises(UnsupportedVersionError):
        wire.parse_message(b"CLST\x09" + _RECORD_MESSAGES[0].to_bytes()[5:])


def test_secrets_are_not_shown() -> None:
    shown = repr([*_RECORD_MESSAGES, *_CLEAR])
    for secret in ("feature_key", "weights", "tensors", "scores", "xyz", "\\x7f"):
        assert secret not in shown


def test_whole_seconds_go_out_as_the_one_encoding() -> None:
    whole = wire.PrepareRequest(_SHA, 10)
    assert whole == wire.PrepareRequest(_SHA, 10.0)
    assert wire.PrepareRequest.parse(whole.to_bytes()) == whole
    with pytest.raises(MalformedMessageError):
        wire.PrepareRequest.parse(wire.pack("prepare.request", {"job_sha384": _SHA, "patience_s": 10}))


@pytest.mark.parametrize("patience_s", [float("nan"), float("inf"), -1.0, 86_401.0, True])
def test_patience_is_a_number_of_seconds(patience_s: float) -> None:
    with pytest.raises(WireError):
        wire.PrepareRequest(_SHA, patience_s)


def test_error_envelope_carries_a_stable_code_only() -> None:
    envelope = wire.Envelope.for_error(DecryptionError("secret detail"))
    assert envelope.body == b"channel.decryption"
    assert error_for_code(wire.Envelope.parse(envelope.to_bytes()).error_code) is DecryptionError
    assert wire.Envelope("f1", b"channel.decryption").error_code == ""
    for body in (b"", b"Not A Code", b"\xff", b"a" * 65):
        with pytest.raises(WireError):
            wire.Envelope("error", body)


@pytest.mark.parametrize(
    "fields",
    [
        {"run_id": ""},
        {"run_id": "a/b"},
        {"run_id": "a" * 129},
        {"round": -1},
        {"round": 1 << 31},
        {"round": True},
        {"kind": "Prepare"},
        {"sender": "North"},
        {"receiver": "n" * 33},
        {"attempt": -1},
        {"attempt": 1 << 31},
    ],
)
def test_header_fields_have_their_forms(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        dataclasses.replace(_CLEAR[0], **fields)


def test_the_longest_header_fits_its_limit() -> None:
    longest = wire.Header("r" * 128, (1 << 31) - 1, "k" * 64, "s" * 32, "c" * 32, (1 << 31) - 1)
    assert len(longest.to_bytes()) < wire.MAX_HEADER_BYTES
    with pytest.raises(LimitExceededError):
        wire.Header.parse(bytes(wire.MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"feature_key": bytes(31)},
        {"job_sha384": bytes(49)},
        {"hidden_size": 0},
        {"hidden_size": (1 << 20) + 1},
        {"boundary": "fp16"},
        {"task": "regression"},
        {"n_truncated": 1 << 53},
        {"shards": (_ENTRY, _ENTRY)},
    ],
)
def test_manifest_fields_have_their_forms(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        dataclasses.replace(_MANIFEST, **fields)


@pytest.mark.parametrize(
    "fields", [{"name": "A" * 64}, {"n_bytes": -1}, {"n_examples": 0.5}, {"n_tokens": True}, {"split": "dev"}]
)
def test_shard_fields_have_their_forms(fields: dict[str, Any]) -> None:
    body = wire.unpack(_MANIFEST.to_bytes(), "manifest")
    with pytest.raises(WireError):
        wire.Manifest.parse(wire.pack("manifest", {**body, "shards": [{**dataclasses.asdict(_ENTRY), **fields}]}))


def test_shard_with_a_field_too_many() -> None:
    body = wire.unpack(_MANIFEST.to_bytes(), "manifest")
    with pytest.raises(MalformedMessageError, match="exactly the fields"):
        wire.Manifest.parse(wire.pack("manifest", {**body, "shards": [{**dataclasses.asdict(_ENTRY), "more": 1}]}))


def test_number_of_shards_is_limited_before_any_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = wire.unpack(_MANIFEST.to_bytes(), "manifest")
    monkeypatch.setattr(_messages._limits, "MAX_SHARDS", 1)
    with pytest.raises(LimitExceededError):
        wire.Manifest.parse(wire.pack("manifest", {**body, "shards": [1, 2]}))


def test_number_of_shards_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = _MANIFEST.to_bytes()
    monkeypatch.setattr(_messages._limits, "MAX_SHARDS", 1)
    with pytest.raises(LimitExceededError):
        wire.Manifest.parse(encoded)
    with pytest.raises(LimitExceededError):
        dataclasses.replace(_MANIFEST)


@pytest.mark.parametrize("build", [lambda: wire.PrepareProgress(3, 2, 0), lambda: wire.RoundProgress(3, 2, False)])
def test_progress_is_not_over_its_total(build: Callable[[], object]) -> None:
    with pytest.raises(LimitExceededError):
        build()


@pytest.mark.parametrize("message", [m for m in _RECORD_MESSAGES if hasattr(m, "patience_s")], ids=lambda m: m.KIND)
def test_seconds_have_one_encoding(message: Any) -> None:
    assert dataclasses.replace(message, patience_s=10).to_bytes() == message.to_bytes()
    body = wire.unpack(message.to_bytes(), message.KIND)
    with pytest.raises(MalformedMessageError, match="seconds"):
        type(message).parse(wire.pack(message.KIND, {**body, "patience_s": 10}))


@pytest.mark.parametrize(
    "build",
    [
        lambda: wire.RoundRequest(0, "train", b"", 1.0),
        lambda: wire.RoundRequest(1, "sleep", b"", 1.0),  # pyright: ignore[reportArgumentType]
        lambda: wire.RoundAnswer(0, "train", b"", 0, b""),
        lambda: wire.RoundAnswer(1, "sleep", b"", 0, b""),  # pyright: ignore[reportArgumentType]
        lambda: wire.RoundProgress(0, 0, 1),  # pyright: ignore[reportArgumentType]
        lambda: wire.AdmitAnswer(_SHA, _SHA, b"", 0, 0),
        lambda: wire.AdmitAnswer(_SHA, _SHA, _SHA, -1, 0),
        lambda: wire.AdmitAnswer(_SHA, _SHA, _SHA, 0, -1),
        lambda: wire.AdmitRequest(b"", 1.0),
    ],
)
def test_a_round_that_does_not_exist(build: Callable[[], object]) -> None:
    with pytest.raises(MalformedMessageError):
        build()


def test_facts_and_adapters_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitExceededError, match="facts"):
        wire.RoundAnswer(1, "train", b"", 0, bytes((1 << 20) + 1))
    monkeypatch.setattr(_envelope._limits, "MAX_RELEASE_BYTES", 4)
    for build in (
        lambda: wire.RoundRequest(1, "train", bytes(5), 1.0),
        lambda: wire.RoundAnswer(1, "train", bytes(5), 0, b""),
    ):
        with pytest.raises(LimitExceededError, match="adapter"):
            build()


def test_byte_fields_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_envelope._limits, "MAX_RELEASE_BYTES", 4)
    wire.FinishRequest(b"", b"", bytes(4))
    with pytest.raises(LimitExceededError):
        wire.FinishRequest(b"", b"", bytes(5))


def test_envelope_and_evidence_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_ENVELOPE_BYTES", "MAX_EVIDENCE_BLOB_BYTES", "MAX_EVIDENCE_AUX_BYTES"):
        monkeypatch.setattr(_envelope._limits, limit, 4)
    wire.Envelope("f1", bytes(4))
    wire.Evidence("tdx", bytes(4), bytes(4))
    with pytest.raises(LimitExceededError, match="envelope body"):
        wire.Envelope("f1", bytes(5))
    with pytest.raises(LimitExceededError, match="evidence blob"):
        wire.Evidence("tdx", bytes(5), b"")
    with pytest.raises(LimitExceededError, match="evidence aux"):
        wire.Evidence("tdx", b"", bytes(5))


def test_limits_leave_room_for_what_they_hold() -> None:
    largest = wire.MAX_RELEASE_BYTES + wire.MAX_REPORT_BYTES + wire.MAX_EVIDENCE_BYTES
    assert largest + 4096 < wire.MAX_MESSAGE_BYTES
    assert wire.MAX_MESSAGE_BYTES * (1 + 16 / 16384) + 4096 < wire.MAX_ENVELOPE_BYTES
    full = wire.Evidence("a" * 32, bytes(wire.MAX_EVIDENCE_BLOB_BYTES), bytes(wire.MAX_EVIDENCE_AUX_BYTES))
    assert wire.Evidence.parse(full.to_bytes()) == full
