"""An accelerator that connects to this process, which then needs to open no connection: a hardened enclave cannot."""

from __future__ import annotations

import socket

from cloister.errors import AcceleratorLostError
from cloister.offload._address import listen, parse_address
from cloister.offload._client import ConnectedAccelerator, Timeouts
from cloister.offload._remote import zeros
from cloister.offload._transport import Link, OwnerLink, StreamLink


def accelerator_port(address: str) -> socket.socket:
    """A socket that listens at `unix:/path` or `tcp://host:port`, for `AwaitedAccelerator`. Make it before hardening.

    Raises:
        OffloadError: it is no address, or cannot be had.
    """
    return listen(parse_address(address))


class AwaitedAccelerator(ConnectedAccelerator):
    """Takes the next connection of `cloister accelerator --connect ADDRESS`; an `Accelerator`.

    Who connects is not asked: it sees masked tensors, and a wrong answer of it is found. `revive` drops the connection
    and takes the next one.

    Args:
        listener: from `accelerator_port`; this object's from now on.
        timeouts: how long to wait for what.

    Raises:
        AcceleratorLostError: nobody connects in time.
    """

    def __init__(self, listener: socket.socket, *, timeouts: Timeouts | None = None) -> None:
        super().__init__(timeouts)
        self._listener = listener
        self._open()

    def __repr__(self) -> str:
        return f"AwaitedAccelerator({self._listener.getsockname()!r})"

    def close(self) -> None:
        """Drops the connection and takes no more."""
        super().close()
        self._listener.close()

    def _connect(self) -> Link:
        self._listener.settimeout(self._timeouts.start_s)
        try:
            connection = self._listener.accept()[0]
        except OSError as error:
            raise AcceleratorLostError(
                f"no accelerator has connected within {self._timeouts.start_s:g} s ({error.strerror or error})",
                hint="start one with `cloister accelerator --connect`; its log says why it does not come",
            ) from None
        connection.settimeout(None)
        return OwnerLink(connection) if connection.family == socket.AF_UNIX else StreamLink(connection, zeros)
