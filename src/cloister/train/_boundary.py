"""The boundary tensor's form on its way to the server enclave: per-token int8, bf16 or fp32.

int8 is symmetric per token: `scale = absmax / 127`, `value = round_half_even(x / scale)`, `x' = value * scale`. Hence
`|x - x'| <= scale / 2`, up to two float32 roundings (a relative 2**-22 of absmax). A row whose absmax is below
127 * 2**-126, where a scale would no longer be a normal float32, becomes a row of zeros with scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from cloister.errors import ConfigError, DataError

Boundary = Literal["int8", "bf16", "fp32"]

BOUNDARIES: tuple[Boundary, ...] = ("int8", "bf16", "fp32")
"""From small to exact."""

INT8_MAX = 127
# The smallest normal float32 times 127: below this absmax a scale would be subnormal, and x / scale could leave int8.
_SMALLEST_ABSMAX = torch.finfo(torch.float32).tiny * INT8_MAX
# Above it, rounding to bfloat16 or multiplying a scale by 127 again can give infinity.
_LARGEST_ABSMAX = 2.0**127
_DTYPE_OF: dict[str, torch.dtype] = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
_BOUNDARY_OF: dict[torch.dtype, Boundary] = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class BoundaryBlock:
    """Boundary tensors of N tokens as they cross. *secret*: the client's host and the server enclave.

    Attributes:
        values: [N, H] int8, bfloat16 or float32.
        scales: [N] float32, int8 only; every one positive and finite, or 0 for a row of zeros.
    """

    values: torch.Tensor = field(repr=False)
    scales: torch.Tensor | None = field(default=None, repr=False)

    @property
    def boundary(self) -> Boundary:
        return _BOUNDARY_OF[self.values.dtype]

    @property
    def n_tokens(self) -> int:
        return int(self.values.shape[0])

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def bytes_per_token(hidden_size: int, boundary: Boundary) -> int:
    """Bytes that one token takes in a shard, labels and lengths not counted."""
    return hidden_size * _DTYPE_OF[boundary].itemsize + (4 if boundary == "int8" else 0)


def quantize(hidden: torch.Tensor, boundary: Boundary) -> BoundaryBlock:
    """The block that crosses for boundary tensor `hidden` [N, H] float.

    Raises:
        DataError: a value is NaN, infinite or over 2**127; `row` is the token's position in `hidden`.
        ConfigError: `boundary` is none of the three.
    """
    if boundary not in BOUNDARIES:
        raise ConfigError(f"boundary {boundary!r} is not one of {', '.join(BOUNDARIES)}")
    hidden = hidden.detach().to(torch.float32)
    absmax = hidden.abs().amax(dim=1) if hidden.numel() else hidden.new_zeros(hidden.shape[0])
    usable = absmax <= _LARGEST_ABSMAX  # False for NaN
    if not bool(usable.all()):
        row = int((~usable).nonzero()[0, 0])
        raise DataError(
            f"the boundary tensor of token {row} is not finite or overflows",
            row=row,
            hint="the near side overflowed: run it in float32, and check the backbone's weights",
        )
    if boundary != "int8":
        return BoundaryBlock(hidden.to(_DTYPE_OF[boundary]).contiguous())
    scales = torch.where(absmax < _SMALLEST_ABSMAX, torch.zeros_like(absmax), absmax / INT8_MAX)
    divisor = torch.where(scales == 0, torch.full_like(scales, torch.inf), scales)
    # torch.round is round half to even. The clamp matters where absmax / scale rounds up past 127.
    values = torch.round(hidden / divisor[:, None]).clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return BoundaryBlock(values.contiguous(), scales)


def dequantize(block: BoundaryBlock) -> torch.Tensor:
    """A fresh float32 [N, H]: exact for fp32, within `scale / 2` per value for int8, 8 bits of mantissa for bf16."""
    values = block.values.to(torch.float32, copy=True)
    return values if block.scales is None else values.mul_(block.scales[:, None])
