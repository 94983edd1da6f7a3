"""The accelerator's side of the protocol: one connection at a time asks for layers to be held and for products.

It holds nothing secret, and may be killed at any time. Its log never holds a number that it was sent.
"""

from __future__ import annotations

import logging
import socket

import numpy as np
import torch

from cloister.errors import CloisterError, MalformedMessageError, OffloadError, WireError
from cloister.offload._compute import Device, DeviceWeight
from cloister.offload._transport import GuestLink, Link, StreamLink
from cloister.pad import Direction
from cloister.ring import FORMATS, QuantizedWeight
from cloister.wire import (
    AcceleratorAnswer,
    AcceleratorError,
    AcceleratorHello,
    AcceleratorLoad,
    AcceleratorMessage,
    AcceleratorMultiply,
    parse_accelerator_message,
)

_DIRECTIONS = (Direction.FORWARD, Direction.BACKWARD)
_FORMATS = {form.CODE: form for form in FORMATS.values()}
_NAME_CHARACTERS = 64
_NOTHING = torch.empty(0, dtype=torch.float64)
_log = logging.getLogger(__name__)


def serve(listener: socket.socket, device: Device) -> None:
    """Serve the connections of a listening socket one after another, each with layers of its own."""
    while True:
        serve_connection(listener.accept()[0], device)


def serve_connection(connection: socket.socket, device: Device) -> None:
    """Serve one connection until it ends."""
    is_local = connection.family == socket.AF_UNIX
    link = GuestLink(connection, device.adopt) if is_local else StreamLink(connection, device.memory)
    try:
        ServedConnection(link, device).run()
    except (OSError, MemoryError) as error:
        _log.info("a connection ended: %s", type(error).__name__)
    except WireError as error:
        _log.warning("a connection was closed: %s", error.code)
    finally:
        link.close()


class ServedConnection:
    """What one connection has loaded."""

    def __init__(self, link: Link, device: Device) -> None:
        self._link = link
        self._device = device
        self._weights: dict[int, DeviceWeight] = {}

    def run(self) -> None:
        """Answer until the other side hangs up.

        Raises:
            WireError: it does not speak the protocol; it was told so.
            OSError: the connection broke.
        """
        try:
            while header := self._link.receive():
                self._answer(parse_accelerator_message(header))
        except WireError as error:
            self._refuse(error)
            raise

    def _answer(self, message: AcceleratorMessage) -> None:
        try:
            if isinstance(message, AcceleratorMultiply):
                self._multiply(message)
            elif isinstance(message, AcceleratorLoad):
                self._load(message)
            elif isinstance(message, AcceleratorHello):
                name = self._device.name.encode("ascii", "replace").decode()[:_NAME_CHARACTERS]
                self._link.send(AcceleratorHello(name, self._device.kernel).to_bytes())
            else:
                raise MalformedMessageError("an accelerator is not asked that")
        except OffloadError as error:
            self._refuse(error)
        except torch.OutOfMemoryError:
            self._refuse(OffloadError("the device is full"))

    def _load(self, message: AcceleratorLoad) -> None:
        w_q = np.empty((message.n_out, message.n_in), dtype="<i2")
        scales = np.empty(message.n_out, dtype="<f4")
        for part in (w_q, scales):
            self._link.read_into(part.reshape(-1).view(np.uint8).data)
        fmt, integers = _FORMATS[message.ring], torch.from_numpy(w_q)  # pyright: ignore[reportUnknownMemberType]
        of_scales = torch.from_numpy(scales)  # pyright: ignore[reportUnknownMemberType]
        found = QuantizedWeight("", fmt, message.weight_bits, integers, of_scales, _NOTHING, _NOTHING, 0.0, 0.0)
        if found.digest() != message.digest:
            raise MalformedMessageError("a weight is not the one that its digest says")
        if message.weight_bits > fmt.MAX_WEIGHT_BITS:
            raise OffloadError(f"weights of {fmt.name} have fewer bits")
        self._weights[message.layer] = self._device.load(fmt, integers)
        self._link.send(AcceleratorAnswer().to_bytes())

    def _multiply(self, message: AcceleratorMultiply) -> None:
        weight, direction = self._weights.get(message.layer), _DIRECTIONS[message.direction]
        found = (message.n_planes, message.n_features)
        if weight is None or found != (weight.format.n_planes, weight.sizes(direction)[0]):
            self._link.skip(message.payload_bytes)
            raise OffloadError("no such layer is loaded")
        answer = AcceleratorAnswer(message.n_tokens, weight.sizes(direction)[1])
        x, y = self._link.room(message.payload_bytes, answer.payload_bytes)
        self._link.pull(x)
        planes = x.view(np.int8).reshape(message.n_planes, message.n_tokens, message.n_features)
        elements = y.view(np.uint32).reshape(answer.n_tokens, answer.n_features)
        self._device.multiply(weight, direction, planes, elements)
        self._link.push(answer.to_bytes(), y)

    def _refuse(self, error: CloisterError) -> None:
        _log.warning("refused: %s", error.cause)
        self._link.send(AcceleratorError.for_error(error).to_bytes())
