"""The enclave's side of a pad helper: a second accelerator, which computes u = W_q r for the pads of the mode otp-2.

The keys of pads go to it, encrypted, and no masked tensor ever does. It is trusted for one thing: that it does not work
together with the accelerator. A wrong u is found by the check of the accelerator's answer.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt32

from cloister.errors import ConfigError, OffloadError, WireError
from cloister.offload._address import Address, parse_address
from cloister.offload._client import Timeouts
from cloister.offload._helper_link import SealedLink
from cloister.offload._remote import RemoteAccelerator
from cloister.pad import Direction, PadRange, ProcessBound
from cloister.wire import AcceleratorAnswer, AcceleratorMultiply

if TYPE_CHECKING:
    from cloister.ring import QuantizedWeight

N_RANGES = struct.Struct(">I")
RANGE = struct.Struct(">32sII")  # key of the block, first position in it, how many


class RemotePadHelper(ProcessBound):
    """A `cloister.pad.PadHelper` that somebody else started. Thread-safe. A lost connection is made anew when needed.

    Args:
        address: `tcp://host:port`.
        key: *secret*, 32 bytes, as the helper has it; from `read_helper_key`.
        accelerator: address of the one that will see what the pads mask; None for one that runs on this host.
        insecure_same_host: for tests on one machine, which then has both pads and masked tensors.
        timeouts: how long to wait for what.

    Raises:
        ConfigError: not of TCP, or on the accelerator's host.
        OffloadError: no such address, or the helper holds another key.
        AcceleratorLostError: nobody answers there in time.
    """

    __slots__ = ("_client", "_lock")

    def __init__(
        self,
        address: str,
        key: bytes,
        *,
        accelerator: str | None,
        insecure_same_host: bool = False,
        timeouts: Timeouts | None = None,
    ) -> None:
        super().__init__()
        other = Address(path="here") if accelerator is None else parse_address(accelerator)
        _check_hosts(parse_address(address), other, insecure_same_host)
        self._lock = threading.Lock()
        self._client = _Client(address, key, timeouts)

    def __repr__(self) -> str:
        return f"RemotePadHelper({self._client!r})"

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        """See `PadHelper.load`."""
        with self._client_alone() as client:
            client.load(layer, weight)

    def multiply(
        self, layer: str, direction: Direction, ranges: Sequence[PadRange], n_tokens: int
    ) -> UInt32[np.ndarray, "tokens out"]:
        """See `PadHelper.multiply`."""
        with self._client_alone() as client:
            return client.multiply(layer, direction, ranges, n_tokens)

    def close(self) -> None:
        """Hang up. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._lock:
            self._client.close()

    @contextmanager
    def _client_alone(self) -> Generator[_Client]:
        self._stay_home()
        with self._lock:
            try:
                if self._client.is_lost:
                    self._client.revive()
                yield self._client
            except OffloadError as error:
                raise type(error)(f"pad helper: {error.cause}", hint=error.hint) from None


class _Client(RemoteAccelerator):
    """The accelerator's protocol over an encrypted connection, with ranges of pads in place of planes."""

    def __init__(self, address: str, key: bytes, timeouts: Timeouts | None) -> None:
        self._key = key
        super().__init__(address, timeouts=timeouts)

    def __repr__(self) -> str:
        return repr(str(self._address))

    @property
    def is_lost(self) -> bool:
        """Whether there is no connection."""
        return self._link is None

    def multiply(
        self, layer: str, direction: Direction, ranges: Sequence[PadRange], n_tokens: int
    ) -> UInt32[np.ndarray, "tokens out"]:
        """See `PadHelper.multiply`."""
        link, known = self._connected(), self._layers.get(layer)
        if known is None:
            raise OffloadError(f"layer {layer} was never loaded")
        n_in, n_out = known.sizes(direction)
        code = list(Direction).index(direction)
        try:
            ask = AcceleratorMultiply(known.header.layer, code, known.n_planes, n_tokens, n_in)
            answer = AcceleratorAnswer(n_tokens, n_out)
        except WireError as error:
            raise OffloadError(f"layer {layer}: {n_tokens} tokens at once do not go: {error.cause}") from None
        link.timeout_s = self._timeouts.answer_s
        packed = b"".join(RANGE.pack(part.key, part.first, part.n) for part in ranges)
        if self._ask(link, ask, memoryview(N_RANGES.pack(len(ranges))), memoryview(packed)) != answer:
            self._lose("answered with a tensor of another size")
        u = np.empty((n_tokens, n_out), dtype=np.uint32)
        try:
            link.read_into(u.data.cast("B"))
        except OSError as error:
            self._lose_connection(error)
        return u

    def _connect(self) -> SealedLink:
        connection = self._reach()
        try:
            return SealedLink(connection, self._key, is_client=True)
        except ConnectionAbortedError:
            connection.close()
            raise OffloadError(
                f"the pad helper {self._address} holds another key", hint="both need a copy of one key file"
            ) from None
        except OSError:
            connection.close()
            raise


def _check_hosts(helper: Address, accelerator: Address, insecure_same_host: bool) -> None:
    """Find the mistake of giving pads and masked tensors to one machine, which then has the features.

    Success proves nothing: that two addresses are of two operators who do not work together is for people to know.
    """
    if helper.path:
        raise ConfigError(f"{helper} is no address of a pad helper", hint="tcp://host:port")
    if helper == accelerator or (not insecure_same_host and _hosts(helper) & _hosts(accelerator)):
        raise ConfigError(
            f"the pad helper {helper} is on the accelerator's host, which would see both pads and masked tensors",
            hint="the mode otp-2 needs accelerators of two operators; with one, take otp or lattice",
        )


def _hosts(address: Address) -> set[str]:
    """Every address of the host that the name resolves to; all those of this machine's loopback count as one."""
    if address.path:
        return {"loopback"}
    try:
        found = socket.getaddrinfo(address.host, None, proto=socket.IPPROTO_TCP)
    except OSError:
        return {address.host}
    hosts = {str(entry[4][0]) for entry in found}
    return {"loopback" if host == "::1" or host.startswith("127.") else host for host in hosts} | {address.host}
