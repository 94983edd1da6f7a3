"""A frozen weight as integers, one scale an output channel, with the norms that bound its products and its digest.

Enclave and accelerator must hold the same integers and scales: their digest is part of the measured configuration
(spec/pad.md section 2). A frozen weight is *public*.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float32, Float64, Int8, Int16
from torch import Tensor

from cloister.errors import OffloadError, RingOverflowError
from cloister.ring._fixed_point import norm_limit, smallest_limit
from cloister.ring._formats import MAX_FEATURES, RingFormat

_LABEL = b"cloister-ring-weight/v1"
_MIN_BITS = 2
_BLOCK_ROWS = 1024  # rows at a time, so that temporaries stay small beside the weight
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it, float32 has fewer digits and some devices flush to zero


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """W = scales * w_q up to half a unit, for one ring format. All *public*. Made by `quantize_weight`.

    Attributes:
        layer: its name, for errors; not part of the digest, since tied layers share a weight.
        format: the ring of its products.
        weight_bits: signed bits of `w_q`: |w_q| <= 2^(weight_bits - 1) - 1.
        w_q: the integers; serve forward and backward.
        scales: one an output channel, *s_o*; 0 for a channel of zeros.
        row_norms: ||w_o||_2 of the integers of each output channel, for forward.
        column_norms: ||w_i||_2 of the integers of each input feature, for backward.
        forward_limit: the norm that a row x_q may have, so that every |w_o . x_q| < m/2; for `quantize_rows`.
        backward_limit: the same of a row of folded gradients.
    """

    layer: str
    format: RingFormat
    weight_bits: int
    w_q: Int16[Tensor, "out features"] = field(repr=False)
    scales: Float32[Tensor, " out"] = field(repr=False)
    row_norms: Float64[Tensor, " out"] = field(repr=False)
    column_norms: Float64[Tensor, " features"] = field(repr=False)
    forward_limit: float
    backward_limit: float

    def forward_planes(self) -> Int8[Tensor, "weight_planes out features"]:
        """What the accelerator multiplies by for y = x W^T. Made anew at each call: the accelerator keeps them."""
        return self.format.encode_weight(self.w_q)

    def backward_planes(self) -> Int8[Tensor, "weight_planes features out"]:
        """What the accelerator multiplies by for dx = g W: a transposed view of the forward planes, made anew.

        An accelerator that does both directions takes `forward_planes().transpose(1, 2)` and holds one copy.
        """
        return self.forward_planes().transpose(1, 2)

    def fold(self, gradient: Float[Tensor, "tokens out"]) -> Float32[Tensor, "tokens out"]:
        """gradient * scales in float32, which is what backward quantises and multiplies by `w_q`. *Secret*.

        Raises:
            OffloadError: the gradient is of another width.
        """
        if gradient.shape[-1] != len(self.scales):
            raise OffloadError(f"layer {self.layer}: a gradient has {len(self.scales)} channels")
        return gradient.to(torch.float32) * self.scales

    def digest(self) -> bytes:
        """SHA-384 over label, format, bits, shape, integers and scales, each preceded by its length (spec/pad.md 2.3).

        Success of a comparison means that both sides multiply by the same integers and mean the same numbers by them.
        """
        whole = hashlib.sha384()
        w_q = self.w_q.cpu().contiguous().numpy().astype("<i2", copy=False)
        scales = self.scales.cpu().contiguous().numpy().astype("<f4", copy=False)
        sizes = (_u64(self.weight_bits), *(_u64(size) for size in self.w_q.shape))
        for part in (_LABEL, self.format.name.encode(), *sizes, w_q.data, scales.data):
            view = memoryview(part)
            whole.update(_u64(view.nbytes))
            whole.update(view)
        return whole.digest()


def quantize_weight(
    weight: Float[Tensor, "out features"], fmt: RingFormat, *, layer: str, weight_bits: int | None = None
) -> QuantizedWeight:
    """A frozen weight as integers of `weight_bits` signed bits. Deterministic: the same bits on every machine.

    Args:
        weight: as `torch.nn.Linear` has it, *public*; wider types are read as float32.
        fmt: `FAITHFUL` or `FAST`.
        layer: its name, for errors.
        weight_bits: others than the format's, 2 to its `MAX_WEIGHT_BITS`. With more, activations get fewer.

    Raises:
        RingOverflowError: the weight holds NaN or infinite values, or leaves no room for activations in the ring.
        OffloadError: not two-dimensional floating point, a side of 0 or above 2^17 - 1, or such bits.
    """
    bits = fmt.weight_bits if weight_bits is None else weight_bits
    _check_weight(weight, fmt, layer, bits)
    w_q, scales = _round_rows(weight.detach(), bits)
    if not bool(torch.isfinite(scales).all()):
        raise RingOverflowError(f"layer {layer}: the weight holds NaN or infinite values")
    rows, columns = _squares(w_q)
    limits: list[float] = []
    for squares, n_features in ((rows, w_q.shape[1]), (columns, w_q.shape[0])):
        limits.append(norm_limit(int(squares.max()), fmt.modulus))
        if limits[-1] < smallest_limit(n_features):
            raise RingOverflowError(
                f"layer {layer}: its rows are too long for the format {fmt.name}",
                hint="use the format faithful, or split the layer",
            )
    norms = (rows.to(torch.float64).sqrt(), columns.to(torch.float64).sqrt())
    return QuantizedWeight(layer, fmt, bits, w_q, scales, *norms, *limits)


def _check_weight(weight: Tensor, fmt: RingFormat, layer: str, bits: int) -> None:
    if not weight.dtype.is_floating_point or weight.ndim != 2:
        raise OffloadError(f"layer {layer}: a weight is floating point [out, in], not {weight.dtype}, {weight.ndim}-D")
    if not 1 <= min(weight.shape) <= max(weight.shape) <= MAX_FEATURES:
        raise OffloadError(
            f"layer {layer}: a weight has 1 to {MAX_FEATURES} rows and columns, not {tuple(weight.shape)}",
            hint="split a wider layer into several",
        )
    if not _MIN_BITS <= bits <= fmt.MAX_WEIGHT_BITS:
        raise OffloadError(
            f"layer {layer}: weights of {fmt.name} have {_MIN_BITS} to {fmt.MAX_WEIGHT_BITS} bits, not {bits}"
        )


def _round_rows(weight: Tensor, bits: int) -> tuple[Int16[Tensor, "out features"], Float32[Tensor, " out"]]:
    """Integers and scales in binary32 arithmetic. A channel with NaN or infinite values has such a scale."""
    top = 2 ** (bits - 1) - 1
    w_q = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), _BLOCK_ROWS):
        block = weight[start : start + _BLOCK_ROWS].to(torch.float32)
        scale = block.abs().amax(dim=1) / top
        scale = torch.where(scale < _SMALLEST_SCALE, 0.0, scale)
        whole = torch.round(block / scale.unsqueeze(1))  # at most top: two roundings move top by far less than 1/2
        w_q[start : start + _BLOCK_ROWS] = torch.where(scale.unsqueeze(1) > 0, whole, 0.0).nan_to_num(0.0)
        scales[start : start + _BLOCK_ROWS] = scale
    return w_q, scales


def _squares(w_q: Int16[Tensor, "out features"]) -> tuple[Tensor, Tensor]:
    """Exact squared norms of rows and columns, int64: at most 2^17 times 2^30."""
    rows = torch.empty(len(w_q), dtype=torch.int64, device=w_q.device)
    columns = torch.zeros(w_q.shape[1], dtype=torch.int64, device=w_q.device)
    for start in range(0, len(w_q), _BLOCK_ROWS):
        block = w_q[start : start + _BLOCK_ROWS].to(torch.int32).square()
        rows[start : start + _BLOCK_ROWS] = block.sum(dim=1, dtype=torch.int64)
        columns += block.sum(dim=0, dtype=torch.int64)
    return rows, columns


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "big")
