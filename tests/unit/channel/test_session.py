from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cloister import channel, wire
from cloister.channel import _session
from cloister.errors import LimitExceededError, MalformedMessageError, NoSessionError, StaleEvidenceError, WireError

_CONTEXT = channel.SessionContext("run-1", "north", b"\1" * 48, b"\2" * 48, b"spki")


class _Clock:
    def __init__(self) -> None:
        self.t = 1000.0

    def __call__(self) -> float:
        return self.t


def _session_of(role: Any, clock: _Clock | None = None, **kwargs: Any) -> channel.Session:
    arguments: dict[str, Any] = {
        "role": role,
        "context": _CONTEXT,
        "hs": b"\3" * 48,
        "th": b"\4" * 48,
        "peer": "peer",
        "now": clock or _Clock(),
        "max_session_age_s": 60.0,
        **kwargs,
    }
    return channel.Session(**arguments)


@pytest.fixture
def server() -> channel.Session:
    return _session_of("server")


@pytest.fixture
def client() -> channel.Session:
    return _session_of("client")


def test_context_encodes_every_field() -> None:
    assert wire.dec(_CONTEXT.encode(), 6) == (b"run-1", b"north", b"\1" * 48, b"\2" * 48, channel.SUITE_ID, b"spki")


@pytest.mark.parametrize(
    "fields",
    [
        {"run_id": "a b"},
        {"node_id": "North"},
        {"node_id": "server"},
        {"server_policy_sha384": bytes(47)},
        {"client_policy_sha384": b""},
        {"node_public_key": b""},
        {"node_public_key": bytes(1025)},
    ],
)
def test_context_fields_have_their_forms(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        dataclasses.replace(_CONTEXT, **fields)


def test_records_go_both_ways(server: channel.Session, client: channel.Session) -> None:
    assert server.session_id == client.session_id
    assert len(server.session_id) == 32
    for i in range(3):
        there = server.header("prepare", round=1, attempt=i)
        assert there == wire.Header("run-1", 1, "prepare", "server", "north", i)
        assert client.open(server.seal(there, b"question")) == (there, b"question")
        back = client.header("prepared", round=1)
        assert server.open(memoryview(client.seal(back, bytearray(b"answer")))) == (back, b"answer")


def test_record_layout(server: channel.Session) -> None:
    header = server.header("prepare")
    server.seal(header, b"")
    record = server.seal(header, b"12345")
    clear = header.to_bytes()
    assert record.startswith((1).to_bytes(8, "big") + wire.enc(clear))
    assert len(record) == 8 + 4 + len(clear) + channel.ciphertext_size(5)
    assert channel.peek_header(record) == (1, header)


@pytest.mark.parametrize(
    "header",
    [
        wire.Header("run-2", 0, "x", "server", "north"),
        wire.Header("run-1", 0, "x", "north", "server"),
        wire.Header("run-1", 0, "x", "server", "south"),
    ],
)
def test_seal_refuses_a_header_of_others(server: channel.Session, header: wire.Header) -> None:
    with pytest.raises(MalformedMessageError):
        server.seal(header, b"")


def test_open_refuses_a_header_of_others(server: channel.Session, client: channel.Session) -> None:
    server._other = "south"
    record = server.seal(server.header("x"), b"")
    with pytest.raises(MalformedMessageError):
        client.open(record)
    server._other = "north"
    assert client._in.seq == 0


@pytest.mark.parametrize("record", [b"", bytes(11), bytes(8) + b"\0\0\0\1", bytes(8) + b"\xff\xff\xff\xff" + bytes(99)])
def test_what_is_not_a_record(record: bytes, client: channel.Session) -> None:
    with pytest.raises(MalformedMessageError):
        client.open(record)
    with pytest.raises(MalformedMessageError):
        channel.peek_header(record)


def test_a_header_over_the_limit_is_not_read(client: channel.Session) -> None:
    with pytest.raises(MalformedMessageError, match="too long"):
        client.open(bytes(8) + wire.enc(bytes(wire.MAX_HEADER_BYTES + 1)) + bytes(100))


def test_sizes_are_limited(server: channel.Session, client: channel.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    record = server.seal(server.header("x"), bytes(100))
    monkeypatch.setattr(_session.wire, "MAX_ENVELOPE_BYTES", len(record) - 1)
    with pytest.raises(LimitExceededError):
        client.open(record)
    monkeypatch.setattr(_session.wire, "MAX_MESSAGE_BYTES", 99)
    with pytest.raises(LimitExceededError):
        server.seal(server.header("x"), bytes(100))


def test_a_closed_session_is_no_session(server: channel.Session, client: channel.Session) -> None:
    record = server.seal(server.header("x"), b"")
    client.close()
    client.close()
    for use in (lambda: client.open(record), lambda: client.seal(client.header("x"), b"")):
        with pytest.raises(NoSessionError):
            use()
    assert not any(client._in._key) and not any(client._out._key)


def test_an_aged_session_ends() -> None:
    clock = _Clock()
    session = _session_of("server", clock)
    clock.t += 60
    session.seal(session.header("x"), b"")
    clock.t += 0.5
    with pytest.raises(StaleEvidenceError, match="60 s"):
        session.seal(session.header("x"), b"")
    with pytest.raises(NoSessionError):
        session.seal(session.header("x"), b"")
    assert not any(session._out._key)


def test_keys_move_on_and_differ_by_direction(server: channel.Session) -> None:
    keys = {bytes(server._out._key), bytes(server._in._key), server._out.message_key()}
    server.seal(server.header("x"), b"")
    keys |= {bytes(server._out._key), server._out.message_key()}
    assert len(keys) == 5


def test_nothing_secret_is_shown(server: channel.Session) -> None:
    shown = repr(server)
    assert shown == f"Session(server with north, {server.session_id.hex()[:16]}, closed=False)"
    assert bytes(server._out._key).hex() not in shown
