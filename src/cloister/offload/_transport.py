"""How headers and payloads cross between enclave and accelerator: shared memory on one host, TCP to another.

A `Link` is one end of a connection. Both ends call `room` for the places of input and answer, which are the same memory
on one host; `push` and `pull` move them where they are not. Everything that crosses is *masked* or *public*, so nothing
is encrypted here. What goes wrong is an OSError.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from cloister.errors import MalformedMessageError
from cloister.wire import ACCELERATOR_HEADER_BYTES, MAX_ACCELERATOR_PAYLOAD_BYTES

Bytes = UInt8[np.ndarray, " bytes"]

_ALIGNMENT = 64
_REGION_STEP_BYTES = 1 << 20
_MAX_REGION_BYTES = 2 * MAX_ACCELERATOR_PAYLOAD_BYTES + _REGION_STEP_BYTES
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FD_BYTES = array.array("i").itemsize
# A peer whose machine is gone is noticed after some 25 s, so that the next connection is served.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class Link(ABC):
    """One end of a connection, for one thread.

    Args:
        connection: connected; owned from here on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._header = bytearray(ACCELERATOR_HEADER_BYTES)

    @property
    def timeout_s(self) -> float | None:
        """For each message, either way; None waits for ever."""
        return self._socket.gettimeout()

    @timeout_s.setter
    def timeout_s(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def send(self, *parts: bytes | memoryview) -> None:
        """Send these bytes through the socket."""
        self._send([memoryview(part) for part in parts])

    def receive(self) -> bytes:
        """The next header; empty where the peer closed the connection between messages."""
        n_read = self._receive_first(self._header)
        if n_read:
            self.read_into(memoryview(self._header)[n_read:])
        return bytes(self._header) if n_read else b""

    def read_into(self, view: memoryview) -> None:
        """Fill `view` from the socket."""
        deadline = self._deadline()
        while view:
            n_read = self._socket.recv_into(view)
            if n_read == 0:
                raise ConnectionResetError("the connection ended inside a message")
            view = view[n_read:]
            if view:
                _check_deadline(deadline)

    def close(self) -> None:
        """Close the connection. May be called again."""
        self._socket.close()

    @abstractmethod
    def room(self, n_in: int, n_out: int) -> tuple[Bytes, Bytes]:
        """The places of an input of `n_in` bytes and of its answer, until the next call of this."""

    @abstractmethod
    def push(self, header: bytes, payload: Bytes) -> None:
        """Send a header with a payload that stands in its place."""

    @abstractmethod
    def pull(self, payload: Bytes) -> None:
        """Take the payload of a header that was received to its place."""

    @abstractmethod
    def skip(self, n_bytes: int) -> None:
        """Let go of a payload that is not wanted."""

    def _receive_first(self, buffer: bytearray) -> int:
        return self._socket.recv_into(buffer)

    def _send(self, views: list[memoryview], *fds: int) -> None:
        """These bytes, and with the first of them these files."""
        deadline = self._deadline()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while views:
            n_sent = self._socket.sendmsg(views, ancillary)
            ancillary = []
            while views and n_sent >= len(views[0]):
                n_sent -= len(views.pop(0))
            if views:
                views[0] = views[0][n_sent:]
                _check_deadline(deadline)

    def _deadline(self) -> float | None:
        timeout_s = self.timeout_s
        return None if timeout_s is None else time.monotonic() + timeout_s


class StreamLink(Link):
    """Payloads follow their headers through the socket.

    Args:
        connection: of TCP.
        memory: makes a buffer of so many bytes.
    """

    def __init__(self, connection: socket.socket, memory: Callable[[int], Bytes]) -> None:
        super().__init__(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._memory = memory
        self._buffers = [memory(0), memory(0)]

    def room(self, n_in: int, n_out: int) -> tuple[Bytes, Bytes]:
        """See `Link.room`. Memory of this end alone."""
        for i, n_bytes in enumerate((n_in, n_out)):
            if len(self._buffers[i]) < n_bytes:
                self._buffers[i] = self._memory(n_bytes)
        return self._buffers[0][:n_in], self._buffers[1][:n_out]

    def push(self, header: bytes, payload: Bytes) -> None:
        """See `Link.push`."""
        self.send(header, payload.data)

    def pull(self, payload: Bytes) -> None:
        """See `Link.pull`."""
        self.read_into(payload.data)

    def skip(self, n_bytes: int) -> None:
        """See `Link.skip`."""
        sink = memoryview(bytearray(min(n_bytes, _REGION_STEP_BYTES)))
        while n_bytes:
            part = sink[:n_bytes]
            self.read_into(part)
            n_bytes -= len(part)


class _SharedLink(Link):
    """Payloads stand in memory that both ends have mapped: the input at 0, the answer at the next multiple of 64."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._region: Bytes = np.empty(0, dtype=np.uint8)

    def room(self, n_in: int, n_out: int) -> tuple[Bytes, Bytes]:
        """See `Link.room`. Both ends see at any time what either writes."""
        start = -(-n_in // _ALIGNMENT) * _ALIGNMENT
        self._ensure(start + n_out)
        return self._region[:n_in], self._region[start : start + n_out]

    def push(self, header: bytes, payload: Bytes) -> None:
        """See `Link.push`. The payload is there already."""
        self.send(header)

    def pull(self, payload: Bytes) -> None:
        """See `Link.pull`. The payload is there already."""

    def skip(self, n_bytes: int) -> None:
        """See `Link.skip`. There is nothing to let go of."""

    @abstractmethod
    def _ensure(self, n_bytes: int) -> None:
        """See that the region has so many bytes."""


class OwnerLink(_SharedLink):
    """The enclave's end: it makes the memory, and seals its size, since an end that shrinks it kills the other.

    Args:
        connection: a Unix socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._unsent: int | None = None

    def push(self, header: bytes, payload: Bytes) -> None:
        """See `Link.push`. New memory is passed with the header that is the first to need it."""
        self._send([memoryview(header)], *([] if self._unsent is None else [self._unsent]))
        self._close_unsent()

    def close(self) -> None:
        """See `Link.close`. The memory stays for as long as somebody holds a view of it."""
        super().close()
        self._close_unsent()
        self._region = np.empty(0, dtype=np.uint8)

    def _ensure(self, n_bytes: int) -> None:
        if n_bytes <= len(self._region):
            return
        n_bytes = -(-n_bytes // _REGION_STEP_BYTES) * _REGION_STEP_BYTES
        self._close_unsent()
        self._unsent = os.memfd_create("cloister-accelerator", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(self._unsent, 0, n_bytes)  # an error here, where lazy pages would be a SIGBUS later
        fcntl.fcntl(self._unsent, fcntl.F_ADD_SEALS, _SEALS)
        self._region = np.frombuffer(mmap.mmap(self._unsent, n_bytes), dtype=np.uint8)

    def _close_unsent(self) -> None:
        if self._unsent is not None:
            os.close(self._unsent)
            self._unsent = None


class GuestLink(_SharedLink):
    """The accelerator's end: it maps the memory that comes with a header.

    Args:
        connection: a Unix socket.
        adopt: called with each new region; returns what is called before the region is let go.
    """

    def __init__(self, connection: socket.socket, adopt: Callable[[Bytes], Callable[[], None]]) -> None:
        super().__init__(connection)
        self._adopt = adopt
        self._let_go: Callable[[], None] = lambda: None

    def close(self) -> None:
        """See `Link.close`."""
        super().close()
        self._let_go()
        self._let_go = lambda: None
        self._region = np.empty(0, dtype=np.uint8)

    def _receive_first(self, buffer: bytearray) -> int:
        n_read, ancillary, _, _ = self._socket.recvmsg_into([buffer], socket.CMSG_SPACE(_FD_BYTES))
        for _, _, data in ancillary:  # files: nothing else comes unless a socket was told to take it
            self._map(array.array("i", data[: len(data) // _FD_BYTES * _FD_BYTES]))
        return n_read

    def _map(self, fds: array.array[int]) -> None:
        try:
            size = os.fstat(fds[0]).st_size if len(fds) == 1 else 0
            if not 0 < size <= _MAX_REGION_BYTES or not _is_sealed(fds[0]):
                raise MalformedMessageError("what came with a header is not one sealed piece of memory")
            region = np.frombuffer(mmap.mmap(fds[0], size), dtype=np.uint8)
        finally:
            for fd in fds:
                os.close(fd)
        self._let_go()
        self._region = region
        self._let_go = self._adopt(region)

    def _ensure(self, n_bytes: int) -> None:
        if n_bytes > len(self._region):
            raise MalformedMessageError("the shared memory is too small for the message")


def _is_sealed(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # a file that knows no seals
        return False


def _check_deadline(deadline: float | None) -> None:
    """A peer that lets a byte through now and then does not hold anybody for ever."""
    if deadline is not None and time.monotonic() > deadline:
        raise TimeoutError
