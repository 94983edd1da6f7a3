"""An accelerator's server in a thread, reached by each kind of connection; and one that a test speaks for."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from cloister.errors import WireError
from cloister.offload import Timeouts
from cloister.offload._client import ConnectedAccelerator
from cloister.offload._compute import CpuDevice
from cloister.offload._server import serve_connection
from cloister.offload._transport import Bytes, Link, OwnerLink, StreamLink
from cloister.ring import QuantizedWeight, RingFormat, quantize_weight
from cloister.wire import (
    ACCELERATOR_HEADER_BYTES,
    AcceleratorHello,
    AcceleratorMultiply,
    parse_accelerator_message,
)

KINDS = ("shared", "tcp")
PATIENT = Timeouts(answer_s=20, load_s=20, start_s=20)
HASTY = Timeouts(answer_s=0.2, load_s=0.2, start_s=0.2)


def pair(kind: str) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection."""
    if kind == "shared":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def memory(n_bytes: int) -> Bytes:
    return np.empty(n_bytes, dtype=np.uint8)


def honest(connection: socket.socket) -> None:
    """Serve it as the process does."""
    serve_connection(connection, CpuDevice())


class ThreadAccelerator(ConnectedAccelerator):
    """Client of what `serve` does with the other end, each time in a new thread."""

    def __init__(
        self, kind: str, serve: Callable[[socket.socket], object] | None = None, *, timeouts: Timeouts = PATIENT
    ) -> None:
        super().__init__(timeouts)
        self.kind = kind
        self.serve = serve or honest
        self.threads: list[threading.Thread] = []
        self._open()

    def _connect(self) -> Link:
        ours, theirs = pair(self.kind)
        self.threads.append(threading.Thread(target=self.serve, args=(theirs,), daemon=True))
        self.threads[-1].start()
        return OwnerLink(ours) if self.kind == "shared" else StreamLink(ours, memory)

    def close(self) -> None:
        super().close()
        for thread in self.threads:
            thread.join(timeout=10)
            assert not thread.is_alive()


def scripted(*answers: bytes | Callable[[socket.socket], object]) -> Callable[[socket.socket], None]:
    """A server that says hello, then for each header that comes sends the next of `answers`, and then hangs up."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, WireError):
            for answer in (AcceleratorHello("scripted", "none").to_bytes(), *answers):
                _take(connection)
                if callable(answer):
                    answer(connection)
                else:
                    connection.sendall(answer)
            connection.recv(1)

    return serve


def _take(connection: socket.socket) -> None:
    """One question with its payload."""
    message = parse_accelerator_message(connection.recv(ACCELERATOR_HEADER_BYTES, socket.MSG_WAITALL))
    n_bytes = message.payload_bytes
    if connection.family == socket.AF_UNIX and isinstance(message, AcceleratorMultiply):
        n_bytes = 0
    while n_bytes and (part := connection.recv(n_bytes)):
        n_bytes -= len(part)


@contextmanager
def served(kind: str) -> Iterator[socket.socket]:
    """The raw end of a connection that a server of a thread serves."""
    ours, theirs = pair(kind)
    thread = threading.Thread(target=honest, args=(theirs,), daemon=True)
    thread.start()
    with ours:
        ours.settimeout(10)
        yield ours
    thread.join(timeout=10)
    assert not thread.is_alive()


def make_weight(fmt: RingFormat, n_out: int = 5, n_in: int = 7, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return quantize_weight(torch.randn(n_out, n_in, generator=generator), fmt, layer=f"layer-{seed}")
