"""One job's masked layers: what goes out is masked, what comes back is checked, and one failed check ends it all.

The steps of a call, and why nothing else may happen, are in spec/pad.md sections 4 to 6.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from cloister.errors import AcceleratorLostError, CloisterError, IntegrityError, OffloadError, RingOverflowError
from cloister.kernels import _native
from cloister.offload._layers import MAX_HEAD_ROOM, DoubleArray, FloatArray, Layer, Side, bias_of, make_layer
from cloister.offload._sources import Sources
from cloister.pad import (
    ASSUMPTIONS,
    LATTICE_PARAMETERS,
    Direction,
    LatticeParameters,
    Pad,
    PadHelper,
    PadKeys,
    PadMode,
    PadPool,
    ProcessBound,
)

if TYPE_CHECKING:
    from cloister.offload._accelerator import Accelerator
    from cloister.ring import QuantizedWeight, RingFormat

_COUNTS = ("forward", "backward", "retries", "overflows")


class OffloadSession(ProcessBound):
    """The layers of one job, their pads and check keys, and the accelerator that multiplies. Thread-safe; close it.

    Every tensor that goes in or comes out is *secret*. The accelerator sees masked planes, weights, shapes and order.

    An answer that fails its check ends the session for good: every pad and check key is destroyed, and every later
    call refuses. So an accelerator that lies even once has one try, which succeeds with probability at most 2^-33
    (`faithful`) or 2^-41 (`fast`), however long the job runs (spec/pad.md section 5).

    Args:
        accelerator: untrusted; from now on the session's, which closes it.
        fmt: the ring of every layer.
        pad: where pads come from.
        helper: the second accelerator of the mode otp-2, untrusted too, and the caller's to close; it must not work
            together with the first.
        lattice: parameters of the mode lattice, else those of the format.
        pool: of pads made ahead, from now on the session's, which closes it; without, each is made when it is needed.
        retries: how often a product is tried again, each time with a fresh pad, when the accelerator is lost.
        bucket: tokens are filled up with rows of zeros to a multiple of this, so that the accelerator sees few lengths.
        head_room: see `ring.quantize_rows`; at most `MAX_HEAD_ROOM`. An overflow is then computed again inside, at the
            price of a delay that the accelerator can see and learn from. With the mode otp only.

    Raises:
        OffloadError: options that cannot be.
    """

    __slots__ = ("_accelerator", "_bucket", "_counts", "_ended", "_format", "_head_room", "_layers", "_lock",
                 "_retries", "_sources")  # fmt: skip

    def __init__(
        self,
        accelerator: Accelerator,
        fmt: RingFormat,
        *,
        pad: PadMode = PadMode.OTP,
        helper: PadHelper | None = None,
        lattice: LatticeParameters | None = None,
        pool: PadPool | None = None,
        retries: int = 2,
        bucket: int = 1,
        head_room: float = 1.0,
    ) -> None:
        super().__init__()
        if retries < 0 or bucket < 1 or not 1 <= head_room <= MAX_HEAD_ROOM:
            raise OffloadError(f"retries {retries}, bucket {bucket} and head-room {head_room} cannot be")
        if head_room > 1 and pad is not PadMode.OTP:
            raise OffloadError("head-room is for the mode otp only: an overflow would be seen, and tells of the data")
        self._accelerator = accelerator
        self._format = fmt
        self._retries = retries
        self._bucket = bucket
        self._head_room = head_room
        if pad is PadMode.LATTICE:
            lattice = lattice or LATTICE_PARAMETERS[fmt.name]
        self._sources = Sources(pad, PadKeys(), pool or PadPool(0), helper, lattice)
        self._layers: dict[str, Layer] = {}
        self._lock = threading.RLock()
        self._ended = ""
        self._counts = dict.fromkeys(_COUNTS, 0)

    def __repr__(self) -> str:
        return f"OffloadSession({self._format.name}, {self._sources.mode.value}, n_layers={len(self._layers)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def format(self) -> RingFormat:
        """The ring of every layer. *Public*."""
        return self._format

    @property
    def pad_mode(self) -> PadMode:
        """Where pads come from. *Public*."""
        return self._sources.mode

    def add(self, layer: str, weight: QuantizedWeight, bias: Float[Tensor, " out"] | None = None) -> None:
        """Take in a layer and give its integers to the accelerator.

        Args:
            layer: its name, *public*.
            weight: *public*; of the session's format.
            bias: *public*; added in here.

        Raises:
            OffloadError: the name is taken, weight or bias do not fit, the accelerator refused, or the session ended.
            AcceleratorLostError: it was lost, and lost again at every retry.
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._lock:
            self._check_open()
            if layer in self._layers:
                raise OffloadError(f"there is a layer {layer} already")
            if weight.format != self._format:
                raise OffloadError(f"layer {layer} is of the format {weight.format.name}, not {self._format.name}")
            weight = replace(weight, layer=layer)
            numbers = None if bias is None else bias_of(weight, bias)
            self._load(layer, weight)  # before there are keys: a name whose keys were destroyed cannot have others
            self._layers[layer] = make_layer(weight, numbers, self._sources.make(weight), self._head_room)

    def forward(self, layer: str, x: Float[Tensor, "*batch in"]) -> Float32[Tensor, "*batch out"]:
        """x W^T + bias, W being the layer's integers times their scales.

        Success means that the integers are exactly those of W_q x_q, but for the probability above. What is left is the
        rounding of x, of at most half of a token's scale an element.

        Args:
            x: *secret*, on the CPU. Wider types than float32 are read as float32.

        Returns:
            *Secret*. With lattice pads, no raw output of a layer may leave the enclave.

        Raises:
            IntegrityError: the accelerator lied. The session has ended, its keys are destroyed.
            AcceleratorLostError: the accelerator was lost, and lost again at every retry.
            RingOverflowError: x holds NaN or infinite values.
            OffloadError: no such layer, x does not fit it, the accelerator cannot be revived, or the session ended.
            PadError: the pads ran out.
        """
        try:
            return self._run(layer, Direction.FORWARD, x)
        except CloisterError as error:
            del x
            raise _bare(error) from None

    def backward(self, layer: str, g: Float[Tensor, "*batch out"]) -> Float32[Tensor, "*batch in"]:
        """g W: the gradient of the layer's input, from that of its output. *Secret*, both; raises as `forward` does."""
        try:
            return self._run(layer, Direction.BACKWARD, g)
        except CloisterError as error:
            del g
            raise _bare(error) from None

    def describe(self) -> dict[str, Any]:
        """What a report says of the session. *Public*, all of it but `overflows`, which the host may only guess."""
        self._stay_home()
        with self._lock:
            sources = [side.source for layer in self._layers.values() for side in layer.sides.values()]
            return {
                "pad": self._sources.mode.value,
                "assumption": ASSUMPTIONS[self._sources.mode],
                "lattice": None if self._sources.lattice is None else self._sources.lattice.name,
                "format": self._format.name,
                "head_room": self._head_room,
                "bucket": self._bucket,
                "layers": {
                    name: {"in": layer.n_features, "out": layer.n_channels, "digest": layer.digest.hex()}
                    for name, layer in self._layers.items()
                },
                "pad_elements": sum(source.n_used for source in sources),
                **self._counts,
                "accelerator": self._accelerator.describe(),
                "ended": self._ended,
            }

    def close(self) -> None:
        """Destroy every key and let the accelerator go. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._lock:
            self._end("it was closed")

    def _run(self, layer: str, direction: Direction, x: Tensor) -> Tensor:
        self._stay_home()
        with self._lock:
            self._check_open()
            found = self._layers.get(layer)
            if found is None:
                raise OffloadError(f"there is no layer {layer}")
            side = found.sides[direction]
            rows = _rows(side, x)
            out = torch.empty((*x.shape[:-1], side.n_out))
            if len(rows):
                self._counts[direction.value] += 1
                self._product(side, rows, out.view(-1, side.n_out).numpy())
            return out

    def _product(self, side: Side, x: Float32[FloatArray, "tokens in"], y: Float32[FloatArray, "tokens out"]) -> None:
        """Each attempt takes a pad of its own, zeroed whatever happens; nothing of one serves another."""
        n_lost = 0
        while True:
            pad: Pad | None = None
            try:
                ticket = side.source.take(-(-len(x) // self._bucket) * self._bucket)
                pad = ticket.use(ticket.shape)
                self._exchange(side, x, y, pad)
                return
            except AcceleratorLostError:
                n_lost += 1
                if n_lost > self._retries:
                    raise
                self._counts["retries"] += 1
                if pad is not None:  # else it was the helper of otp-2, which comes back by itself
                    self._accelerator.revive()
            finally:
                if pad is not None:
                    pad.wipe()

    def _exchange(self, side: Side, x: FloatArray, y: FloatArray, pad: Pad) -> None:
        """One message: mask, multiply, unmask and check."""
        n, check, code = len(x), side.source.check, self._format.CODE
        filled = _fill(x, pad.r.shape[1])
        scales, sums = np.empty(len(filled), np.float64), np.empty(len(filled), np.uint64)
        with self._accelerator.call(side.layer, side.direction, len(filled)) as call:
            if not _native.mask(filled, side.fold, side.room, pad.r, code, check.v, call.planes, scales, sums):
                raise RingOverflowError(f"{side}: the input holds NaN or infinite values")
            answer = call.multiply()
            sums += pad.correction
            passed = False
            try:
                # Of the bucket's rows of zeros nothing is read, so nothing of them is checked.
                passed = answer.shape == (len(filled), side.n_out) and _native.unmask(
                    answer[:n], pad.u[:n], code, scales[:n], side.channel, side.bias, check.rho, sums[:n], y
                )
                passed = passed or self._has_overflowed(side, x, scales[:n], y)
            finally:  # whatever comes in between: there is one check that fails, and no second one
                if not passed:
                    self._end("an answer failed its check")
        if not passed:
            raise IntegrityError(
                f"{side}: the accelerator's answer is not the product",
                hint="the step was not applied and every key is destroyed; start again on another accelerator",
            )
        self._check_open()  # closed meanwhile, by a signal handler, the check had no words to check with

    def _has_overflowed(self, side: Side, x: FloatArray, scales: DoubleArray, y: FloatArray) -> bool:
        """Whether an honest answer would have failed too, as only head-room allows; `y` is then computed here."""
        if side.w_q is None:
            return False
        exact, half = side.recompute(side.w_q, x, scales), self._format.modulus // 2
        if bool(((exact <= half) & (exact > -half)).all()):
            return False
        self._counts["overflows"] += 1
        y[:] = side.real(exact, scales)
        return True

    def _load(self, layer: str, weight: QuantizedWeight) -> None:
        n_lost = 0
        while True:
            try:
                self._accelerator.load(layer, weight)
                return
            except AcceleratorLostError:
                n_lost += 1
                if n_lost > self._retries:
                    raise
                self._counts["retries"] += 1
                self._accelerator.revive()

    def _check_open(self) -> None:
        if self._ended:
            raise OffloadError(f"the offload session has ended: {self._ended}")

    def _end(self, why: str) -> None:
        """Destroy every key and let the accelerator go. The first reason stays."""
        self._ended = self._ended or why
        with ExitStack() as all_of_them:  # each, whatever becomes of the others; the last one goes first
            all_of_them.callback(self._accelerator.close)
            all_of_them.callback(self._sources.close)
            for layer in self._layers.values():
                for side in layer.sides.values():
                    all_of_them.callback(side.source.close)


def _bare(error: CloisterError) -> CloisterError:
    """Without the frames that it came through, and without what it came from: their locals are secret."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _rows(side: Side, x: Tensor) -> Float32[FloatArray, "tokens in"]:
    """`x` as the kernels take it: the same memory where it is float32 and contiguous."""
    if not x.dtype.is_floating_point or x.device.type != "cpu" or x.ndim < 1 or x.shape[-1] != side.n_in:
        raise OffloadError(
            f"{side} takes floating point of {side.n_in} features on the CPU, not {x.dtype} of {tuple(x.shape)} "
            f"on {x.device}"
        )
    return x.detach().to(torch.float32).reshape(-1, side.n_in).contiguous().numpy()


def _fill(x: Float32[FloatArray, "tokens in"], n: int) -> Float32[FloatArray, "filled in"]:
    """`x` with rows of zeros after it, so that there are `n`."""
    return x if len(x) == n else np.concatenate((x, np.zeros((n - len(x), x.shape[1]), np.float32)))
