from __future__ import annotations

import cbor2
import pytest

from cloister import wire
from cloister.errors import LimitExceededError, MalformedMessageError, UnsupportedVersionError
from cloister.wire import _frame


def test_enc_is_each_length_then_the_bytes() -> None:
    assert wire.enc() == b""
    assert wire.enc(b"ab", b"", memoryview(b"c")) == b"\0\0\0\2ab\0\0\0\0\0\0\0\1c"


def test_enc_refuses_a_part_whose_length_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_frame, "_MAX_PART_BYTES", 3)
    assert wire.enc(b"abc") == b"\0\0\0\3abc"
    with pytest.raises(LimitExceededError):
        wire.enc(b"abcd")


@pytest.mark.parametrize(
    ("blob", "n_parts"),
    [
        (b"", 1),
        (b"\0\0\0", 1),
        (b"\0\0\0\2a", 1),
        (b"\xff\xff\xff\xffa", 1),
        (b"\0\0\0\1ab", 1),
        (b"a", 0),
        (b"\0\0\0\1a\0\0\0\1b", 1),
        (b"\0\0\0\1a\0\0\0\1b", 3),
    ],
)
def test_dec_takes_exactly_its_parts(blob: bytes, n_parts: int) -> None:
    with pytest.raises(MalformedMessageError):
        wire.dec(blob, n_parts)


def test_dec_has_a_limit() -> None:
    assert wire.dec(wire.enc(b"abc"), 1, max_bytes=7) == (b"abc",)
    with pytest.raises(LimitExceededError):
        wire.dec(wire.enc(b"abc"), 1, max_bytes=6)


def test_pack_is_magic_version_and_cbor_of_kind_and_body() -> None:
    packed = wire.pack("host.request", {"b": 1, "a": [b"x", None, True, 1.5]})
    assert packed == b"CLST\x01" + cbor2.dumps(["host.request", {"a": [b"x", None, True, 1.5], "b": 1}], canonical=True)
    assert wire.unpack(packed, "host.request") == {"b": 1, "a": [b"x", None, True, 1.5]}
    assert wire.unpack_any(bytearray(packed)) == ("host.request", {"b": 1, "a": [b"x", None, True, 1.5]})


@pytest.mark.parametrize("kind", ["", "Upper", "-dash", "a" * 65, "a b", "ä"])
def test_pack_refuses_a_kind_that_is_not_a_name(kind: str) -> None:
    with pytest.raises(MalformedMessageError):
        wire.pack(kind, {})


def test_unpack_wants_its_kind_and_shows_only_a_name() -> None:
    with pytest.raises(MalformedMessageError, match="expected a message of kind a, got b"):
        wire.unpack(wire.pack("b", {}), "a")
    with pytest.raises(MalformedMessageError, match="not a name"):
        wire.unpack(b"CLST\x01" + cbor2.dumps(["B\n", {}]), "a")


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"CLST",
        b"CLSU\x01" + cbor2.dumps(["a", {}]),
        b"CLST\x01",
        b"CLST\x01" + cbor2.dumps({}),
        b"CLST\x01" + cbor2.dumps(1),
        b"CLST\x01" + cbor2.dumps(["a"]),
        b"CLST\x01" + cbor2.dumps(["a", {}, 1]),
        b"CLST\x01" + cbor2.dumps([1, {}]),
        b"CLST\x01" + cbor2.dumps(["a", []]),
        b"CLST\x01" + cbor2.dumps(["a", {}]) + b"\0",
    ],
)
def test_unpack_refuses_what_is_not_a_pair(blob: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        wire.unpack_any(blob)


def test_unpack_names_another_version() -> None:
    with pytest.raises(UnsupportedVersionError, match="version 2"):
        wire.unpack_any(b"CLST\x02" + cbor2.dumps(["a", {}]))


def test_unpack_has_a_limit() -> None:
    packed = wire.pack("a", {"x": bytes(100)})
    assert wire.unpack(packed, "a", max_bytes=len(packed)) == {"x": bytes(100)}
    with pytest.raises(LimitExceededError):
        wire.unpack(packed, "a", max_bytes=len(packed) - 1)
