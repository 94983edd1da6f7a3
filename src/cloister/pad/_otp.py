"""One-time pads of a stream, with u = W_q r from inside (`otp`) or from a second accelerator (`otp-2`); spec/pad.md."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Int8, UInt8, UInt32

from cloister.errors import PadError
from cloister.kernels import _native
from cloister.pad._check import CheckKeys
from cloister.pad._expand import ByteArray
from cloister.pad._ledger import PadTicket
from cloister.pad._modes import Direction, PadMode
from cloister.pad._pool import PadPool
from cloister.pad._source import ElementArray, Pad, PadSource
from cloister.pad._stream import PadRange, PadStream

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from cloister.ring import QuantizedWeight, RingFormat

    WholeArray = npt.NDArray[np.int32]

_TILE_ELEMENTS = 1 << 22  # of u at a time: its accumulators are then at most 64 MiB
_MIN_TILE_TOKENS = 256  # fewer, and packing the weight at each product costs more than memory does
_kept = threading.local()


class PadHelper(Protocol):
    """A second accelerator, which sees pads and no masked tensor; what it returns is trusted for nothing.

    It must not work together with the first one: who has what both see has the features. Thread-safe.
    """

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        """Give it the integers of a layer, *public*; the same layer again replaces it.

        Raises:
            AcceleratorLostError: it could not be reached, or did not answer in time.
            OffloadError: it refused.
        """
        ...

    def multiply(
        self, layer: str, direction: Direction, ranges: Sequence[PadRange], n_tokens: int
    ) -> UInt32[np.ndarray, "tokens out"]:
        """u = W_q r for the pad r that `ranges` make in this order, row by row; *secret*.

        Any uint32 at all may come back: the check of the accelerator's answer finds out. The array is the caller's.

        Raises:
            AcceleratorLostError: it could not be reached or did not answer in time; to be tried again with a fresh pad.
            OffloadError: it refused.
        """
        ...


class _StreamPads(PadSource):
    """What `otp` and `otp-2` share: pads of a stream, made through a pool.

    Args:
        stream: of this layer and direction; from now on the source's, which retires it.
        weight: *public*.
        direction: *public*, that of the stream.
        check: *secret*, of this layer and direction.
        pool: shared by the sources of a session.

    Raises:
        PadError: `check` is of another shape.
    """

    __slots__ = ("_format", "_pool", "_stream")

    def __init__(
        self, stream: PadStream, weight: QuantizedWeight, direction: Direction, check: CheckKeys, pool: PadPool
    ) -> None:
        is_forward = direction is Direction.FORWARD
        super().__init__(check, weight.forward_limit if is_forward else weight.backward_limit)
        if (check.n_out, check.n_in) != tuple(weight.w_q.shape if is_forward else weight.w_q.T.shape):
            raise PadError(f"the keys of the check are not of the layer {weight.layer}, {direction}")
        self._format = weight.format
        self._pool = pool
        self._stream = stream

    @property
    def n_used(self) -> int:
        """See `PadSource.n_used`."""
        return self._stream.ledger.n_taken

    def take(self, n_tokens: int) -> PadTicket[Pad]:
        """See `PadSource.take`."""
        self._stream.ledger.check()
        if n_tokens < 1:
            raise PadError("a pad has at least one token")
        return self._pool.take(self, n_tokens)

    def close(self) -> None:
        """See `PadSource.close`."""
        self._stay_home()
        self._stream.retire()
        self._pool.drop(self)
        self.check.wipe()

    def pad_bytes(self, n_tokens: int) -> int:
        """See `PadMaker.pad_bytes`."""
        return n_tokens * (self._format.n_planes * self.check.n_in + 4 * self.check.n_out + 8)

    @abstractmethod
    def make(self, n_tokens: int) -> Pad:
        """See `PadMaker.make`. For the pool; others `take`."""

    def _pad(self, start: int, r: UInt8[ByteArray, "planes tokens in"], u: UInt32[ElementArray, "tokens out"]) -> Pad:
        return Pad(start, r, u, np.zeros(len(u), np.uint64))


class OtpPads(_StreamPads):
    """The mode `otp`: u is computed inside the enclave, by the same product that the accelerator computes.

    Args:
        stream, weight, direction, check, pool: see above.
        planes: *public*, `weight.forward_planes()`; one copy serves both directions.
    """

    __slots__ = ("_planes",)

    mode = PadMode.OTP

    def __init__(
        self,
        stream: PadStream,
        weight: QuantizedWeight,
        direction: Direction,
        check: CheckKeys,
        *,
        pool: PadPool,
        planes: Int8[Tensor, "weight_planes channels features"],
    ) -> None:
        super().__init__(stream, weight, direction, check, pool)
        self._planes = planes if direction is Direction.FORWARD else planes.transpose(1, 2)

    def make(self, n_tokens: int) -> Pad:
        """See `PadMaker.make`."""
        shape = (n_tokens, self.check.n_in)
        ticket = self._stream.draw(shape, self._format.pad_moduli)
        r = ticket.use(shape)
        try:
            return self._pad(ticket.start, r, multiply_pad(r, self._planes, self._format))
        except BaseException:
            r.fill(0)
            raise


class Otp2Pads(_StreamPads):
    """The mode `otp-2`: u comes from a second accelerator, which gets the keys of the pads' blocks.

    A key tells it every pad of its block, 2^16 positions, of which this stream gives all to the helper and none to
    anyone else.

    Args:
        stream, weight, direction, check, pool: see above.
        helper: has loaded `weight` as `weight.layer`.
    """

    __slots__ = ("_direction", "_helper", "_layer")

    mode = PadMode.OTP2

    def __init__(
        self,
        stream: PadStream,
        weight: QuantizedWeight,
        direction: Direction,
        check: CheckKeys,
        *,
        pool: PadPool,
        helper: PadHelper,
    ) -> None:
        super().__init__(stream, weight, direction, check, pool)
        self._direction = direction
        self._helper = helper
        self._layer = weight.layer

    def make(self, n_tokens: int) -> Pad:
        """See `PadMaker.make`."""
        shape = (n_tokens, self.check.n_in)
        ticket = self._stream.draw_shared(shape, self._format.pad_moduli)
        r, ranges = ticket.use(shape)
        try:
            u = self._helper.multiply(self._layer, self._direction, ranges, n_tokens)
            if u.shape != (n_tokens, self.check.n_out) or u.dtype != np.uint32 or not u.flags.writeable:
                raise PadError(f"the pad helper's answer for the layer {self._layer} is of another form")
            return self._pad(ticket.start, r, np.ascontiguousarray(u))
        except BaseException:
            r.fill(0)
            raise


def multiply_pad(
    r: UInt8[ByteArray, "planes tokens in"], weight_planes: Int8[Tensor, "weight_planes out in"], fmt: RingFormat
) -> UInt32[ElementArray, "tokens out"]:
    """u = W r as elements in [0, m), exact in the ring. *Secret*, as the pad is; all that lies between is zeroed.

    Args:
        r: *secret*, C-contiguous, of `fmt.pad_moduli`.
        weight_planes: *public*; a transposed view for backward.
        fmt: the ring.
    """
    import torch

    from cloister import ring

    n_planes, n_tokens, _ = r.shape
    n_out = weight_planes.shape[1]
    u = np.empty((n_tokens, n_out), np.uint32)
    tile = max(_MIN_TILE_TOKENS, _TILE_ELEMENTS // n_out)
    for start in range(0, n_tokens, tile):
        part = r[:, start : start + tile].copy()
        encoded = np.empty(part.shape, np.int8)
        found = _scratch(n_planes, part.shape[1], n_out)
        try:
            _native.encode_pad(part.reshape(n_planes, -1), fmt.CODE, encoded.reshape(n_planes, -1))
            x, out = torch.from_numpy(encoded), torch.from_numpy(found)  # pyright: ignore[reportUnknownMemberType]
            ring.product(x, weight_planes, fmt, out=out)
            _native.combine(found.reshape(n_planes, -1), fmt.CODE, u[start : start + tile].reshape(-1))
        finally:
            for array in (part, encoded, found):
                array.fill(0)
    return u


def _scratch(*shape: int) -> WholeArray:
    """Memory for accumulators, which each thread keeps: pages that were never touched cost 12 % of a product."""
    size = shape[0] * shape[1] * shape[2]
    words: WholeArray | None = getattr(_kept, "words", None)
    if words is None or words.size < size:
        words = _kept.words = np.empty(size, np.int32)
    return words[:size].reshape(shape)
