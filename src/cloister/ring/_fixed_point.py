"""Activations to integers and back: one scale a token, chosen so that no product with the layer's weight can overflow.

The scale never leaves the enclave: it tells the size of a token. Normative bound: spec/pad.md section 2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from cloister.errors import OffloadError, RingOverflowError
from cloister.ring._formats import MAX_FEATURES

_MARGIN = 1 - 2.0**-30  # see quantize_rows: above every floating-point error of a row of at most 2^17 features


def smallest_limit(n_features: int) -> float:
    """The least norm for which rows can be quantised: twice what rounding alone may add to one, and one unit more.

    Below it, the rounding error of a row could be as large as the row.
    """
    return math.sqrt(n_features) + 1


def norm_limit(max_square: int, modulus: int) -> float:
    """The largest whole L with L * sqrt(`max_square`) < `modulus` / 2, as integers decide it.

    Args:
        max_square: max_o ||w_o||^2 of an integer weight. An all-zero weight counts as 1, so that L stays below m/2.
        modulus: m.
    """
    return float(math.isqrt((modulus * modulus - 1) // (4 * max(max_square, 1))))


def row_room(limit: float, n_features: int, head_room: float = 1.0) -> float:
    """What the norm of a row is divided by to get its scale: T (1 - 2^-30) of `quantize_rows`, where its proof stands.

    Raises:
        OffloadError: head_room is below 1.
        RingOverflowError: `limit` leaves fewer units than rounding takes.
    """
    if not 1 <= head_room < math.inf:
        raise OffloadError(f"a head-room is a finite number of at least 1, not {head_room}")
    if not smallest_limit(n_features) <= limit < math.inf:
        raise RingOverflowError(f"a norm of {limit:.0f} is too small for {n_features} features")
    return (limit * head_room - math.sqrt(n_features) / 2) * _MARGIN


def quantize_rows(
    x: Float[Tensor, "tokens features"], limit: float, *, head_room: float = 1.0
) -> tuple[Int64[Tensor, "tokens features"], Float64[Tensor, " tokens"]]:
    """Each row x as whole numbers x_q and a scale s with x = s * x_q up to s/2 an element, and ||x_q||_2 <= `limit`.

    The bound is exact, for every finite input. With d features, n the row's norm and T = `limit` - sqrt(d)/2:

    - x is read as float32, so n^2 neither overflows nor underflows in float64. All terms are positive, so the computed
      norm is n (1 + e) with |e| <= (d + 3) 2^-53 < 2^-35, since d < 2^17.
    - s is the computed norm / (T (1 - 2^-30)). Each computed x_i / s is at most (1 + 2^-53) times the quotient, so the
      row of quotients has a norm below T (1 - 2^-30) (1 + 2^-33) < T (1 - 2^-31).
    - Rounding moves each element by at most 1/2, hence the norm by at most sqrt(d)/2 (triangle inequality), so
      ||x_q|| < T (1 - 2^-31) + sqrt(d)/2. T is computed within T 2^-51 + 2^-45, and T 2^-31 is more, as T > 1.

    With limit = `QuantizedWeight.forward_limit` no |w_o . x_q| reaches m/2 (Cauchy-Schwarz), so the product centred
    from the ring is the product of the integers.

    Args:
        x: *secret*. Wider types are read as float32.
        limit: the largest norm, in units of the ring; `forward_limit` or `backward_limit` of the weight.
        head_room: for the pad `otp` only: 1 keeps the guarantee, h > 1 lets the norm reach `limit` * h. Overflow is
            then only unlikely, not impossible: an output that adds up d independent terms of like size overflows
            beyond sqrt(d)/h of its standard deviations. The caller must detect it and compute that layer inside.

    Returns:
        x_q and the scale of each token, both *secret*. A row of zeros has the scale 0.

    Raises:
        RingOverflowError: x holds NaN or infinite values (only the number of tokens is told), or `limit` leaves fewer
            units than rounding takes.
        OffloadError: x is not two-dimensional floating point of 1 to 2^17 - 1 features, or head_room is below 1.
    """
    _check_rows(x)
    tokens, features = x.shape
    room = row_room(limit, features, head_room)
    exact = x.detach().to(torch.float32).to(torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise RingOverflowError(f"a batch of {tokens} tokens holds NaN or infinite values")
    norm = exact.square().sum(dim=1).sqrt()
    scale = norm / room
    divisor = torch.where(norm == 0, 1.0, scale)
    return torch.round(exact / divisor.unsqueeze(1)).to(torch.int64), scale


def dequantize(
    y: Int64[Tensor, "tokens out"],
    token_scale: Float64[Tensor, " tokens"],
    channel_scale: Float32[Tensor, " out"] | None = None,
) -> Float32[Tensor, "tokens out"]:
    """y * token_scale * channel_scale, computed in float64 and rounded once. *Secret*: it leaves no enclave.

    Args:
        y: centred product, *secret*.
        token_scale: from `quantize_rows`, *secret*.
        channel_scale: `QuantizedWeight.scales` for forward; nothing for backward, where they were folded in before.

    Returns:
        Within 2^-23 of the real product, relatively; infinite where that does not fit float32, as in the plain layer.

    Raises:
        OffloadError: the shapes do not belong together.
    """
    tokens, out = y.shape
    if token_scale.shape != (tokens,) or (channel_scale is not None and channel_scale.shape != (out,)):
        raise OffloadError(f"the scales do not belong to a product of shape ({tokens}, {out})")
    real = y.to(torch.float64) * token_scale.unsqueeze(1)
    return (real if channel_scale is None else real * channel_scale).to(torch.float32)


def _check_rows(x: Tensor) -> None:
    if not x.dtype.is_floating_point or x.ndim != 2 or not 1 <= x.shape[1] <= MAX_FEATURES:
        raise OffloadError(
            f"rows are floating point [tokens, features] of 1 to {MAX_FEATURES} features, "
            f"not {x.dtype} of shape {tuple(x.shape)}"
        )
