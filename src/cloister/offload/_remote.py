"""An accelerator that somebody else started, on this host or another."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np

from cloister.errors import AcceleratorLostError
from cloister.offload._address import connect, parse_address
from cloister.offload._client import ConnectedAccelerator, Timeouts
from cloister.offload._transport import Bytes, Link, OwnerLink, StreamLink

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0


class RemoteAccelerator(ConnectedAccelerator):
    """Connects to `cloister accelerator --listen ADDRESS`; an `Accelerator`.

    Links are not encrypted: whoever reads or changes them is in the place of the accelerator, which learns nothing but
    shapes, order and timing, and whose wrong answers are found. With the pad mode otp-2 the links of the *two*
    accelerators must not be read by the same party.

    Args:
        address: `tcp://host:port`, or `unix:/path` for shared memory on this host.
        timeouts: how long to wait for what.
        sleep: waits so many seconds between attempts to connect.

    Raises:
        OffloadError: no such address.
        AcceleratorLostError: nobody answers there in time.
    """

    def __init__(
        self, address: str, *, timeouts: Timeouts | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(timeouts)
        self._address = parse_address(address)
        self._sleep = sleep
        self._open()

    def __repr__(self) -> str:
        return f"RemoteAccelerator({str(self._address)!r})"

    def _connect(self) -> Link:
        connection = self._reach()
        return OwnerLink(connection) if self._address.path else StreamLink(connection, zeros)

    def _reach(self) -> socket.socket:
        """Ever longer pauses between attempts, until the time is up: who restarts it needs some."""
        pause, until = _FIRST_PAUSE_S, time.monotonic() + self._timeouts.start_s
        while True:
            try:
                return connect(self._address, max(until - time.monotonic(), _FIRST_PAUSE_S))
            except OSError as error:
                if time.monotonic() + pause > until:
                    cause = f"nobody listens at {self._address}: {error.strerror or error}"
                    raise AcceleratorLostError(cause, hint=self._hint()) from None
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _hint(self) -> str:
        return "its machine's log of `cloister accelerator` says why"


def zeros(n_bytes: int) -> Bytes:
    """Memory for a stream's tensors."""
    return np.zeros(n_bytes, dtype=np.uint8)  # what a caller does not overwrite is sent
