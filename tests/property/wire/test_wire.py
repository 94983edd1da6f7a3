"""Round trips, one encoding for each value, and parsers that are total."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister import wire
from cloister.errors import WireError
from cloister.wire import _cbor

# Deterministic and without a deadline: the same result on a busy machine.
_SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.binary(max_size=30)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=30,
)
_KINDS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
_NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)
_RUN_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
_COUNTS = st.integers(0, (1 << 53) - 1)
_SHA = st.binary(min_size=48, max_size=48)
_BYTES = st.binary(max_size=200)

_HEADERS = st.builds(
    wire.Header, _RUN_IDS, st.integers(0, 2**31 - 1), _KINDS, _NAMES, _NAMES, st.integers(0, 2**31 - 1)
)
_ENTRIES = st.builds(
    wire.ShardEntry,
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    _COUNTS,
    _COUNTS,
    _COUNTS,
    st.sampled_from(["train", "test"]),
)
_ROUNDS = st.integers(1, (1 << 31) - 1)
_WORK = st.sampled_from(["train", "evaluate"])
_MANIFESTS = st.builds(
    wire.Manifest,
    run_id=_RUN_IDS,
    client=_NAMES,
    job_sha384=_SHA,
    feature_key=st.binary(min_size=32, max_size=32),
    hidden_size=st.integers(1, 1 << 20),
    boundary=st.sampled_from(["int8", "bf16", "fp32"]),
    task=st.sampled_from(["causal-lm", "sequence-classification"]),
    shards=st.lists(_ENTRIES, max_size=4, unique_by=lambda e: e.name).map(tuple),
    n_truncated=_COUNTS,
)
_MESSAGES = (
    _MANIFESTS
    | st.builds(wire.PrepareRequest, _SHA, st.floats(0, 86_400))
    | st.tuples(_COUNTS, _COUNTS, _COUNTS).map(lambda n: wire.PrepareProgress(min(n[0], n[1]), n[1], n[2]))
    | st.builds(wire.AdmitRequest, _SHA, st.floats(0, 86_400))
    | st.builds(wire.AdmitAnswer, _SHA, _SHA, _SHA, _COUNTS, _COUNTS)
    | st.builds(wire.RoundRequest, _ROUNDS, _WORK, _BYTES, st.floats(0, 86_400))
    | st.tuples(_COUNTS, _COUNTS, st.booleans()).map(lambda n: wire.RoundProgress(min(n[0], n[1]), n[1], n[2]))
    | st.builds(wire.RoundAnswer, _ROUNDS, _WORK, _BYTES, _COUNTS, _BYTES)
    | st.builds(wire.FinishRequest, _BYTES, _BYTES, _BYTES)
    | st.builds(wire.FinishAnswer, _SHA)
    | st.builds(wire.PredictRequest, _BYTES)
    | st.builds(wire.PredictAnswer, _BYTES)
    | st.builds(wire.ErrorAnswer, st.from_regex(r"[a-z0-9][a-z0-9.-]{0,63}", fullmatch=True))
)
_PARSERS: list[Callable[[bytes], Any]] = [
    wire.unpack_any,
    wire.parse_message,
    wire.Header.parse,
    wire.Envelope.parse,
    wire.Evidence.parse,
    wire.Manifest.parse,
    lambda blob: wire.dec(blob, 3),
    _cbor.decode,
]


@_SETTINGS
@given(st.lists(_BYTES, max_size=6))
def test_dec_inverts_enc(parts: list[bytes]) -> None:
    assert wire.dec(wire.enc(*parts), len(parts)) == tuple(parts)


@_SETTINGS
@given(st.lists(_BYTES, max_size=3), st.lists(_BYTES, max_size=3))
@example([b"ab", b"c"], [b"a", b"bc"])
def test_enc_keeps_lists_apart(a: list[bytes], b: list[bytes]) -> None:
    assert (wire.enc(*a) == wire.enc(*b)) == (a == b)


@_SETTINGS
@given(_VALUES)
def test_encoding_agrees_with_another_implementation(value: Any) -> None:
    encoded = _cbor.encode(value)
    assert encoded == cbor2.dumps(value, canonical=True)
    assert _cbor.decode(encoded) == value


@_SETTINGS
@given(st.binary(max_size=40))
def test_what_decodes_has_one_encoding(blob: bytes) -> None:
    try:
        value = _cbor.decode(blob)
    except WireError:
        return
    assert _cbor.encode(value) == blob


@_SETTINGS
@given(_KINDS, st.dictionaries(st.text(max_size=10), _VALUES, max_size=4))
def test_unpack_inverts_pack(kind: str, body: dict[str, Any]) -> None:
    assert wire.unpack_any(wire.pack(kind, body)) == (kind, body)


@_SETTINGS
@given(_MESSAGES)
def test_messages_come_back(message: wire.RecordMessage) -> None:
    assert wire.parse_message(message.to_bytes()) == message


@_SETTINGS
@given(_HEADERS)
def test_headers_come_back_and_fit(header: wire.Header) -> None:
    encoded = header.to_bytes()
    assert wire.Header.parse(encoded) == header
    assert len(encoded) <= wire.MAX_HEADER_BYTES


@pytest.mark.parametrize("parse", _PARSERS)
@_SETTINGS
@given(blob=st.binary(max_size=300))
def test_parsers_are_total_on_any_bytes(parse: Callable[[bytes], Any], blob: bytes) -> None:
    for candidate in (blob, b"CLST\x01" + blob):
        with contextlib.suppress(WireError):
            parse(candidate)


@pytest.mark.parametrize("parse", _PARSERS)
@_SETTINGS
@given(kind=_KINDS | st.sampled_from(["header", "envelope", "evidence", "manifest", "prepare.request"]), body=_VALUES)
def test_parsers_are_total_on_any_values(parse: Callable[[bytes], Any], kind: str, body: Any) -> None:
    with contextlib.suppress(WireError):
        parse(b"CLST\x01" + _cbor.encode([kind, body]))


@_SETTINGS
@given(message=_MESSAGES, position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
def test_an_altered_message_is_another_one_or_refused(
    message: wire.RecordMessage, position: float, bit: int, data: st.DataObject
) -> None:
    altered = bytearray(message.to_bytes())
    altered[int(position * len(altered))] ^= 1 << bit
    del altered[data.draw(st.integers(len(altered) // 2, len(altered))) :]
    try:
        parsed = wire.parse_message(altered)
    except WireError:
        return
    assert parsed != message
    assert parsed.to_bytes() == altered
