"""Where an accelerator listens: `unix:/path` on this host, `tcp://host:port` on another."""

from __future__ import annotations

import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from cloister.errors import OffloadError

_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/]+)):([0-9]{1,5})")
_MAX_PATH_BYTES = 107  # sun_path of linux/un.h, less its final zero
_MAX_PORT = 65535


@dataclass(frozen=True)
class Address:
    """One of the two.

    Attributes:
        path: of a Unix socket; else empty.
        host: name or IP address.
        port: 0 lets the system choose one to listen on.
    """

    path: str = ""
    host: str = ""
    port: int = 0

    def remove(self) -> None:
        """Remove the socket's file, where there is one."""
        if self.path:
            Path(self.path).unlink(missing_ok=True)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """`unix:/path` or `tcp://host:port`.

    Raises:
        OffloadError: it is neither.
    """
    path = text.removeprefix("unix:")
    if path != text and path and len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        return Address(path=path)
    found = _TCP.fullmatch(text)
    if found is None or int(found[3]) > _MAX_PORT:
        raise OffloadError(
            f"{text} is no address of an accelerator",
            hint=f"unix:/path of at most {_MAX_PATH_BYTES} bytes, or tcp://host:port",
        )
    return Address(host=found[1] or found[2], port=int(found[3]))


def connect(address: Address, timeout_s: float) -> socket.socket:
    """A connection to `address`.

    Raises:
        OSError: nobody listens there, or not in time.
    """
    if not address.path:
        return socket.create_connection((address.host, address.port), timeout=timeout_s)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address.path)
    except OSError:
        connection.close()
        raise
    return connection


def listen(address: Address) -> socket.socket:
    """A socket that listens at `address`. At a path only this user can connect; a stale socket there is replaced.

    Raises:
        OffloadError: the address is in use or cannot be had.
    """
    try:
        if not address.path:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            return socket.create_server((address.host, address.port), family=family)
        _remove_stale(Path(address.path))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Linux gives the socket file the mode of the unbound socket, so there is no moment for others to connect.
            os.fchmod(listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)
            listener.bind(address.path)
            listener.listen()
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise OffloadError(f"cannot listen on {address}: {error.strerror or error}") from None


def bound_address(listener: socket.socket, address: Address) -> Address:
    """`address` with the port that the system chose."""
    return address if address.path else Address(host=address.host, port=listener.getsockname()[1])


def _remove_stale(path: Path) -> None:
    """Make room for a socket: remove one that nobody listens on, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OffloadError(f"{path} is in the way and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OffloadError(f"another process listens on {path}")
    path.unlink()
