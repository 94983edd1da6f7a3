"""A relay that replays, drops, reorders, reflects or alters records: nothing opens, and nothing advances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister import channel, wire
from cloister.errors import ChannelError, DecryptionError, ReplayError, WireError

_SETTINGS = settings(
    deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def sessions(parties: Any) -> tuple[channel.Session, channel.Session]:
    _, server, client = parties.shake()
    return server, client


def _seal(session: channel.Session, text: bytes, *, n_round: int = 1) -> bytes:
    return session.seal(session.header("prepare", round=n_round), text)


def test_a_record_opens_once(sessions: tuple[channel.Session, channel.Session]) -> None:
    server, client = sessions
    record = _seal(server, b"one")
    assert client.open(record)[1] == b"one"
    for _ in range(2):
        with pytest.raises(ReplayError):
            client.open(record)
    assert client.open(_seal(server, b"two"))[1] == b"two"


def test_a_gap_or_another_order_is_refused_and_the_right_one_still_opens(
    sessions: tuple[channel.Session, channel.Session],
) -> None:
    server, client = sessions
    first, second, third = (_seal(server, text) for text in (b"1", b"2", b"3"))
    for early in (second, third):
        with pytest.raises(ReplayError):
            client.open(early)
    assert client.open(first)[1] == b"1"
    with pytest.raises(ReplayError):
        client.open(third)
    assert [client.open(record)[1] for record in (second, third)] == [b"2", b"3"]


def test_a_record_does_not_open_under_another_number(sessions: tuple[channel.Session, channel.Session]) -> None:
    server, client = sessions
    first, second = _seal(server, b"1"), _seal(server, b"2")
    client.open(first)
    for renumbered in (second[:8] + first[8:], first[:8] + second[8:]):
        with pytest.raises(ChannelError):
            client.open(renumbered)
    assert client.open(second)[1] == b"2"


def test_a_record_does_not_come_back_to_its_sender(sessions: tuple[channel.Session, channel.Session]) -> None:
    server, client = sessions
    for session in (server, client):
        with pytest.raises(DecryptionError):
            session.open(_seal(session, b"mine"))


def test_a_record_with_another_rounds_header_does_not_open(sessions: tuple[channel.Session, channel.Session]) -> None:
    server, client = sessions
    record = _seal(server, b"round 1", n_round=1)
    old, new = server.header("prepare", round=1).to_bytes(), server.header("prepare", round=2).to_bytes()
    assert len(old) == len(new)
    with pytest.raises(DecryptionError):
        client.open(record.replace(old, new))
    for other in (wire.Header("run-2", 1, "prepare", "server", "north"), server.header("finish", attempt=1)):
        with pytest.raises(DecryptionError):
            client.open(record[:8] + wire.enc(other.to_bytes()) + record[12 + len(old) :])
    assert client.open(record)[1] == b"round 1"


def test_a_record_of_another_session_does_not_open(parties: Any) -> None:
    _, server_a, _ = parties.shake()
    _, _, client_b = parties.shake()
    with pytest.raises(DecryptionError):
        client_b.open(_seal(server_a, b"for a"))


@_SETTINGS
@given(bit=st.integers(0, 1 << 20), size=st.sampled_from([0, 5, 500, 20_000]))
def test_one_flipped_bit_anywhere_does_not_open_and_does_not_advance(
    parties: Any, flip: Callable[[bytes, int], bytes], bit: int, size: int
) -> None:
    server, client = _pair(parties)
    record = _seal(server, bytes(size))
    with pytest.raises((ChannelError, WireError)):
        client.open(flip(record, bit))
    assert client.open(record)[1] == bytes(size)


_shared: list[tuple[channel.Session, channel.Session]] = []


def _pair(parties: Any) -> tuple[channel.Session, channel.Session]:
    """One session pair for all examples: that it still works after each is part of what is tested."""
    if not _shared:
        _shared.append(parties.shake()[1:])
    return _shared[0]


@_SETTINGS
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["seal", "next", "again", "skip", "alter", "reflect"]), st.integers(0, 1 << 20)),
        max_size=25,
    )
)
def test_whatever_the_relay_does_each_record_opens_once_in_order(
    parties: Any, flip: Callable[[bytes, int], bytes], steps: list[tuple[str, int]]
) -> None:
    server, client = _pair(parties)
    sent: list[bytes] = []
    n_opened = 0
    for action, number in steps:
        if action == "seal":
            sent.append(_seal(server, str(len(sent)).encode()))
        elif action == "next" and n_opened < len(sent):
            assert client.open(sent[n_opened])[1] == str(n_opened).encode()
            n_opened += 1
        elif action == "again" and n_opened:
            with pytest.raises(ReplayError):
                client.open(sent[number % n_opened])
        elif action == "skip" and n_opened + 1 < len(sent):
            with pytest.raises(ReplayError):
                client.open(sent[n_opened + 1 + number % (len(sent) - n_opened - 1)])
        elif action == "alter" and n_opened < len(sent):
            with pytest.raises((ChannelError, WireError)):
                client.open(flip(sent[n_opened], number))
        elif action == "reflect" and sent:
            with pytest.raises(ChannelError):
                server.open(sent[number % len(sent)])
    for i in range(n_opened, len(sent)):
        assert client.open(sent[i])[1] == str(i).encode()
