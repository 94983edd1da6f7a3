"""The enclave's side of an accelerator: what it was given, what it is asked, and how it is had again after a loss.

Nothing secret comes here: planes and answers are *masked*, weights are *public*. No byte of the other side is believed
but the elements of an answer, and those are for the caller to check.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np
from jaxtyping import Int8, UInt32

from cloister.errors import AcceleratorLostError, OffloadError, WireError
from cloister.offload._transport import Bytes, Link
from cloister.pad import Direction
from cloister.wire import (
    AcceleratorAnswer,
    AcceleratorError,
    AcceleratorHello,
    AcceleratorLoad,
    AcceleratorMessage,
    AcceleratorMultiply,
    parse_accelerator_message,
)

if TYPE_CHECKING:
    from cloister.ring import QuantizedWeight

_DIRECTION_CODE = {Direction.FORWARD: 0, Direction.BACKWARD: 1}


@dataclass(frozen=True)
class Timeouts:
    """How long the enclave waits, in seconds.

    Attributes:
        answer_s: for a product; longer is a stall. Sending and computing each may take as long.
        load_s: for a layer to be taken in.
        start_s: for the accelerator to be there at first, and again in `revive`.
    """

    answer_s: float = 60.0
    load_s: float = 600.0
    start_s: float = 120.0


@dataclass(frozen=True)
class _Layer:
    """A layer as both sides know it: the header of its load, with its number, and the weight to load again."""

    header: AcceleratorLoad
    n_planes: int
    weight: QuantizedWeight = field(repr=False)

    def sizes(self, direction: Direction) -> tuple[int, int]:
        """Features in and out."""
        found = (self.header.n_in, self.header.n_out)
        return found if direction is Direction.FORWARD else (found[1], found[0])


class ConnectedAccelerator(ABC):
    """What is common to accelerators behind a connection; an `Accelerator`. For one thread at a time.

    Args:
        timeouts: how long to wait for what.
    """

    def __init__(self, timeouts: Timeouts | None = None) -> None:
        self._timeouts = timeouts or Timeouts()
        self._layers: dict[str, _Layer] = {}
        self._link: Link | None = None
        self._hello = AcceleratorHello()
        self._n_calls = self._n_restarts = self._bytes_out = self._bytes_in = 0
        self._call: _Call | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        """See `Accelerator.load`. The weight is kept, for `revive`."""
        known = self._layers.get(layer)
        number = known.header.layer if known is not None else len(self._layers)
        n_out, n_in = weight.w_q.shape
        try:
            header = AcceleratorLoad(number, weight.format.CODE, weight.weight_bits, n_out, n_in, weight.digest())
        except WireError as error:
            raise OffloadError(f"layer {layer} does not fit the accelerator's protocol: {error.cause}") from None
        self._layers[layer] = _Layer(header, weight.format.n_planes, weight)
        try:
            self._send_layer(self._layers[layer])
        except AcceleratorLostError:
            raise
        except OffloadError:
            self._forget(layer, known)
            raise

    def call(self, layer: str, direction: Direction, n_tokens: int) -> _Call:
        """See `Accelerator.call`."""
        link, known = self._connected(), self._layers.get(layer)
        if known is None:
            raise OffloadError(f"layer {layer} was never loaded")
        if self._call is not None:
            raise OffloadError("another call of this accelerator is open")
        n_in, n_out = known.sizes(direction)
        try:
            ask = AcceleratorMultiply(known.header.layer, _DIRECTION_CODE[direction], known.n_planes, n_tokens, n_in)
            answer = AcceleratorAnswer(n_tokens, n_out)
        except WireError as error:
            raise OffloadError(f"layer {layer}: {n_tokens} tokens at once do not go: {error.cause}") from None
        x, y = link.room(ask.payload_bytes, answer.payload_bytes)
        self._call = _Call(
            x.view(np.int8).reshape(ask.n_planes, n_tokens, n_in),
            y.view(np.uint32).reshape(n_tokens, n_out),
            lambda: self._multiply(ask, answer, x, y),
            self._end,
        )
        return self._call

    def revive(self) -> None:
        """See `Accelerator.revive`."""
        if self._closed:
            raise OffloadError("the accelerator was closed")
        self._drop()
        self._n_restarts += 1
        try:
            self._open()
            for layer in self._layers.values():
                self._send_layer(layer)
        except AcceleratorLostError as error:
            raise OffloadError(f"the accelerator does not come back: {error.cause}", hint=error.hint) from None

    def close(self) -> None:
        """See `Accelerator.close`."""
        self._closed = True
        self._drop()

    def describe(self) -> dict[str, object]:
        """See `Accelerator.describe`."""
        return {
            "device": self._hello.device,
            "kernel": self._hello.kernel,
            "bytes_out": self._bytes_out,
            "bytes_in": self._bytes_in,
            "calls": self._n_calls,
            "restarts": self._n_restarts,
        }

    @abstractmethod
    def _connect(self) -> Link:
        """A new connection.

        Raises:
            OSError: there is none to be had.
            OffloadError: likewise, with a better word for it.
        """

    def _open(self) -> None:
        """Connect, and learn what it is. Raises AcceleratorLostError or OffloadError."""
        try:
            self._link = self._connect()
        except OSError as error:
            raise AcceleratorLostError(f"the accelerator cannot be reached: {error.strerror or error}") from None
        self._link.timeout_s = self._timeouts.start_s
        try:
            answer = self._ask(self._link, AcceleratorHello())
        except OffloadError:
            self._drop()
            raise
        if not isinstance(answer, AcceleratorHello):
            self._lose("did not say what it is")
        self._hello = answer

    def _forget(self, layer: str, before: _Layer | None) -> None:
        if before is None:
            del self._layers[layer]
        else:
            self._layers[layer] = before

    def _send_layer(self, layer: _Layer) -> None:
        link = self._connected()
        link.timeout_s = self._timeouts.load_s
        w_q = layer.weight.w_q.cpu().contiguous().numpy().astype("<i2", copy=False)
        scales = layer.weight.scales.cpu().contiguous().numpy().astype("<f4", copy=False)
        if self._ask(link, layer.header, _bytes_of(w_q), _bytes_of(scales)) != AcceleratorAnswer():
            self._lose("answered a load with something else")
        self._bytes_out += layer.header.payload_bytes

    def _multiply(self, ask: AcceleratorMultiply, answer: AcceleratorAnswer, x: Bytes, y: Bytes) -> None:
        link = self._connected()
        link.timeout_s = self._timeouts.answer_s
        if self._ask(link, ask, place=x) != answer:
            self._lose("answered with a tensor of another size")
        try:
            link.pull(y)
        except OSError as error:
            self._lose_connection(error)
        except BaseException:
            self._drop()
            raise
        self._n_calls += 1
        self._bytes_out += ask.payload_bytes
        self._bytes_in += answer.payload_bytes

    def _ask(
        self, link: Link, message: AcceleratorMessage, *payload: memoryview, place: Bytes | None = None
    ) -> AcceleratorMessage:
        """One message and its answer. Whatever comes between ends the connection: what is on it is for nobody else."""
        try:
            return self._exchange(link, message, *payload, place=place)
        except OffloadError:
            raise  # it has said itself whether the connection goes on
        except BaseException:
            self._drop()
            raise

    def _exchange(
        self, link: Link, message: AcceleratorMessage, *payload: memoryview, place: Bytes | None = None
    ) -> AcceleratorMessage:
        try:
            if place is None:
                link.send(message.to_bytes(), *payload)
            else:
                link.push(message.to_bytes(), place)
            header = link.receive()
        except OSError as error:
            self._lose_connection(error)
        if not header:
            self._lose("died or hung up")
        try:
            answer = parse_accelerator_message(header)
        except WireError as error:
            self._lose(f"does not speak the protocol: {error.cause}")
        if isinstance(answer, AcceleratorError):
            raise OffloadError(f"the accelerator refused, and gave the code {answer.error_code}", hint=self._hint())
        return answer

    def _hint(self) -> str:
        return "its own log says why"

    def _connected(self) -> Link:
        if self._closed:
            raise OffloadError("the accelerator was closed")
        if self._link is None:
            raise AcceleratorLostError("the accelerator was lost", hint="revive it")
        return self._link

    def _lose_connection(self, error: OSError) -> NoReturn:
        self._lose("did not answer in time" if isinstance(error, TimeoutError) else "died or hung up")

    def _lose(self, what: str) -> NoReturn:
        self._drop()
        raise AcceleratorLostError(f"the accelerator {what}")

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _end(self, call: _Call) -> None:
        if self._call is call:
            self._call = None


class _Call:
    """See `AcceleratorCall`; its own context manager."""

    def __init__(
        self,
        planes: Int8[np.ndarray, "planes tokens in"],
        answer: UInt32[np.ndarray, "tokens out"],
        multiply: Callable[[], None],
        end: Callable[[_Call], None],
    ) -> None:
        self.planes = planes
        self._answer = answer
        self._multiply = multiply
        self._end = end
        self._is_spent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._is_spent = True
        self._end(self)

    def multiply(self) -> UInt32[np.ndarray, "tokens out"]:
        """See `AcceleratorCall.multiply`."""
        if self._is_spent:
            raise OffloadError("a call multiplies once")
        self._is_spent = True
        self._multiply()
        return self._answer


def _bytes_of(whole: np.ndarray) -> memoryview:
    return whole.reshape(-1).view(np.uint8).data
