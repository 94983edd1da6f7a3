from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import cbor2
import pytest

from cloister.errors import LimitExceededError, MalformedMessageError
from cloister.wire import _cbor

_VALUES: list[Any] = [
    0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -1, -24, -25, -(2**64),
    0.0, -0.0, 1.5, 0.1, 65504.0, 65505.0, 3.4028234663852886e38, 1e300, 5e-324, math.inf, -math.inf,
    "", "é", "x" * 24, b"", b"x" * 256, None, True, False,
    [], [1, [2, [3]]], {}, {"b": 1, "a": {"": 2}, "aa": 3},
]  # fmt: skip


@pytest.mark.parametrize("value", _VALUES, ids=lambda value: repr(value)[:30])
def test_encoding_is_the_canonical_one_and_comes_back(value: Any) -> None:
    encoded = _cbor.encode(value)
    assert encoded == cbor2.dumps(value, canonical=True)
    decoded = _cbor.decode(encoded)
    assert decoded == value
    assert type(decoded) is type(value)


def test_not_a_number_has_one_encoding() -> None:
    assert _cbor.encode(math.nan) == bytes.fromhex("f97e00")
    assert math.isnan(_cbor.decode(bytes.fromhex("f97e00")))
    with pytest.raises(MalformedMessageError):
        _cbor.decode(bytes.fromhex("f97e01"))


def test_other_containers_encode_as_their_plain_ones() -> None:
    assert _cbor.encode((1, 2)) == _cbor.encode([1, 2])
    assert _cbor.encode(OrderedDict(b=1, a=2)) == _cbor.encode({"a": 2, "b": 1})
    assert _cbor.encode(bytearray(b"x")) == _cbor.encode(memoryview(b"x")) == _cbor.encode(b"x")


@pytest.mark.parametrize("value", [object(), {1: 2}, {b"a": 1}, 2**64, -(2**64) - 1, "\ud800", {"\ud800": 1}, {1}])
def test_what_no_peer_would_read_is_not_encoded(value: object) -> None:
    with pytest.raises(MalformedMessageError):
        _cbor.encode(value)


@pytest.mark.parametrize(
    "encoded",
    [
        "",  # nothing
        "18",  # argument missing
        "1817",  # 23 in two bytes
        "190001",  # 1 in three bytes
        "1a0000ffff",
        "1b00000000ffffffff",
        "1c",  # reserved
        "5f4161ff",  # indefinite bytes
        "9f01ff",  # indefinite array
        "bf6161 01ff",
        "ff",
        "4261",  # bytes end early
        "62c328",  # not UTF-8
        "8201",  # array ends early
        "9bffffffffffffffff",  # array of 2^64 - 1 items
        "bbffffffffffffffff",
        "a161",
        "a10102",  # key is not text
        "a2616101616102",  # key twice
        "a2616201616102",  # keys out of order
        "c001",  # a tag
        "d82301",  # a tag that a general decoder would turn into a regular expression
        "f7",  # undefined
        "f818",  # simple value
        "fa3fc00000",  # 1.5 in five bytes
        "fb3ff8000000000000",
        "fb7ff8000000000000",  # not a number in nine bytes
        "f93c",
        "0101",  # two values
    ],
)
def test_everything_else_is_malformed(encoded: str) -> None:
    with pytest.raises(MalformedMessageError):
        _cbor.decode(bytes.fromhex(encoded))


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_depth_is_limited_both_ways() -> None:
    deepest = _nested(16)
    assert _cbor.decode(_cbor.encode(deepest)) == deepest
    with pytest.raises(LimitExceededError):
        _cbor.encode(_nested(17))
    with pytest.raises(LimitExceededError):
        _cbor.decode(cbor2.dumps(_nested(17)))
    with pytest.raises(LimitExceededError):
        _cbor.decode(b"\x81" * 100_000)


def test_number_of_items_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cbor, "MAX_CBOR_ITEMS", 4)
    assert _cbor.decode(_cbor.encode([1, 2, 3])) == [1, 2, 3]
    with pytest.raises(LimitExceededError):
        _cbor.decode(_cbor.encode([1, 2, 3, 4]))
