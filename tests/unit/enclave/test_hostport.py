from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister import errors
from cloister.enclave import MAX_FRAME_BYTES, HostServer, _hostport, bind_host_socket, host_call
from cloister.errors import EnclaveError, LimitExceededError, MalformedMessageError, WireError
from cloister.wire import pack


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "host.sock"


def handler(method: str, body: dict) -> dict:
    if method == "fail":
        raise RAISED[body["which"]]
    if method == "sleep":
        time.sleep(body["s"])
    if method == "unencodable":
        return {"body": object()}
    return {"method": method, **body}


RAISED = {
    "config": errors.ConfigError([errors.Problem("a.b", "is wrong", "fix it")], source="job.toml"),
    "data": errors.DataError("row 3 is empty", path="x.csv", row=3, hint="fill it"),
    "attest": errors.MeasurementMismatchError("rtmr3 differs", reasons=["rtmr3 differs", "report_data differs"]),
    "decryption": errors.DecryptionError(),
    "peer": errors.PeerError("client stopped", peer="north", peer_code="data"),
    "federation": errors.InsufficientClientsError("1 of 3", peer="north"),
    "store": errors.StoreFullError("full", path="/x"),
}


@pytest.fixture
def server(path: Path) -> Iterator[HostServer]:
    server = HostServer(bind_host_socket(path), handler, max_connections=4)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def call(path: Path, method: str = "echo", timeout_s: float = 5, **body) -> dict:
    return host_call(path, method, body, timeout_s=timeout_s)


def test_question_and_answer(server, path):
    assert call(path, blob=b"\x00\xff", n=3, nested={"a": [1, None]}) == {
        "method": "echo",
        "blob": b"\x00\xff",
        "n": 3,
        "nested": {"a": [1, None]},
    }


def test_large_bodies(server, path):
    blob = os.urandom(1 << 20) * 8
    assert call(path, blob=blob)["blob"] == blob


def test_many_at_once(server, path):
    results: list[int] = []
    threads = [threading.Thread(target=lambda i=i: results.append(call(path, n=i)["n"])) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(20))


@pytest.mark.parametrize("which", sorted(RAISED))
def test_errors_come_back_as_the_same_class(server, path, which):
    raised = RAISED[which]
    with pytest.raises(type(raised)) as caught:
        call(path, "fail", which=which)
    assert type(caught.value) is type(raised)
    assert caught.value.cause == raised.cause
    assert caught.value.hint == raised.hint
    if which == "attest":
        assert caught.value.reasons == raised.reasons
    if which == "peer":
        assert (caught.value.peer, caught.value.peer_code) == ("north", "data")


def test_answer_that_cannot_be_encoded_is_an_error_of_the_enclave(server, path):
    with pytest.raises(MalformedMessageError):
        call(path, "unencodable")


def test_nobody_listens(path):
    with pytest.raises(EnclaveError, match="cannot reach"):
        call(path)


def test_timeout(server, path):
    started = time.monotonic()
    with pytest.raises(EnclaveError, match=r"did not answer sleep within 0\.1 s"):
        call(path, "sleep", timeout_s=0.1, s=0.5)
    assert time.monotonic() - started < 0.4


def test_socket_belongs_to_this_user_alone(server, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_stale_socket_is_replaced(path):
    bind_host_socket(path).close()
    assert path.exists()
    bind_host_socket(path).close()


def test_socket_in_use(server, path):
    with pytest.raises(EnclaveError, match="another process listens"):
        bind_host_socket(path)
    assert call(path, n=1)["n"] == 1


def test_something_else_is_in_the_way(path):
    path.write_text("precious")
    with pytest.raises(EnclaveError, match="not a socket"):
        bind_host_socket(path)
    assert path.read_text() == "precious"


def test_folder_does_not_exist(path):
    with pytest.raises(EnclaveError, match="cannot listen"):
        bind_host_socket(path.parent / "missing" / "s")


@pytest.mark.parametrize("action", [bind_host_socket, lambda path: host_call(path, "m", {}, timeout_s=1)])
def test_path_over_the_limit_of_linux(tmp_path, action):
    with pytest.raises(EnclaveError, match="Linux allows 107") as caught:
        action(tmp_path / ("x" * 107))
    assert "shorter" in caught.value.hint


def test_longest_path_works(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s")
    name = "x" * (_hostport.MAX_SOCKET_PATH_BYTES - len(str(folder)) - 1)
    listener = bind_host_socket(folder / name)
    assert len(listener.getsockname()) == _hostport.MAX_SOCKET_PATH_BYTES
    listener.close()


def raw(path: Path, *chunks: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        for chunk in chunks:
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"rubbish",
        pack("other.kind", {}),
        pack("host.request", {"method": "echo"}),
        pack("host.request", {"method": 1, "body": {}}),
        pack("host.request", {"method": "echo", "body": []}),
        pack("host.request", {"method": "", "body": {}}),
        pack("host.request", {"method": "m" * 65, "body": {}}),
        pack("host.request", {"method": "echo", "body": {}, "more": 1}),
    ],
)
def test_malformed_requests_get_an_error_and_the_server_lives_on(server, path, message):
    answer = raw(path, framed(message))
    with pytest.raises(WireError):
        _hostport._answer_body(bytearray(answer[4:]))
    assert call(path, n=1)["n"] == 1


@pytest.mark.parametrize("garbage", [b"\x00", b"\x00\x00\x00\x09abc", b"\xff\xff\xff\xff", b""])
def test_broken_frames_end_the_connection_and_the_server_lives_on(server, path, garbage):
    assert raw(path, garbage) == b""
    assert call(path, n=1)["n"] == 1


def test_a_frame_over_the_limit_is_not_read(monkeypatch):
    monkeypatch.setattr(_hostport, "MAX_FRAME_BYTES", 1000)
    near, far = socket.socketpair()
    with near, far:
        near.sendall(framed(bytes(1001)))
        with pytest.raises(LimitExceededError, match="frame of 1001 bytes"):
            _hostport._read_frame(far, None)


def test_several_requests_on_one_connection(server, path):
    request = framed(pack("host.request", {"method": "echo", "body": {}}))
    answer = raw(path, request, request)
    assert answer == framed(pack("host.answer", {"body": {"method": "echo"}})) * 2


def test_close_cuts_open_connections(path):
    server = HostServer(bind_host_socket(path), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(framed(pack("host.request", {"method": "echo", "body": {}})))
        assert connection.recv(4)
        server.close()
        server.close()
        thread.join(timeout=5)
        connection.settimeout(5)
        while connection.recv(1 << 16):
            pass


def answering(path: Path, blob: bytes) -> threading.Thread:
    """A false enclave that answers anything with `blob`."""
    listener = bind_host_socket(path)

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                # The whole question first: closing with unread bytes would reset the connection.
                _hostport._read_frame(connection, None)
                connection.sendall(blob)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("blob", "error"),
    [
        (b"", EnclaveError),
        (b"\x00\x00\x00\x05abc", MalformedMessageError),
        (b"\xff\xff\xff\xff", LimitExceededError),
        (framed(b"rubbish"), MalformedMessageError),
        (framed(pack("host.answer", {})), MalformedMessageError),
        (framed(pack("host.answer", {"body": 3})), MalformedMessageError),
        (framed(pack("host.answer", {"error": "no such code"})), errors.CloisterError),
        (framed(pack("host.answer", {"error": 3, "cause": []})), errors.CloisterError),
        (framed(pack("host.answer", {"error": "attest", "reasons": "x", "cause": "c"})), errors.AttestationError),
    ],
)
def test_malformed_answers(path, blob, error):
    thread = answering(path, blob)
    with pytest.raises(error):
        call(path)
    thread.join(timeout=5)


def test_request_over_the_limit(server, path, monkeypatch):
    monkeypatch.setattr(_hostport, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(LimitExceededError, match="host port"):
        call(path, blob=bytes(1000))
    assert MAX_FRAME_BYTES > 1 << 30


class BrokenListener:
    """Plays the failures of accept that cannot be provoked."""

    def __init__(self, *failures: int) -> None:
        self.failures = list(failures)

    def accept(self):
        raise OSError(self.failures.pop(0), "played")


def test_aborted_connections_are_passed_over():
    server = HostServer(BrokenListener(errno.ECONNABORTED, errno.EINTR, errno.EBADF), handler)  # pyright: ignore
    with pytest.raises(EnclaveError, match="broke: played"):
        server.serve_forever()
