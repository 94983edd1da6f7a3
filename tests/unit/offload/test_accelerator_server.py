"""The accelerator's side: what it refuses of a client, and that the next one is served."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.offload._links import KINDS, make_weight, pair, served

from cloister.offload._compute import CpuDevice, Device
from cloister.offload._server import serve, serve_connection
from cloister.offload._transport import OwnerLink
from cloister.ring import FAITHFUL, FAST, QuantizedWeight
from cloister.wire import (
    ACCELERATOR_HEADER_BYTES,
    AcceleratorAnswer,
    AcceleratorError,
    AcceleratorHello,
    AcceleratorLoad,
    AcceleratorMessage,
    AcceleratorMultiply,
    parse_accelerator_message,
)

LINKS = pytest.mark.parametrize("kind", KINDS)
WEIGHT = make_weight(FAST)
MULTIPLY = AcceleratorMultiply(0, 0, 3, 2, 7)


def load_of(weight: QuantizedWeight, **changes: Any) -> tuple[AcceleratorLoad, bytes]:
    n_out, n_in = weight.w_q.shape
    header = AcceleratorLoad(0, weight.format.CODE, weight.weight_bits, n_out, n_in, weight.digest())
    payload = weight.w_q.numpy().tobytes() + weight.scales.numpy().tobytes()
    return dataclasses.replace(header, **changes), payload


def ask(connection: socket.socket, message: AcceleratorMessage | bytes, payload: bytes = b"") -> AcceleratorMessage:
    header = message if isinstance(message, bytes) else message.to_bytes()
    connection.sendall(header + payload)
    return hear(connection)


def hear(connection: socket.socket) -> AcceleratorMessage:
    return parse_accelerator_message(connection.recv(ACCELERATOR_HEADER_BYTES, socket.MSG_WAITALL))


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it hung up with unread bytes of ours
        return True


def error(code: str) -> AcceleratorError:
    return AcceleratorError(code)


def loaded(connection: socket.socket, weight: QuantizedWeight = WEIGHT) -> None:
    assert ask(connection, *load_of(weight)) == AcceleratorAnswer()


@LINKS
def test_hello(kind: str) -> None:
    with served(kind) as connection:
        for _ in range(2):
            found = ask(connection, AcceleratorHello())
            assert isinstance(found, AcceleratorHello)
            assert found.device.startswith("cpu, ") and found.kernel == "int-mm"


def test_the_name_of_a_device_fits_the_header() -> None:
    device = CpuDevice()
    device.name = "Gerät " + "x" * 100
    ours, theirs = pair("tcp")
    thread = threading.Thread(target=serve_connection, args=(theirs, device))
    thread.start()
    with ours:
        assert ask(ours, AcceleratorHello()) == AcceleratorHello("Ger?t " + "x" * 58, "int-mm")
    thread.join()


@LINKS
@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"GET / HTTP/1.1\r\n".ljust(96), "wire.malformed"),
        (bytes(96), "wire.malformed"),
        (MULTIPLY.to_bytes()[:4] + b"\2" + MULTIPLY.to_bytes()[5:], "wire.version"),
        (MULTIPLY.to_bytes()[:8] + b"\xff" * 4 + MULTIPLY.to_bytes()[12:], "wire.limit"),
        (AcceleratorAnswer(1, 1).to_bytes(), "wire.malformed"),
        (AcceleratorError("offload").to_bytes(), "wire.malformed"),
    ],
    ids=["http", "zeros", "version", "layer", "answer", "error"],
)
def test_what_is_no_question_ends_the_connection(kind: str, header: bytes, code: str) -> None:
    with served(kind) as connection:
        assert ask(connection, header) == error(code)
        assert ended(connection)


@LINKS
@pytest.mark.parametrize("n_bytes", [1, 95, 96, 100])
def test_a_truncated_load(kind: str, n_bytes: int) -> None:
    header, payload = load_of(WEIGHT)
    with served(kind) as connection:
        connection.sendall((header.to_bytes() + payload)[:n_bytes])
        connection.shutdown(socket.SHUT_WR)
        assert ended(connection)


@LINKS
@pytest.mark.parametrize("change", ["digest", "integer", "scale", "bits"])
def test_a_weight_that_is_not_the_one_of_its_digest(kind: str, change: str) -> None:
    header, payload = load_of(WEIGHT)
    data = bytearray(payload)
    if change == "digest":
        header = dataclasses.replace(header, digest=bytes(48))
    elif change == "bits":
        header = dataclasses.replace(header, weight_bits=7)
    else:
        data[0 if change == "integer" else -1] ^= 1
    with served(kind) as connection:
        assert ask(connection, header, bytes(data)) == error("wire.malformed")
        assert ended(connection)


@LINKS
def test_too_many_bits_for_the_format(kind: str) -> None:
    wide = dataclasses.replace(WEIGHT, weight_bits=9)
    with served(kind) as connection:
        assert ask(connection, *load_of(wide)) == error("offload")
        loaded(connection)


@LINKS
@pytest.mark.parametrize(
    "change",
    [{"layer": 1}, {"n_planes": 4}, {"n_features": 6}, {"direction": 1}, {"n_tokens": 400_000, "n_features": 6}],
    ids=["layer", "planes", "features", "direction", "large"],
)
def test_a_product_with_what_is_not_loaded(kind: str, change: dict[str, int]) -> None:
    """It is refused, its payload is let go of, and the connection goes on."""
    wrong = dataclasses.replace(MULTIPLY, **change)
    with served(kind) as connection:
        loaded(connection)
        for _ in range(2):
            assert ask(connection, wrong, bytes(wrong.payload_bytes) if kind == "tcp" else b"") == error("offload")
        loaded(connection)


@LINKS
def test_an_answer_over_the_limit(kind: str) -> None:
    """Its size is known before anything is allocated."""
    with served(kind) as connection:
        loaded(connection, make_weight(FAST, 1025, 1))
        assert ask(connection, AcceleratorMultiply(0, 0, 3, 1 << 20, 1)) == error("wire.limit")
        assert ended(connection)


class Full(CpuDevice):
    """Has no room left, for a layer or for a product."""

    def __init__(self, what: type[BaseException], *, at_load: bool) -> None:
        super().__init__()
        self.what, self.at_load = what, at_load

    def load(self, *args: Any) -> Any:
        if self.at_load:
            raise self.what
        return super().load(*args)

    def multiply(self, *args: Any) -> None:
        raise self.what


def _with(device: Device, use: Callable[[socket.socket], object]) -> None:
    ours, theirs = pair("tcp")
    thread = threading.Thread(target=serve_connection, args=(theirs, device))
    thread.start()
    with ours:
        ours.settimeout(10)
        use(ours)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_device_that_is_full_refuses() -> None:
    def load(connection: socket.socket) -> None:
        for _ in range(2):
            assert ask(connection, *load_of(WEIGHT)) == error("offload")

    def product(connection: socket.socket) -> None:
        loaded(connection)
        for _ in range(2):
            assert ask(connection, MULTIPLY, bytes(MULTIPLY.payload_bytes)) == error("offload")

    _with(Full(torch.OutOfMemoryError, at_load=True), load)
    _with(Full(torch.OutOfMemoryError, at_load=False), product)


def test_a_host_that_is_full_ends_the_connection() -> None:
    def load(connection: socket.socket) -> None:
        header, payload = load_of(WEIGHT)
        connection.sendall(header.to_bytes() + payload)
        assert ended(connection)

    _with(Full(MemoryError, at_load=True), load)


# --- shared memory ----------------------------------------------------------------------------------------------------


def _memfd(n_bytes: int, *, sealed: bool = True) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, n_bytes)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _file() -> int:
    """On a disk, where nothing is sealed."""
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        return os.dup(file.fileno())


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def _n_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    "make",
    [
        list,
        lambda: [_memfd(103)],
        lambda: [_memfd(1 << 20, sealed=False)],
        lambda: [_memfd(0)],
        lambda: [_memfd((1 << 33) + (2 << 20))],
        lambda: [_memfd(4096), _memfd(4096)],
        lambda: [_file()],
        lambda: [_pipe()],
    ],
    ids=["none", "small", "unsealed", "empty", "huge", "two", "file", "pipe"],
)
def test_memory_that_is_not_taken(make: Callable[[], list[int]]) -> None:
    fds = make()
    with served("shared") as connection:
        loaded(connection)
        before = _n_files()
        socket.send_fds(connection, [MULTIPLY.to_bytes()], fds)
        assert hear(connection) == error("wire.malformed")
        assert ended(connection)
        assert _n_files() <= before
    for fd in fds:
        os.close(fd)


def test_memory_that_is_just_large_enough() -> None:
    """The answer stands at the next multiple of 64 after 3 x 2 x 7 bytes, and has 2 x 5 x 4."""
    fd = _memfd(64 + 40)
    with served("shared") as connection:
        loaded(connection)
        socket.send_fds(connection, [MULTIPLY.to_bytes()], [fd])
        assert hear(connection) == AcceleratorAnswer(2, 5)
    os.close(fd)


def test_the_enclave_s_memory_cannot_be_cut() -> None:
    """Else an accelerator could end the enclave: a page that is gone is a SIGBUS."""
    ours, theirs = pair("shared")
    link = OwnerLink(ours)
    link.room(100, 100)
    link.push(MULTIPLY.to_bytes(), np.empty(0, dtype=np.uint8))
    _, fds, _, _ = socket.recv_fds(theirs, 96, 2)
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(fds[0], size)
    os.close(fds[0])
    link.close()
    theirs.close()


def test_memory_is_let_go() -> None:
    """What the device was told of is undone when other memory comes, and when the connection ends."""
    held: list[int] = []

    class Spy(CpuDevice):
        def adopt(self, memory: np.ndarray) -> Callable[[], None]:
            held.append(len(memory))
            return lambda: held.remove(len(memory))

    ours, theirs = pair("shared")
    thread = threading.Thread(target=serve_connection, args=(theirs, Spy()))
    thread.start()
    with ours:
        for size in (4096, 8192):
            fd = _memfd(size)
            socket.send_fds(ours, [AcceleratorHello().to_bytes()], [fd])
            hear(ours)
            os.close(fd)
            assert held == [size]
    thread.join()
    assert held == []


# --- one after another ------------------------------------------------------------------------------------------------


class _Ends(Exception):
    """No connection comes any more."""


def test_connections_one_after_another_with_layers_of_their_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(4)]

        class Listener:
            def __init__(self) -> None:
                self.left = len(clients)

            def accept(self) -> tuple[socket.socket, Any]:
                if self.left == 0:
                    raise _Ends
                self.left -= 1
                return listener.accept()

        def run() -> None:
            with pytest.raises(_Ends):
                serve(Listener(), CpuDevice())  # type: ignore[arg-type]

        thread = threading.Thread(target=run)
        thread.start()
        first, second, third, fourth = clients
        loaded(first)
        second.sendall(MULTIPLY.to_bytes() + bytes(MULTIPLY.payload_bytes))  # waits for its turn
        assert ask(first, MULTIPLY, bytes(MULTIPLY.payload_bytes)) == AcceleratorAnswer(2, 5)
        first.close()
        assert hear(second) == error("offload")
        second.close()
        third.sendall(b"garbage".ljust(200))
        assert hear(third) == error("wire.malformed")
        third.close()
        loaded(fourth, make_weight(FAITHFUL))
        fourth.close()
        thread.join(timeout=10)
        assert not thread.is_alive()
