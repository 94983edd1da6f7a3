"""The epilogue of a product as one Triton kernel: 4 bytes a plane in, 4 bytes out, nothing in between.

Imported only where Triton is. `_compute.combine` says what it computes; a test and the start of every process on a GPU
compare the two.
"""
# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# No annotations of the future: Triton reads them.

import torch
import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor

from cloister.errors import OffloadError
from cloister.ring import LimbFormat, ResidueFormat, RingFormat

_BLOCK = 1024
_RESIDUE_PLANES = 4


# Compiled from its source: no annotation but constexpr means anything, and names of this module are out of its reach.
@triton.jit(do_not_specialize=["n"])
def _limbs_kernel(  # noqa: PLR0917
    accumulators, elements, n, n_planes: tl.constexpr, limb_bits: tl.constexpr, low: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    size = n.to(tl.int64)
    total = tl.zeros((block,), dtype=tl.int32)
    for i in tl.static_range(n_planes):  # Horner from the highest limb, modulo 2^32
        total = (total << limb_bits) + tl.load(accumulators + (n_planes - 1 - i) * size + at, mask=inside, other=0)
    tl.store(elements + at, total & low, mask=inside)


@triton.jit
def _residue_term(place, inside, modulus: tl.constexpr, inverse: tl.constexpr, cofactor: tl.constexpr):
    residue = tl.load(place, mask=inside, other=0) % modulus  # with the sign of the accumulator
    residue = tl.where(residue < 0, residue + modulus, residue)
    return (residue * inverse % modulus).to(tl.int64) * cofactor  # below m


@triton.jit(do_not_specialize=["n"])
def _residues_kernel(accumulators, elements, n,  # noqa: PLR0917
                     m0: tl.constexpr, n0: tl.constexpr, c0: tl.constexpr,
                     m1: tl.constexpr, n1: tl.constexpr, c1: tl.constexpr,
                     m2: tl.constexpr, n2: tl.constexpr, c2: tl.constexpr,
                     m3: tl.constexpr, n3: tl.constexpr, c3: tl.constexpr,
                     modulus: tl.constexpr, block: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    size = n.to(tl.int64)
    total = _residue_term(accumulators + at, inside, m0, n0, c0)
    total += _residue_term(accumulators + size + at, inside, m1, n1, c1)
    total += _residue_term(accumulators + 2 * size + at, inside, m2, n2, c2)
    total += _residue_term(accumulators + 3 * size + at, inside, m3, n3, c3)
    total = tl.where(total >= 2 * modulus, total - 2 * modulus, total)  # the sum of four is below 4 m
    total = tl.where(total >= modulus, total - modulus, total)
    tl.store(elements + at, total.to(tl.int32), mask=inside)


def combine(accumulators: Int32[Tensor, "planes tokens out"], fmt: RingFormat) -> Int32[Tensor, "tokens out"]:
    """See `_compute.combine`; on a CUDA device.

    Raises:
        OffloadError: a format that no kernel is for.
    """
    accumulators = accumulators.contiguous()
    elements = torch.empty(accumulators.shape[1:], dtype=torch.int32, device=accumulators.device)
    n = elements.numel()
    grid = (triton.cdiv(n, _BLOCK),)
    if n == 0:
        return elements
    if isinstance(fmt, LimbFormat) and fmt.modulus <= 1 << 31:
        _limbs_kernel[grid](accumulators, elements, n, fmt.n_planes, fmt.limb_bits, fmt.modulus - 1, _BLOCK)
        return elements
    if isinstance(fmt, ResidueFormat) and fmt.n_planes == _RESIDUE_PLANES and max(fmt.moduli) <= 1 << 8:
        _residues_kernel[grid](accumulators, elements, n, *_constants(fmt), fmt.modulus, _BLOCK)
        return elements
    raise OffloadError(f"there is no kernel for the format {fmt.name}")


def _constants(fmt: ResidueFormat) -> list[int]:
    """Of each plane the modulus m_i, N_i and M_i (spec/pad.md section 1.3)."""
    found: list[int] = []
    for modulus in fmt.moduli:
        cofactor = fmt.modulus // modulus
        found += (modulus, pow(cofactor, -1, modulus), cofactor)
    return found
