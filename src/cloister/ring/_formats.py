"""The two rings, and the int8 planes in which their elements travel and are multiplied. Normative: spec/pad.md.

An element of Z_m is split so that each part fits an int8 GEMM with exact int32 accumulation: into residues (`faithful`)
or into limbs (`fast`). Everything here is exact and takes no decision on a value; nothing here knows what is secret.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Int8, Int16, Int32, Int64
from torch import Tensor

from cloister.errors import OffloadError

MAX_FEATURES = 2**17 - 1  # 2^17 products of -128 by -128 would be 2^31, one more than an int32 holds


@dataclass(frozen=True)
class RingFormat(ABC):
    """A ring Z_m with its encoding into int8 planes (spec/pad.md section 1).

    Attributes:
        name: as configuration, reports and digests spell it.
        weight_bits: signed bits of an integer weight, unless a caller asks for others.
    """

    name: str
    weight_bits: int
    MAX_WEIGHT_BITS: ClassVar[int]
    CODE: ClassVar[int]  # how the kernels call the ring

    @property
    @abstractmethod
    def pad_moduli(self) -> tuple[int, ...]:
        """The modulus of each plane of a pad."""

    @property
    @abstractmethod
    def modulus(self) -> int:
        """m: the number of elements."""

    @property
    @abstractmethod
    def n_planes(self) -> int:
        """Planes of an element, which is also the number of int8 products of a layer."""

    @property
    @abstractmethod
    def n_weight_planes(self) -> int:
        """Planes of a weight: as many as an element has, or one that all of them share."""

    @property
    def bytes_per_element(self) -> int:
        """What one masked element costs on its way out, in bytes."""
        return self.n_planes

    @abstractmethod
    def encode(self, x_q: Int64[Tensor, "tokens features"]) -> Int8[Tensor, "planes tokens features"]:
        """The planes of `x_q` mod m. Exact for every int64, so a sum of integers and a pad needs no reduction before.

        As visible as its input: *masked* where a pad was added, else *secret*.

        Raises:
            OffloadError: `x_q` is not int64.
        """

    @abstractmethod
    def encode_weight(self, w_q: Int16[Tensor, "out features"]) -> Int8[Tensor, "weight_planes out in"]:
        """The planes of an integer weight of at most `MAX_WEIGHT_BITS` signed bits. *Public*, as frozen weights are.

        Raises:
            OffloadError: `w_q` is not int16.
        """

    @abstractmethod
    def decode_product(self, accumulators: Int32[Tensor, "planes tokens out"]) -> Int64[Tensor, "tokens out"]:
        """The product's representative in [0, m), from the accumulators of the planes; exact in the ring.

        Total: an accelerator's answer may be any int32 at all, and decodes to an element, which may be a wrong one. The
        caller must still check it. As visible as its input: *masked*.

        Raises:
            OffloadError: not int32, or not `n_planes` planes.
        """

    def centre(self, y: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """The representative in (-m/2, m/2] of `y` mod m, for any int64. After unmasking this is *secret*.

        Raises:
            OffloadError: `y` is not int64.
        """
        _check_dtype(y, torch.int64)
        reduced = torch.remainder(y, self.modulus)
        return reduced - self.modulus * (reduced > self.modulus // 2)

    def _check_accumulators(self, accumulators: Tensor) -> None:
        _check_dtype(accumulators, torch.int32)
        if len(accumulators) != self.n_planes:
            raise OffloadError(f"a product of {self.name} has {self.n_planes} planes, not {len(accumulators)}")


@dataclass(frozen=True)
class ResidueFormat(RingFormat):
    """Z_m, m a product of pairwise coprime moduli of at most 256; plane i is the balanced residue modulo `moduli[i]`.

    Attributes:
        moduli: in the order of the planes. That they are coprime is checked at first use: else no inverse exists.
    """

    moduli: tuple[int, ...]
    MAX_WEIGHT_BITS: ClassVar[int] = 16
    CODE: ClassVar[int] = 0

    @property
    def pad_moduli(self) -> tuple[int, ...]:
        """The moduli: a pad is uniform in each residue."""
        return self.moduli

    @property
    def modulus(self) -> int:
        """m: the product of the moduli."""
        return math.prod(self.moduli)

    @property
    def n_planes(self) -> int:
        """One for each modulus."""
        return len(self.moduli)

    @property
    def n_weight_planes(self) -> int:
        """As many: residue times residue."""
        return len(self.moduli)

    @cached_property
    def _combiners(self) -> tuple[int, ...]:
        """M_i (M_i^-1 mod m_i) of each modulus, with M_i = m / m_i: 1 modulo m_i, 0 modulo the others, below m."""
        cofactors = [(self.modulus // modulus, modulus) for modulus in self.moduli]
        return tuple(cofactor * pow(cofactor, -1, modulus) for cofactor, modulus in cofactors)

    def encode(self, x_q: Int64[Tensor, "tokens features"]) -> Int8[Tensor, "planes tokens features"]:
        """See `RingFormat.encode`."""
        _check_dtype(x_q, torch.int64)
        return self._residues(x_q)

    def encode_weight(self, w_q: Int16[Tensor, "out features"]) -> Int8[Tensor, "weight_planes out in"]:
        """See `RingFormat.encode_weight`."""
        _check_dtype(w_q, torch.int16)
        return self._residues(w_q)

    def decode_product(self, accumulators: Int32[Tensor, "planes tokens out"]) -> Int64[Tensor, "tokens out"]:
        """See `RingFormat.decode_product`. Chinese remainders: the sum of (a_i mod m_i) * M_i N_i, mod m.

        For `faithful` each term is below 2^8 * 2^32 and the sum below 2^42, so no step comes near 2^63.
        """
        self._check_accumulators(accumulators)
        total = torch.zeros(accumulators.shape[1:], dtype=torch.int64, device=accumulators.device)
        for plane, modulus, combiner in zip(accumulators, self.moduli, self._combiners, strict=True):
            total += torch.remainder(plane, modulus).to(torch.int64) * combiner
        return torch.remainder(total, self.modulus)

    def _residues(self, values: Tensor) -> Int8[Tensor, "planes rows columns"]:
        planes = torch.empty((self.n_planes, *values.shape), dtype=torch.int8, device=values.device)
        for plane, modulus in zip(planes, self.moduli, strict=True):
            residue = torch.remainder(values, modulus)
            above = (residue > (modulus - 1) // 2).to(values.dtype)  # in its type: int64 would be four times the memory
            plane.copy_(residue.sub_(above, alpha=modulus))
        return planes


@dataclass(frozen=True)
class LimbFormat(RingFormat):
    """Z_2^k as `n_limbs` balanced digits of `limb_bits`, lowest first; a weight is a single int8 plane.

    The digit above the highest falls away, which is the reduction mod 2^k.
    """

    n_limbs: int
    limb_bits: int = 8
    MAX_WEIGHT_BITS: ClassVar[int] = 8
    CODE: ClassVar[int] = 1

    @property
    def pad_moduli(self) -> tuple[int, ...]:
        """The unsigned digits of a pad, lowest first."""
        return (1 << self.limb_bits,) * self.n_limbs

    @property
    def modulus(self) -> int:
        """m = 2^(n_limbs * limb_bits)."""
        return 1 << (self.n_limbs * self.limb_bits)

    @property
    def n_planes(self) -> int:
        """One for each limb."""
        return self.n_limbs

    @property
    def n_weight_planes(self) -> int:
        """One: every limb is multiplied by the whole weight."""
        return 1

    def encode(self, x_q: Int64[Tensor, "tokens features"]) -> Int8[Tensor, "planes tokens features"]:
        """See `RingFormat.encode`."""
        _check_dtype(x_q, torch.int64)
        planes = torch.empty((self.n_limbs, *x_q.shape), dtype=torch.int8, device=x_q.device)
        rest, half, low = x_q & (self.modulus - 1), 1 << (self.limb_bits - 1), (1 << self.limb_bits) - 1
        for plane in planes:
            digit = ((rest + half) & low) - half
            plane.copy_(digit)
            rest = (rest - digit) >> self.limb_bits
        return planes

    def encode_weight(self, w_q: Int16[Tensor, "out features"]) -> Int8[Tensor, "weight_planes out in"]:
        """See `RingFormat.encode_weight`."""
        _check_dtype(w_q, torch.int16)
        return w_q.to(torch.int8).unsqueeze(0)

    def decode_product(self, accumulators: Int32[Tensor, "planes tokens out"]) -> Int64[Tensor, "tokens out"]:
        """See `RingFormat.decode_product`. Horner from the highest limb; no step exceeds 2^48 in size."""
        self._check_accumulators(accumulators)
        total = torch.zeros(accumulators.shape[1:], dtype=torch.int64, device=accumulators.device)
        for plane in reversed(accumulators.unbind()):
            total = (total << self.limb_bits) + plane
        return total & (self.modulus - 1)


def _check_dtype(tensor: Tensor, expected: torch.dtype) -> None:
    if tensor.dtype != expected:
        raise OffloadError(f"a ring tensor of {expected} is needed, not of {tensor.dtype}")


FAITHFUL = ResidueFormat(name="faithful", weight_bits=12, moduli=(256, 255, 253, 251))
FAST = LimbFormat(name="fast", weight_bits=8, n_limbs=3)
FORMATS: Mapping[str, RingFormat] = {form.name: form for form in (FAITHFUL, FAST)}
