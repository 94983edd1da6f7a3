"""HostPort: what an untrusted host process and the enclave process say to each other over a Unix socket.

One frame each way per request: u32 big-endian length, then a `wire` message. The host sees what it asks for and what it
relays, nothing else; everything secret that passes is sealed already. Normative: spec/attestation.md section 7.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from cloister.errors import (
    AttestationError,
    CloisterError,
    EnclaveError,
    LimitExceededError,
    MalformedMessageError,
    PeerError,
    error_for_code,
)
from cloister.wire import MAX_ENVELOPE_BYTES, pack, unpack

REQUEST_KIND = "host.request"
ANSWER_KIND = "host.answer"
# The largest thing that passes is one envelope; a MiB is plenty for the fields around it.
MAX_FRAME_BYTES = MAX_ENVELOPE_BYTES + (1 << 20)
MAX_SOCKET_PATH_BYTES = 107  # sun_path of linux/un.h, less its final zero
_LENGTH_BYTES = 4
_MAX_METHOD_LENGTH = 64

Handler = Callable[[str, dict[str, Any]], Mapping[str, object]]
_log = logging.getLogger(__name__)


def bind_host_socket(path: str | Path) -> socket.socket:
    """A listening Unix socket at `path` that only this user can connect to; call it before `harden`.

    A stale socket file of a process that died is replaced.

    Raises:
        EnclaveError: the path is too long, is in use, is no socket, or cannot be bound.
    """
    name = _checked_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(Path(name))
        # Linux gives the socket file the mode of the unbound socket, so there is no moment in which others can connect.
        os.fchmod(listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        listener.bind(name)
        listener.listen()
    except OSError as error:
        listener.close()
        raise EnclaveError(f"cannot listen on {name}: {error.strerror}") from None
    except EnclaveError:
        listener.close()
        raise
    return listener


def host_call(socket_path: str | Path, method: str, body: Mapping[str, object], *, timeout_s: float) -> dict[str, Any]:
    """Ask the enclave process at `socket_path` one thing and return its answer.

    Args:
        socket_path: what `bind_host_socket` bound.
        method: what is asked.
        body: text keys; the value types of `wire.pack`.
        timeout_s: for the whole exchange.

    Raises:
        CloisterError: what the enclave raised, of the same class.
        EnclaveError: nobody listens, or no answer came in time.
        WireError: the answer does not parse, or the request is over the limit.
    """
    name = _checked_path(socket_path)
    deadline = time.monotonic() + timeout_s
    request = pack(REQUEST_KIND, {"method": method, "body": body})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout_s)
            connection.connect(name)
            _send_frame(connection, request)
            frame = _read_frame(connection, deadline)
        except TimeoutError:
            raise EnclaveError(f"{name} did not answer {method} within {timeout_s:g} s") from None
        except OSError as error:
            raise EnclaveError(f"cannot reach {name}: {error.strerror}", hint="is the process running?") from None
    if frame is None:
        raise EnclaveError(f"{name} closed the connection without an answer to {method}")
    return _answer_body(frame)


class HostServer:
    """Answers host requests on a listening socket, one thread per connection.

    Args:
        listener: from `bind_host_socket`; owned from here on.
        handler: called as `handler(method, body)` from several threads at once; a `CloisterError` that it raises goes
            back to the caller as its code, cause and hint, none of which ever holds a secret.
        max_connections: how many are served at a time; further ones wait in the kernel's queue.
    """

    def __init__(self, listener: socket.socket, handler: Handler, *, max_connections: int = 64) -> None:
        self._listener = listener
        self._handler = handler
        self._slots = threading.BoundedSemaphore(max_connections)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = False

    def serve_forever(self) -> None:
        """Accept and serve until `close` is called.

        Raises:
            EnclaveError: the listening socket broke.
        """
        while True:
            self._slots.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                self._slots.release()
                if self._closed:
                    return
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                raise EnclaveError(f"the host socket broke: {error.strerror}") from None
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="hostport", daemon=True).start()

    def close(self) -> None:
        """Stop accepting, and cut the connections that are open. May be called from any thread, and again."""
        self._closed = True
        # shutdown wakes a thread that waits in accept; close alone would not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                while (frame := _read_frame(connection, None)) is not None:
                    _send_frame(connection, self._answer(frame))
        except (OSError, LimitExceededError, MalformedMessageError) as error:
            # The host went away or does not speak the protocol: its own affair, and nothing to answer to.
            _log.info("host connection ended: %s", type(error).__name__)
        finally:
            with self._lock:
                self._connections.discard(connection)
            self._slots.release()

    def _answer(self, frame: bytearray) -> bytes:
        try:
            method, body = _parse_request(frame)
            return pack(ANSWER_KIND, {"body": self._handler(method, body)})
        except CloisterError as error:
            _log.info("host request refused: %s", error.code)
            return pack(ANSWER_KIND, _error_fields(error))


def _parse_request(frame: bytearray) -> tuple[str, dict[str, Any]]:
    request = unpack(frame, REQUEST_KIND, max_bytes=MAX_FRAME_BYTES)
    method, body = request.get("method"), request.get("body")
    if set(request) != {"method", "body"} or not isinstance(method, str) or not isinstance(body, dict):
        raise MalformedMessageError("a host request has a method and a body")
    if not 0 < len(method) <= _MAX_METHOD_LENGTH:
        raise MalformedMessageError("the method of a host request is not a name")
    return method, cast("dict[str, Any]", body)


def _error_fields(error: CloisterError) -> dict[str, object]:
    fields: dict[str, object] = {"error": error.code, "cause": error.cause, "hint": error.hint}
    if isinstance(error, AttestationError):
        fields["reasons"] = error.reasons
    if isinstance(error, PeerError):
        fields["peer"], fields["peer_code"] = error.peer, error.peer_code
    return fields


def _answer_body(frame: bytearray) -> dict[str, Any]:
    answer = unpack(frame, ANSWER_KIND, max_bytes=MAX_FRAME_BYTES)
    if "error" in answer:
        raise _error_from(answer)
    body = answer.get("body")
    if not isinstance(body, dict):
        raise MalformedMessageError("a host answer has a body")
    return cast("dict[str, Any]", body)


def _error_from(answer: dict[str, Any]) -> CloisterError:
    cause, hint = str(answer.get("cause", "")), str(answer.get("hint", ""))
    kind = error_for_code(str(answer["error"]))
    if issubclass(kind, PeerError):
        return kind(cause, peer=str(answer.get("peer", "")), peer_code=str(answer.get("peer_code", "")), hint=hint)
    if issubclass(kind, AttestationError):
        reasons = answer.get("reasons")
        lines = [str(line) for line in cast("list[object]", reasons)] if isinstance(reasons, list) else None
        return kind(cause, reasons=lines, hint=hint)
    return kind(cause, hint=hint)


def _send_frame(connection: socket.socket, message: bytes) -> None:
    if len(message) > MAX_FRAME_BYTES:
        raise LimitExceededError(f"message of {len(message)} bytes is over the host port's limit of {MAX_FRAME_BYTES}")
    # Two calls in place of a copy of what can be a gigabyte.
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES, "big"))
    connection.sendall(message)


def _read_frame(connection: socket.socket, deadline: float | None) -> bytearray | None:
    """One frame, or None where the peer closed the connection between frames."""
    head = _read_exactly(connection, _LENGTH_BYTES, deadline)
    if not head:
        return None
    size = int.from_bytes(head, "big")
    if len(head) == _LENGTH_BYTES and size > MAX_FRAME_BYTES:
        raise LimitExceededError(f"frame of {size} bytes is over the host port's limit of {MAX_FRAME_BYTES}")
    frame = _read_exactly(connection, size, deadline)
    if len(head) < _LENGTH_BYTES or len(frame) < size:
        raise MalformedMessageError("the connection ended inside a frame")
    return frame


def _read_exactly(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    """`size` bytes, or fewer where the connection ended."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    at = 0
    while at < size:
        if deadline is not None:
            # A timeout of zero would mean non-blocking, not "no time left".
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        n_read = connection.recv_into(view[at:])
        if n_read == 0:
            view.release()
            del buffer[at:]
            break
        at += n_read
    return buffer


def _checked_path(path: str | Path) -> str:
    name = str(path)
    size = len(os.fsencode(name))
    if size > MAX_SOCKET_PATH_BYTES:
        raise EnclaveError(
            f"the socket path {name} has {size} bytes, and Linux allows {MAX_SOCKET_PATH_BYTES}",
            hint="use a run folder with a shorter path",
        )
    return name


def _remove_stale(path: Path) -> None:
    """Make room for a socket: remove one that nobody listens on, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise EnclaveError(f"{path} is in the way and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise EnclaveError(f"another process listens on {path}", hint="is the same run active already?")
    path.unlink()
