"""The encrypted connection to a pad helper, with somebody in its middle who may do everything."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloister.errors import ConfigError
from cloister.offload import _helper_link as link_module
from cloister.offload import read_helper_key
from cloister.offload._helper_link import SealedLink

KEY = bytes(range(32))
HELLO = len(b"cloister-pad-helper/v1") + 32
TAG = 16
HEADER = 96
MIB = 1 << 20


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    for end in (near, far):
        end.settimeout(20)
    return near, far


class Middle:
    """Two ends, and who stands between them: `client` and `server` are the middle's own sockets towards each."""

    def __init__(self) -> None:
        self.outer_client, self.client = tcp_pair()
        self.outer_server, self.server = tcp_pair()
        self.ends: dict[str, SealedLink | Exception] = {}

    def start(self, client_key: bytes = KEY, server_key: bytes = KEY) -> None:
        def make(name: str, connection: socket.socket, key: bytes) -> None:
            try:
                self.ends[name] = SealedLink(connection, key, is_client=name == "client")
            except OSError as error:
                self.ends[name] = error
                connection.close()

        self.threads = [
            threading.Thread(target=make, args=("client", self.outer_client, client_key)),
            threading.Thread(target=make, args=("server", self.outer_server, server_key)),
        ]
        for thread in self.threads:
            thread.start()

    def shake_hands(self, change: Callable[[bytes], bytes] = bytes) -> None:
        """Carry the first flight, changed, and the second."""
        self.start()
        for a, b in ((self.client, self.server), (self.server, self.client)):
            b.sendall(change(take(a, HELLO)))
        for a, b in ((self.client, self.server), (self.server, self.client)):
            b.sendall(take(a, TAG))
        self.join()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(30)

    def close(self) -> None:
        for end in (self.outer_client, self.client, self.outer_server, self.server):
            end.close()

    @property
    def near(self) -> SealedLink:
        return self._end("client")

    @property
    def far(self) -> SealedLink:
        return self._end("server")

    def _end(self, name: str) -> SealedLink:
        found = self.ends[name]
        assert isinstance(found, SealedLink), found
        return found


def take(connection: socket.socket, n: int) -> bytes:
    found = b""
    while len(found) < n:
        part = connection.recv(n - len(found))
        assert part, "the other side hung up"
        found += part
    return found


def header(i: int) -> bytes:
    return bytes([i]) * HEADER


@pytest.fixture
def middle() -> Iterator[Middle]:
    made = Middle()
    yield made
    made.close()


@pytest.fixture
def open_middle(middle: Middle) -> Middle:
    middle.shake_hands()
    return middle


def forward(middle: Middle, n: int) -> bytes:
    found = take(middle.client, n)
    middle.server.sendall(found)
    return found


@pytest.mark.parametrize("n", [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB + 5])
def test_both_ways(n: int):
    near, far = tcp_pair()
    made: list[SealedLink] = []
    thread = threading.Thread(target=lambda: made.append(SealedLink(far, KEY, is_client=False)))
    thread.start()
    client = SealedLink(near, KEY, is_client=True)
    thread.join()
    server, payload = made[0], os.urandom(n)
    for a, b in ((client, server), (server, client), (client, server)):
        sender = threading.Thread(target=a.send, args=(header(1), payload))
        sender.start()
        assert b.receive() == header(1)
        found = bytearray(n)
        b.read_into(memoryview(found))
        assert found == payload
        sender.join()
    client.close()
    assert server.receive() == b""
    server.close()


def test_the_middle_sees_nothing_and_every_session_is_another():
    seen: list[bytes] = []
    for _ in range(2):
        middle = Middle()
        middle.shake_hands(lambda flight: seen.append(flight) or flight)
        middle.near.send(header(7), bytes(1000))
        seen.append(forward(middle, HEADER + TAG + 1000 + TAG))
        assert middle.far.receive() == header(7)
        middle.close()
    assert len(set(seen)) == 6
    for flight in seen:
        assert KEY not in flight
        assert bytes(16) not in flight
        assert header(7)[:16] not in flight


def test_an_altered_record(open_middle: Middle):
    open_middle.near.send(header(1))
    record = bytearray(take(open_middle.client, HEADER + TAG))
    record[-1] ^= 1
    open_middle.server.sendall(record)
    with pytest.raises(ConnectionAbortedError):
        open_middle.far.receive()


def test_an_altered_byte_of_a_payload(open_middle: Middle):
    open_middle.near.send(header(1), bytes(100))
    forward(open_middle, HEADER + TAG)
    payload = bytearray(take(open_middle.client, 100 + TAG))
    payload[50] ^= 128
    open_middle.server.sendall(payload)
    assert open_middle.far.receive() == header(1)
    with pytest.raises(ConnectionAbortedError):
        open_middle.far.read_into(memoryview(bytearray(100)))


def test_a_replayed_record(open_middle: Middle):
    open_middle.near.send(header(1))
    record = forward(open_middle, HEADER + TAG)
    assert open_middle.far.receive() == header(1)
    open_middle.server.sendall(record)
    with pytest.raises(ConnectionAbortedError):
        open_middle.far.receive()


@pytest.mark.parametrize("order", [(1, 0), (1,)], ids=["swapped", "first missing"])
def test_records_out_of_order(open_middle: Middle, order: tuple[int, ...]):
    open_middle.near.send(header(1))
    open_middle.near.send(header(2))
    records = [take(open_middle.client, HEADER + TAG) for _ in range(2)]
    for i in order:
        open_middle.server.sendall(records[i])
    with pytest.raises(ConnectionAbortedError):
        open_middle.far.receive()


def test_a_record_sent_back(open_middle: Middle):
    open_middle.near.send(header(1))
    open_middle.client.sendall(take(open_middle.client, HEADER + TAG))
    with pytest.raises(ConnectionAbortedError):
        open_middle.near.receive()


def test_a_record_of_another_session(open_middle: Middle):
    other = Middle()
    other.shake_hands()
    other.near.send(header(1))
    open_middle.server.sendall(take(other.client, HEADER + TAG))
    other.close()
    with pytest.raises(ConnectionAbortedError):
        open_middle.far.receive()


@pytest.mark.parametrize("n", [1, HEADER + TAG - 1])
def test_a_cut_record(open_middle: Middle, n: int):
    open_middle.near.send(header(1))
    open_middle.server.sendall(take(open_middle.client, n))
    open_middle.server.close()
    with pytest.raises(ConnectionResetError):
        open_middle.far.receive()


def test_a_message_cut_between_records(open_middle: Middle):
    open_middle.near.send(header(1), bytes(2 * MIB))
    forward(open_middle, HEADER + TAG + MIB + TAG)
    open_middle.server.close()
    assert open_middle.far.receive() == header(1)
    with pytest.raises(ConnectionResetError):
        open_middle.far.read_into(memoryview(bytearray(2 * MIB)))


def test_a_message_that_trickles(open_middle: Middle, monkeypatch: pytest.MonkeyPatch):
    """Each record comes in time, and all of them together do not."""
    now = [0.0]
    monkeypatch.setattr("cloister.offload._helper_link.time.monotonic", lambda: now[0])
    monkeypatch.setattr(open_middle.far, "_open", lambda *_: now.__setitem__(0, now[0] + 15))
    open_middle.far.timeout_s = 20
    with pytest.raises(TimeoutError):
        open_middle.far.read_into(memoryview(bytearray(3 * MIB)))
    open_middle.far.timeout_s = None
    open_middle.far.read_into(memoryview(bytearray(3 * MIB)))


@pytest.mark.parametrize("who", ["client", "server"])
def test_another_key(middle: Middle, who: str):
    other = bytes(32)
    middle.start(*((other, KEY) if who == "client" else (KEY, other)))
    for a, b in ((middle.client, middle.server), (middle.server, middle.client)):
        b.sendall(take(a, HELLO))
    for a, b in ((middle.client, middle.server), (middle.server, middle.client)):
        b.sendall(take(a, TAG))
    middle.join()
    assert {type(end) for end in middle.ends.values()} == {ConnectionAbortedError}


def _flip(flight: bytes) -> bytes:
    return flight[:-1] + bytes([flight[-1] ^ 1])


@pytest.mark.parametrize(
    "change",
    [
        _flip,
        lambda flight: flight[:-1] + bytes([flight[-1] ^ 128]),  # the bit that X25519 ignores
        lambda flight: flight[:-32] + bytes(32),
        lambda flight: flight[:-32] + b"\x01" + bytes(31),
        lambda flight: flight.replace(b"/v1", b"/v2"),
    ],
    ids=["altered", "same point", "zero", "small order", "version"],
)
def test_an_altered_handshake(middle: Middle, change: Callable[[bytes], bytes]):
    middle.start()
    for a, b in ((middle.client, middle.server), (middle.server, middle.client)):
        b.sendall(change(take(a, HELLO)))
    for a, b in ((middle.client, middle.server), (middle.server, middle.client)):
        if tag := a.recv(TAG):
            b.sendall(tag)
    middle.join()
    assert {type(end) for end in middle.ends.values()} == {ConnectionAbortedError}


def test_a_handshake_sent_back(middle: Middle):
    """Who holds no key answers a client with what it sent itself."""
    middle.start()
    for n in (HELLO, TAG):
        middle.client.sendall(take(middle.client, n))
    middle.server.close()
    middle.join()
    assert isinstance(middle.ends["client"], ConnectionAbortedError)


def test_a_handshake_that_was_recorded():
    """The server's part is fresh: what a client sent to it once opens nothing later."""
    first = Middle()
    first.start()
    hello = take(first.client, HELLO)
    first.server.sendall(hello)
    first.client.sendall(take(first.server, HELLO))
    tag = take(first.client, TAG)
    first.close()
    first.join()
    again = Middle()
    again.start()
    again.server.sendall(hello + tag)
    take(again.server, HELLO)
    again.client.close()
    again.join()
    again.close()
    assert isinstance(again.ends["server"], ConnectionAbortedError)


def test_a_peer_that_says_nothing():
    near, far = tcp_pair()
    near.settimeout(0.05)
    with pytest.raises(TimeoutError):
        SealedLink(near, KEY, is_client=True)
    for end in (near, far):
        end.close()


def test_a_key_file(tmp_path: Path):
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    assert read_helper_key(path) == KEY
    path.chmod(0o400)
    assert read_helper_key(path) == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601])
def test_a_key_file_that_others_may_open(tmp_path: Path, mode: int):
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="others may") as caught:
        read_helper_key(path)
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize("n", [0, 31, 33])
def test_a_key_file_of_another_size(tmp_path: Path, n: int):
    path = tmp_path / "key"
    path.write_bytes(bytes([5]) * n)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="32 bytes"):
        read_helper_key(path)


def test_a_key_file_that_is_none(tmp_path: Path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_helper_key(path)


def test_a_key_file_that_is_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Not a device either, whose bytes are other ones each time, or whoever's."""
    path = tmp_path / "key"
    path.write_bytes(KEY)
    with monkeypatch.context() as patch:
        patch.setattr("cloister.offload._helper_link.os.fstat", lambda _: os.stat_result((0o020600, *[0] * 9)))
        with pytest.raises(ConfigError, match="others may"):
            read_helper_key(path)


def test_records_are_counted_from_zero_and_never_again():
    assert [link_module._nonce(i) for i in (0, 1, 2**96 - 1)] == [bytes(12), bytes(11) + b"\x01", b"\xff" * 12]
    with pytest.raises(OverflowError):
        link_module._nonce(2**96)
