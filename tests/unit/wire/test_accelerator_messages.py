"""Headers of the accelerator: one encoding each, every number within its limit, anything else refused."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister import ring, wire
from cloister.errors import (
    DecryptionError,
    LimitExceededError,
    MalformedMessageError,
    OffloadError,
    UnsupportedVersionError,
    WireError,
)

SHA = bytes(range(47)) + b"\0"  # its last byte is no padding
HELLO = wire.AcceleratorHello("NVIDIA H200", "int-mm, triton")
LOAD = wire.AcceleratorLoad(7, 1, 8, 3, 5, SHA)
MULTIPLY = wire.AcceleratorMultiply(65_535, 1, 4, 512, 4096)
ANSWER = wire.AcceleratorAnswer(512, 4096)
ERROR = wire.AcceleratorError("offload.overflow")
ALL: list[Any] = [HELLO, wire.AcceleratorHello(), LOAD, MULTIPLY, ANSWER, wire.AcceleratorAnswer(), ERROR]

# From the specification's words, by struct alone.
FROZEN: list[tuple[Any, bytes]] = [
    (HELLO, b"CLSA\1\1\0\0" + b"NVIDIA H200".ljust(64, b"\0") + b"int-mm, triton".ljust(24, b"\0")),
    (LOAD, b"CLSA\1\2\0\0" + struct.pack(">IBBHII", 7, 1, 8, 0, 3, 5) + SHA),
    (MULTIPLY, b"CLSA\1\3\0\0" + struct.pack(">IBBHII", 65_535, 1, 4, 0, 512, 4096)),
    (ANSWER, b"CLSA\1\4\0\0" + struct.pack(">II", 512, 4096)),
    (ERROR, b"CLSA\1\5\0\0" + b"offload.overflow"),
]


def _name(message: object) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", ALL, ids=_name)
def test_round_trip(message: Any) -> None:
    blob = message.to_bytes()
    assert len(blob) == wire.ACCELERATOR_HEADER_BYTES == 96
    for view in (blob, bytearray(blob), memoryview(blob)):
        assert wire.parse_accelerator_message(view) == message == type(message).parse(view)


@pytest.mark.parametrize(("message", "blob"), FROZEN, ids=_name)
def test_frozen(message: Any, blob: bytes) -> None:
    assert message.to_bytes() == blob.ljust(96, b"\0")


def test_payloads() -> None:
    assert HELLO.payload_bytes == ERROR.payload_bytes == wire.AcceleratorAnswer().payload_bytes == 0
    assert LOAD.payload_bytes == 3 * 5 * 2 + 3 * 4
    assert MULTIPLY.payload_bytes == 4 * 512 * 4096
    assert ANSWER.payload_bytes == 4 * 512 * 4096


def test_the_limits_are_those_of_the_rings() -> None:
    assert wire.MAX_ACCELERATOR_FEATURES == ring.MAX_FEATURES
    for form in ring.FORMATS.values():
        wire.AcceleratorLoad(0, form.CODE, form.MAX_WEIGHT_BITS, 1, 1, SHA)
        wire.AcceleratorMultiply(0, 0, form.n_planes, 1, 1)
    assert wire.MAX_ACCELERATOR_PAYLOAD_BYTES >= 2 * wire.MAX_ACCELERATOR_FEATURES * 16_000


@pytest.mark.parametrize(
    ("message", "change", "error"),
    [
        (HELLO, {"device": "x" * 65}, LimitExceededError),
        (HELLO, {"kernel": "x" * 25}, LimitExceededError),
        (HELLO, {"device": "a\nb"}, MalformedMessageError),
        (HELLO, {"device": "\x1b[31m"}, MalformedMessageError),
        (HELLO, {"kernel": "é"}, MalformedMessageError),
        (LOAD, {"layer": 65_536}, LimitExceededError),
        (LOAD, {"layer": -1}, MalformedMessageError),
        (LOAD, {"ring": 2}, LimitExceededError),
        (LOAD, {"weight_bits": 17}, LimitExceededError),
        (LOAD, {"weight_bits": 1}, MalformedMessageError),
        (LOAD, {"n_out": 0}, MalformedMessageError),
        (LOAD, {"n_in": 0}, MalformedMessageError),
        (LOAD, {"n_out": 1 << 17}, LimitExceededError),
        (LOAD, {"n_in": 1 << 17}, LimitExceededError),
        (LOAD, {"n_in": 65_536, "n_out": 65_536}, LimitExceededError),
        (LOAD, {"digest": SHA[:47]}, MalformedMessageError),
        (MULTIPLY, {"layer": 65_536}, LimitExceededError),
        (MULTIPLY, {"direction": 2}, LimitExceededError),
        (MULTIPLY, {"n_planes": 0}, MalformedMessageError),
        (MULTIPLY, {"n_planes": 5}, LimitExceededError),
        (MULTIPLY, {"n_tokens": 0}, MalformedMessageError),
        (MULTIPLY, {"n_tokens": (1 << 20) + 1}, LimitExceededError),
        (MULTIPLY, {"n_features": 0}, MalformedMessageError),
        (MULTIPLY, {"n_features": 1 << 17}, LimitExceededError),
        (MULTIPLY, {"n_tokens": 1 << 20, "n_features": 1025}, LimitExceededError),
        (ANSWER, {"n_tokens": (1 << 20) + 1}, LimitExceededError),
        (ANSWER, {"n_features": 1 << 17}, LimitExceededError),
        (ANSWER, {"n_tokens": 1 << 20, "n_features": 1025}, LimitExceededError),
        (ERROR, {"error_code": ""}, MalformedMessageError),
        (ERROR, {"error_code": "Not A Code"}, MalformedMessageError),
        (ERROR, {"error_code": "x" * 65}, MalformedMessageError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", _name(value)),
)
def test_what_is_refused_both_ways(message: Any, change: dict[str, Any], error: type[WireError]) -> None:
    with pytest.raises(error):
        dataclasses.replace(message, **change)
    if all(isinstance(value, int) and value >= 0 for value in change.values()):
        body = message.BODY.pack(*{**vars(message), **change}.values())
        with pytest.raises(error):
            wire.parse_accelerator_message((message.to_bytes()[:8] + body).ljust(96, b"\0"))


@pytest.mark.parametrize("text", [b"a\nb", b"\x1b[31m", b"\xc3\xa9", b"a\0b"])
def test_a_name_is_printable(text: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        wire.parse_accelerator_message((HELLO.to_bytes()[:8] + text).ljust(96, b"\0"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda blob: blob[:-1], MalformedMessageError),
        (lambda blob: blob + b"\0", MalformedMessageError),
        (lambda blob: blob[:6], MalformedMessageError),
        (lambda blob: b"", MalformedMessageError),
        (lambda blob: b"CLST" + blob[4:], MalformedMessageError),
        (lambda blob: blob[:4] + b"\2" + blob[5:], UnsupportedVersionError),
        (lambda blob: blob[:5] + b"\0" + blob[6:], MalformedMessageError),
        (lambda blob: blob[:5] + b"\6" + blob[6:], MalformedMessageError),
        (lambda blob: blob[:7] + b"\1" + blob[8:], MalformedMessageError),
        (lambda blob: blob[:14] + b"\1" + blob[15:], MalformedMessageError),
        (lambda blob: blob[:-1] + b"\1", MalformedMessageError),
    ],
    ids=["short", "long", "prefix only", "empty", "magic", "version", "kind-0", "kind-6", "prefix", "gap", "tail"],
)
def test_other_bytes(change: Callable[[bytes], bytes], error: type[WireError]) -> None:
    with pytest.raises(error):
        wire.parse_accelerator_message(change(MULTIPLY.to_bytes()))


def test_another_kind_than_asked_for() -> None:
    with pytest.raises(MalformedMessageError, match="expected AcceleratorAnswer, got AcceleratorHello"):
        wire.AcceleratorAnswer.parse(HELLO.to_bytes())


@pytest.mark.parametrize("error", [DecryptionError(), OffloadError("of layer secret-name")], ids=_name)
def test_only_the_code_of_an_error_travels(error: Any) -> None:
    message = wire.AcceleratorError.for_error(error)
    assert message == wire.AcceleratorError.for_error(type(error))
    assert message.error_code == error.code
    assert b"secret" not in message.to_bytes()


@given(st.binary(min_size=90, max_size=90), st.integers(0, 6))
def test_parsing_is_total_and_each_message_has_one_encoding(rest: bytes, kind: int) -> None:
    blob = b"CLSA\1" + bytes([kind]) + rest
    try:
        message = wire.parse_accelerator_message(blob)
    except WireError:
        return
    assert message.to_bytes() == blob


@given(st.integers(0, 65_535), st.integers(0, 1), st.integers(1, 4), st.integers(1, 9000), st.integers(1, 100_000))
def test_every_product_within_the_limits_travels(layer: int, way: int, planes: int, tokens: int, features: int) -> None:
    message = wire.AcceleratorMultiply(layer, way, planes, tokens, features)
    assert wire.AcceleratorMultiply.parse(message.to_bytes()) == message
