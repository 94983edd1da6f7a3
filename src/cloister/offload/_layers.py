"""What a session knows of one layer: for each direction its pads and the numbers that mask and unmask need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Float64, Int16

from cloister.errors import OffloadError
from cloister.pad import Direction, PadSource

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from cloister.ring import QuantizedWeight

    FloatArray = npt.NDArray[np.float32]
    DoubleArray = npt.NDArray[np.float64]
    WeightArray = npt.NDArray[np.int16]
else:
    FloatArray = DoubleArray = WeightArray = np.ndarray

MAX_HEAD_ROOM = 1024.0
"""More would be of no use to any layer, and with this much the true products still fit binary64."""

_MAX_NORM = 2.0**31 - 1


@dataclass(frozen=True, eq=False, slots=True)
class Side:
    """One layer in one direction. `in` and `out` are those of the direction.

    Attributes:
        layer: its name.
        direction: forward multiplies by W_q, backward by its transpose.
        source: its pads, and the keys that its answers are checked with; *secret*.
        n_in: features of what goes in.
        n_out: features of what comes out.
        room: what a row's norm is divided by to get its scale (spec/pad.md section 2.2).
        fold: multiplied into what goes in: the channels' scales for backward.
        channel: multiplied into what comes out: the channels' scales for forward.
        bias: added to what comes out of forward; *public*.
        w_q: [out, in] of the layer, kept only where an overflow may have to be computed again inside.
    """

    layer: str
    direction: Direction
    source: PadSource = field(repr=False)
    n_in: int
    n_out: int
    room: float
    fold: Float32[FloatArray, " in"] | None = field(repr=False)
    channel: Float32[FloatArray, " out"] | None = field(repr=False)
    bias: Float32[FloatArray, " out"] | None = field(repr=False)
    w_q: Int16[WeightArray, "out in"] | None = field(repr=False)

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.direction.value}"

    def recompute(
        self,
        w_q: Int16[WeightArray, "channels features"],
        x: Float32[FloatArray, "tokens in"],
        scales: Float64[DoubleArray, " tokens"],
    ) -> Float64[DoubleArray, "tokens out"]:
        """W_q x_q over the integers, as binary64 and exact: what an honest accelerator would have returned mod m.

        With h of head-room every partial sum of every output is at most ||w_o|| ||x_q|| <= h m/2 (Cauchy-Schwarz over
        the terms that it has), at most 2^42, so no step of the product rounds, in whatever order it adds.

        Args:
            w_q: the layer's integers.
            x: *secret*, what was masked, before `fold`.
            scales: *secret*, the tokens' scales that it was quantised with.
        """
        folded = x if self.fold is None else x * self.fold
        x_q = np.rint(folded.astype(np.float64) / np.where(scales == 0, 1.0, scales)[:, None])
        wide = w_q.astype(np.float64)
        return x_q @ (wide.T if self.direction is Direction.FORWARD else wide)

    def real(
        self, y: Float64[DoubleArray, "tokens out"], scales: Float64[DoubleArray, " tokens"]
    ) -> Float32[FloatArray, "tokens out"]:
        """The integers of `recompute` as what `_native.unmask` would have given for them. *Secret*."""
        found = y * scales[:, None]
        if self.channel is not None:
            found *= self.channel
        out = found.astype(np.float32)
        if self.bias is not None:
            out += self.bias
        return out


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """A layer that a session runs, and what its report says of it.

    Attributes:
        n_features: inputs of forward.
        n_channels: outputs of forward.
        digest: of its integers and scales (spec/pad.md section 2.3).
        sides: by direction.
    """

    n_features: int
    n_channels: int
    digest: bytes
    sides: dict[Direction, Side] = field(repr=False)


def make_layer(
    weight: QuantizedWeight,
    bias: Float32[FloatArray, " out"] | None,
    sources: Mapping[Direction, PadSource],
    head_room: float,
) -> Layer:
    """A layer of the name `weight.layer`, from its bias and pad sources."""
    n_channels, n_features = weight.w_q.shape
    scales = np.ascontiguousarray(weight.scales.cpu().numpy())
    kept = weight.w_q.cpu().numpy() if head_room > 1 else None
    sides: dict[Direction, Side] = {}
    for direction, source in sources.items():
        forward = direction is Direction.FORWARD
        n_in, n_out = (n_features, n_channels) if forward else (n_channels, n_features)
        sides[direction] = Side(
            layer=weight.layer,
            direction=direction,
            source=source,
            n_in=n_in,
            n_out=n_out,
            room=_room(source.input_limit, n_in, head_room),
            fold=None if forward else scales,
            channel=scales if forward else None,
            bias=bias if forward else None,
            w_q=kept,
        )
    return Layer(n_features, n_channels, weight.digest(), sides)


def _room(limit: float, n_in: int, head_room: float) -> float:
    """`ring.row_room`, with no more head-room than keeps every number of x_q within the kernels' 32 bits."""
    from cloister.ring import row_room

    return row_room(limit, n_in, max(1.0, min(head_room, _MAX_NORM / limit)))


def bias_of(weight: QuantizedWeight, bias: Tensor) -> Float32[FloatArray, " out"]:
    """A layer's bias, *public*; a copy, as the module's own may change or go.

    Raises:
        OffloadError: not one finite number for each channel.
    """
    numbers = np.array(bias.detach().cpu().float().numpy())
    n_channels = len(weight.w_q)
    if numbers.shape != (n_channels,) or not np.isfinite(numbers).all():
        raise OffloadError(f"layer {weight.layer}: a bias is {n_channels} finite numbers")
    return numbers
