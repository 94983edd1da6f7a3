"""The pad helper: expands the pads whose keys it is sent, and multiplies them by the layers that it was given.

It learns pads and public weights, and not one masked tensor. It may be killed at any time; its log never holds a number
that it was sent.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import numpy as np

from cloister.errors import MalformedMessageError, OffloadError, PadError, WireError
from cloister.kernels import _native
from cloister.offload._address import bound_address, listen, parse_address
from cloister.offload._compute import Device, open_device
from cloister.offload._helper import N_RANGES, RANGE
from cloister.offload._helper_link import SealedLink
from cloister.offload._process import drop_rights
from cloister.offload._server import ServedConnection
from cloister.pad import BLOCK_POSITIONS, Direction, PadRange, expand_ranges
from cloister.wire import AcceleratorAnswer, AcceleratorMultiply

_HANDSHAKE_S = 10.0
_log = logging.getLogger(__name__)


def serve_pad_helper(listen_at: str, key: bytes, device: str = "auto", *, on_ready: Callable[[str], None]) -> None:
    """Serve one connection after another, each with layers of its own, until interrupted; without rights of root.

    Args:
        listen_at: `tcp://host:port`.
        key: *secret*, 32 bytes, from `read_helper_key`; only who holds it is served.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        on_ready: called once with a line that says where it listens, and with what.

    Raises:
        OffloadError: no such device, or the address cannot be had.
    """
    drop_rights()
    address = parse_address(listen_at)
    if address.path:
        raise OffloadError(f"a pad helper cannot listen on {address}", hint="tcp://host:port")
    opened = open_device(device)
    with listen(address) as listener:
        on_ready(f"{bound_address(listener, address)}: pad helper, {opened.name}, {opened.kernel}")
        while True:
            serve_pads(listener.accept()[0], key, opened)


def serve_pads(connection: socket.socket, key: bytes, device: Device) -> None:
    """Serve one connection until it ends."""
    with connection:
        connection.settimeout(_HANDSHAKE_S)
        try:
            link = SealedLink(connection, key, is_client=False)
            link.timeout_s = None
            _PadConnection(link, device).run()
        except (OSError, MemoryError) as error:
            _log.info("a connection ended: %s", type(error).__name__)
        except WireError as error:
            _log.warning("a connection was closed: %s", error.code)


class _PadConnection(ServedConnection):
    """What one enclave has loaded."""

    def _multiply(self, message: AcceleratorMultiply) -> None:
        n = message.n_tokens * message.n_features
        ranges = self._ranges(n)
        weight, direction = self._weights.get(message.layer), list(Direction)[message.direction]
        if weight is None or message.n_features != weight.sizes(direction)[0]:
            raise OffloadError("no such layer is loaded")
        try:
            r = expand_ranges(ranges, n, weight.format.pad_moduli)
        except PadError as error:
            raise MalformedMessageError(error.cause) from None
        planes = np.empty(r.shape, dtype=np.int8)
        _native.encode_pad(r, weight.format.CODE, planes)
        answer = AcceleratorAnswer(message.n_tokens, weight.sizes(direction)[1])
        u = np.empty((answer.n_tokens, answer.n_features), dtype=np.uint32)
        shape = (len(planes), message.n_tokens, message.n_features)
        self._device.multiply(weight, direction, planes.reshape(shape), u)
        self._link.send(answer.to_bytes(), u.data.cast("B"))

    def _ranges(self, n_positions: int) -> list[PadRange]:
        """What follows the header: how many ranges, and each of them."""
        count = bytearray(N_RANGES.size)
        self._link.read_into(memoryview(count))
        (n_ranges,) = N_RANGES.unpack(count)
        if not 1 <= n_ranges <= n_positions // BLOCK_POSITIONS + 2:
            raise MalformedMessageError("a pad does not lie in so many blocks")
        packed = bytearray(n_ranges * RANGE.size)
        self._link.read_into(memoryview(packed))
        return [PadRange(*fields) for fields in RANGE.iter_unpack(packed)]
