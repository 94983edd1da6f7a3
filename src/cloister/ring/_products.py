"""Exact products of planes: int8 by int8 with int32 accumulation, on whatever device the planes are.

This is the accelerator's whole arithmetic. It sees *masked* elements and *public* weights, and no scale.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Int8, Int32
from torch import Tensor

from cloister.errors import OffloadError
from cloister.ring._formats import MAX_FEATURES, RingFormat

_CUDA_MULTIPLE = 8  # torch._int_mm on CUDA: both sides of the weight a multiple of 8, and more than 16 tokens
_CUDA_MIN_TOKENS = 24


def product(
    planes_x: Int8[Tensor, "planes tokens features"],
    weight_planes: Int8[Tensor, "weight_planes out features"],
    fmt: RingFormat,
    *,
    out: Int32[Tensor, "planes tokens out"] | None = None,
) -> Int32[Tensor, "planes tokens out"]:
    """x W^T of each plane, exact as integers: fewer than 2^17 terms of at most 2^14 each stay below 2^31.

    Args:
        planes_x: from `RingFormat.encode`, *masked*.
        weight_planes: `forward_planes` or `backward_planes` of a `QuantizedWeight`, contiguous or not; *public*.
        fmt: whose planes they are.
        out: contiguous memory for the result, else it is new: a page that was never touched costs as much as its part
            of a product.

    Returns:
        Accumulators for `RingFormat.decode_product`; *masked*.

    Raises:
        OffloadError: types, planes or shapes do not belong together, 2^17 or more features, or a device whose int8
            product is not exact.
    """
    _check(planes_x, weight_planes, fmt)
    check_kernel(str(planes_x.device))
    planes, tokens, features = planes_x.shape
    shape = (planes, tokens, weight_planes.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=planes_x.device)
    elif out.shape != shape or out.dtype != torch.int32 or not out.is_contiguous():
        raise OffloadError(f"a product of shape {shape} does not go into {out.dtype} of {tuple(out.shape)}")
    if len(weight_planes) == 1:  # one weight for every plane: all of them in a single product
        _multiply(planes_x.reshape(planes * tokens, features), weight_planes[0], out.view(planes * tokens, shape[2]))
        return out
    for plane, weight, found in zip(planes_x, weight_planes, out, strict=True):
        _multiply(plane, weight, found)
    return out


@cache
def check_kernel(device: str) -> None:
    """Prove once that the device adds int8 products without saturation, at the values where some instructions do.

    x86 without VNNI adds pairs of products in 16 bits (VPMADDUBSW), where 2 * 128 * 127 does not fit.

    Raises:
        OffloadError: it does not.
    """
    extremes, depth = (-128, -127, 0, 127), 64
    sides = torch.tensor(extremes, dtype=torch.int8, device=device).repeat_interleave(8).unsqueeze(1).repeat(1, depth)
    found = torch.empty((len(sides), len(sides)), dtype=torch.int32, device=device)
    _multiply(sides, sides, found)
    expected = torch.tensor([[depth * a * b for b in extremes] for a in extremes], dtype=torch.int32)
    if not torch.equal(found.cpu(), expected.repeat_interleave(8, 0).repeat_interleave(8, 1)):
        raise OffloadError(
            f"the int8 product of the device {device} is not exact",
            hint="a CPU with AVX-512 VNNI or AVX-VNNI, or a CUDA device, is needed",
        )


def _check(planes_x: Tensor, weight_planes: Tensor, fmt: RingFormat) -> None:
    shapes = f"{tuple(planes_x.shape)} by {tuple(weight_planes.shape)}"
    if planes_x.dtype != torch.int8 or weight_planes.dtype != torch.int8:
        raise OffloadError(f"planes are int8, not {planes_x.dtype} and {weight_planes.dtype}")
    if planes_x.ndim != 3 or weight_planes.ndim != 3 or planes_x.shape[2] != weight_planes.shape[2]:
        raise OffloadError(f"planes of shapes {shapes} have no product")
    if len(planes_x) != fmt.n_planes or len(weight_planes) != fmt.n_weight_planes:
        raise OffloadError(f"planes of shapes {shapes} are not of the format {fmt.name}")
    if not 1 <= planes_x.shape[2] <= MAX_FEATURES:
        raise OffloadError(f"a product over {planes_x.shape[2]} features does not fit 32 bits")


def _multiply(
    x: Int8[Tensor, "tokens features"], weight: Int8[Tensor, "out features"], out: Int32[Tensor, "tokens out"]
) -> None:
    if x.is_cuda:
        _multiply_padded(x, weight, out)
    else:
        _int_mm(x, weight, out)


def _multiply_padded(
    x: Int8[Tensor, "tokens features"], weight: Int8[Tensor, "out features"], out: Int32[Tensor, "tokens out"]
) -> None:
    """With zeros added up to the sizes that CUDA takes, and cut off again; a copy only where something is missing."""
    (tokens, features), channels = x.shape, len(weight)
    lacking = -features % _CUDA_MULTIPLE
    x = torch.nn.functional.pad(x, (0, lacking, 0, max(-tokens % _CUDA_MULTIPLE, _CUDA_MIN_TOKENS - tokens)))
    weight = torch.nn.functional.pad(weight, (0, lacking, 0, -channels % _CUDA_MULTIPLE))
    if out.shape == (len(x), len(weight)):
        _int_mm(x, weight, out)
        return
    padded = torch.empty((len(x), len(weight)), dtype=torch.int32, device=out.device)
    _int_mm(x, weight, padded)
    out.copy_(padded[:tokens, :channels])


def _int_mm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x weight^T by `torch._int_mm` into `out`, with every stride as BLAS means it.

    The stride of a side of size 1 is arbitrary in torch; on CPU `torch._int_mm` takes it for a leading dimension, the
    product is then refused in silence, and what it returns is memory that was never written (pytorch issue 195066).
    """
    (tokens, features), channels = x.shape, len(weight)
    x = x.contiguous().as_strided((tokens, features), (features, 1))
    if features == 1 or weight.t().is_contiguous():  # backward's view, which needs no copy
        weight = weight.t().contiguous().as_strided((features, channels), (channels, 1))
    else:
        weight = weight.contiguous().as_strided((features, channels), (1, features))
    out = out.as_strided((tokens, channels), (channels, 1))
    torch._int_mm(x, weight, out=out)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  # it has no other
