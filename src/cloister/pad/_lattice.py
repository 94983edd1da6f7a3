"""Parameters and secrets of lattice pads, r = round(p v / Q) with v = sum_j a_j s_j; spec/pad.md, "Homomorphic pads".

Its security is that of Module-LWR, computational and heuristic: `ASSUMPTIONS[PadMode.LATTICE]` is what its user signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from jaxtyping import UInt32

from cloister.errors import PadError, PadReuseError, RingOverflowError
from cloister.kernels import _native
from cloister.pad._guard import ProcessBound
from cloister.pad._modes import Direction
from cloister.pad._stream import PadStream, derive_key

if TYPE_CHECKING:
    import numpy.typing as npt

    from cloister.ring import QuantizedWeight

    KeyArray = npt.NDArray[np.uint32]
    DigitArray = npt.NDArray[np.int8]
else:
    KeyArray = DigitArray = np.ndarray

_LANES = 16  # features in a block of the kernels
_CHUNK = 256  # outputs at a time while secrets are made, a multiple of 16: it bounds the temporaries
_CACHE_LINE = 64
_DIGIT_MODULUS = 243  # 3^5: a byte below it is five digits of base 3
_DIGITS = 5
# By name: the ring, degree, rank, primes and whether noise is added. What shipped has estimates for exactly this.
_SHIPPED = {
    "fast": ("fast", 1024, 2, (754974721,), False),
    "fast-mlwe": ("fast", 1024, 2, (754974721,), True),
    "faithful": ("faithful", 1024, 2, (545253377, 1018089473), False),
    "faithful-high": ("faithful", 1024, 3, (545253377, 1018089473), False),
}


@dataclass(frozen=True)
class LatticeParameters:
    """A parameter set. *Public*. Only those of `LATTICE_PARAMETERS` can be made: others are weaker, or not estimated.

    Attributes:
        name: as configuration and reports spell it.
        ring: the name of the format whose elements the pads are.
        degree: N, coefficients of a polynomial and tokens of a block.
        rank: k, polynomials of a secret. N k = 1024 is broken, and 1536 leaves no margin for many secrets.
        primes: of Q.
        has_noise: whether a uniform error from -22 to 22 is added to v before it is rounded, which then rests on
            Module-LWE alone. For `fast`: there it is as wide as what rounding takes away; for `faithful`, 2^26 times
            narrower, it would rest on a weaker problem than rounding alone does.

    Raises:
        PadError: a set that does not ship.
    """

    name: str
    ring: str
    degree: int
    rank: int
    primes: tuple[int, ...]
    has_noise: bool

    N_TOKENS: ClassVar[int] = 1024

    def __post_init__(self) -> None:
        if _SHIPPED.get(self.name) != (self.ring, self.degree, self.rank, tuple(self.primes), self.has_noise):
            raise PadError(
                f"lattice parameters {self.name!r} of dimension {self.degree * self.rank} are not among the sets that "
                "were estimated",
                hint=f"use one of {', '.join(sorted(_SHIPPED))}",
            )

    @property
    def modulus(self) -> int:
        """Q."""
        return math.prod(self.primes)

    @property
    def rounding(self) -> float:
        """How far r may be from p v / Q, in units: 1/2, and with noise 22 p / Q more, which is below 1/2."""
        return 1.0 if self.has_noise else 0.5

    @property
    def bytes_per_feature(self) -> int:
        """Memory that the secrets of one input or output take."""
        return 4 * len(self.primes) * self.rank * self.degree

    def input_limit(self, limit: float, n_features: int) -> float:
        """The norm that a row x_q may have, so that no |y_o| reaches m/2.

        y = W_q x_q + noise with |noise_o| <= `rounding` ||w_o|| sqrt(d) + 1/2, since each of the d rounding errors of r
        is at most `rounding` (Cauchy-Schwarz), and that of u 1/2. ||w_o|| L < m/2 for the weight's limit L, and a row
        w_o is zero, with |y_o| <= 1/2, or ||w_o|| >= 1. So L - `rounding` sqrt(d) - 1 leaves
        |y_o| <= ||w_o|| (L - 1) + 1/2 < m/2.

        Args:
            limit: L, of the weight in this direction.
            n_features: d, inputs of the product.

        Raises:
            RingOverflowError: that leaves fewer units than the rounding of a row takes.
        """
        left = limit - self.rounding * math.sqrt(n_features) - 1
        if left < math.sqrt(n_features) + 1:
            raise RingOverflowError(
                f"a norm of {limit:.0f} leaves no room for the rounding of lattice pads of {n_features} features",
                hint="use the format faithful, or split the layer",
            )
        return left


LATTICE_PARAMETERS: Mapping[str, LatticeParameters] = {
    name: LatticeParameters(name, *values) for name, values in _SHIPPED.items()
}
"""The sets that ship, by name. A format's own is that of its name."""


class LatticeSecrets(ProcessBound):
    """Of one layer and direction: s of each input, ternary, and z = W s of each output. *Secret*; `wipe` it.

    Made by `generate` alone, from fresh bytes of the system's generator, and for one source of pads.

    Attributes:
        parameters: *public*.
        s: [blocks of 16 inputs, primes, rank, 1024, 16], transformed; *secret*, as z, which is of the outputs.
        z: see `s`.
        code: *public*, `RingFormat.CODE`.
        n_planes: *public*, of a pad.
        n_in, n_out: *public*, of the direction.
        input_limit: *public*, see `LatticeParameters.input_limit`.
    """

    __slots__ = ("_unclaimed", "code", "input_limit", "n_in", "n_out", "n_planes", "parameters", "s", "z")

    def __init__(self, weight: QuantizedWeight, direction: Direction, parameters: LatticeParameters) -> None:
        super().__init__()
        if parameters.ring != weight.format.name:
            raise PadError(f"lattice parameters {parameters.name} are not of the format {weight.format.name}")
        is_forward = direction is Direction.FORWARD
        self.n_out, self.n_in = weight.w_q.shape if is_forward else weight.w_q.T.shape
        limit = weight.forward_limit if is_forward else weight.backward_limit
        self.input_limit = parameters.input_limit(limit, self.n_in)
        self.parameters = parameters
        self.code, self.n_planes = weight.format.CODE, weight.format.n_planes
        self.s, self.z = (_empty_keys(n_features, parameters) for n_features in (self.n_in, self.n_out))
        self._unclaimed = [True]

    def __repr__(self) -> str:
        return f"LatticeSecrets({self.parameters.name}, n_in={self.n_in}, n_out={self.n_out})"

    @classmethod
    def generate(
        cls, key: bytearray, weight: QuantizedWeight, direction: Direction, parameters: LatticeParameters
    ) -> Self:
        """Fresh secrets, exactly uniform in {-1, 0, 1}, and their products with the integers of the weight.

        Args:
            key: *secret*, of this layer and direction; hedged with fresh bytes, so it alone does not give the secrets.
            weight: *public*; the integers that its digest is over. Backward multiplies by their transpose.
            direction: *public*.
            parameters: *public*.

        Raises:
            PadError: parameters of another format.
            RingOverflowError: the weight leaves no room for the rounding.
        """
        made = cls(weight, direction, parameters)
        digits = _ternary(key, parameters.degree * parameters.rank, made.n_in)
        try:
            for start in range(0, made.n_in, _CHUNK):
                values = digits[:, start : start + _CHUNK].astype(np.int64)
                _encode(values, made.code, made.s, start)
            _multiply(digits, weight, direction, made)
        except BaseException:
            made.wipe()
            raise
        finally:
            digits.fill(0)
        return made

    def claim(self) -> None:
        """Say that a source of pads uses these secrets, which no other may from then on.

        Raises:
            PadReuseError: one does already, or in a forked process.
        """
        self._stay_home()
        try:
            self._unclaimed.pop()  # atomic: of two threads one finds it gone
        except IndexError:
            raise PadReuseError("the secrets of a lattice pad were to serve a second layer") from None

    def wipe(self) -> None:
        """Zero the secrets. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        for keys in (self.s, self.z):
            keys.fill(0)


def _empty_keys(n_features: int, parameters: LatticeParameters) -> UInt32[KeyArray, "blocks primes rank 1024 16"]:
    """Memory for the secrets of that many features, at the start of a cache line."""
    shape = (-(-n_features // _LANES), len(parameters.primes), parameters.rank, parameters.degree, _LANES)
    n_bytes = 4 * math.prod(shape)
    whole = np.empty(n_bytes + _CACHE_LINE, np.uint8)
    skip = -whole.ctypes.data % _CACHE_LINE
    return whole[skip : skip + n_bytes].view(np.uint32).reshape(shape)


def _ternary(key: bytearray, n_rows: int, n_features: int) -> DigitArray:
    """[rank * 1024, features], each uniform in {-1, 0, 1}: digits of base 3 of uniform bytes below 3^5."""
    n_bytes = -(-n_rows * n_features // _DIGITS)
    stream = PadStream(bytearray(derive_key(key, b"secrets")))
    (drawn,) = stream.draw((n_bytes,), (_DIGIT_MODULUS,)).use((n_bytes,))
    digits = np.empty((n_rows, n_features), np.int8)
    _native.lattice_digits(drawn, digits.reshape(-1))
    drawn.fill(0)
    stream.retire()
    return digits


def _encode(values: npt.NDArray[np.int64], code: int, keys: KeyArray, start: int) -> None:
    """Transform the secrets of the features from `start`, a multiple of 16, and zero `values`."""
    first = start // _LANES
    _native.lattice_encode(values, code, keys[first : first - (-values.shape[1] // _LANES)])
    values.fill(0)


def _multiply(digits: DigitArray, weight: QuantizedWeight, direction: Direction, made: LatticeSecrets) -> None:
    """z = W s over the integers, exact, in products of int8: the weight goes in balanced digits of 256.

    |z| <= 2^15 2^17, and the products of one digit are below 2^31. Inside of the enclave, on its CPU.
    """
    import torch

    from cloister import ring

    # Two balanced digits reach 127 * 256 + 127, which 2^14 - 1 is below and 2^15 - 1 is not.
    n_limbs = 1 if weight.weight_bits <= 8 else 2 if weight.weight_bits <= 15 else 3
    limbs, one = (ring.LimbFormat(name="digits", weight_bits=8, n_limbs=n) for n in (n_limbs, 1))
    w_q = weight.w_q.cpu() if direction is Direction.FORWARD else weight.w_q.cpu().t()
    secrets = torch.from_numpy(digits).unsqueeze(0)  # pyright: ignore[reportUnknownMemberType]
    size = len(digits) * min(_CHUNK, made.n_out)
    products, sums = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.int64)
    try:
        for start in range(0, made.n_out, _CHUNK):
            part = limbs.encode(w_q[start : start + _CHUNK].to(torch.int64))
            shape = (len(digits), part.shape[1])
            found, total = (each[: math.prod(shape)].view(shape) for each in (products, sums))
            total.zero_()
            for power, limb in enumerate(part):
                ring.product(secrets, limb.unsqueeze(0), one, out=found.unsqueeze(0))
                total.add_(found, alpha=256**power)
            _encode(total.numpy(), made.code, made.z, start)
    finally:
        products.zero_()
        sums.zero_()
