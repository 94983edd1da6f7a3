"""A masked layer a second time, without masks: what sections 2, 5 and 6 of spec/pad.md say that comes out of it.

Python integers, fractions and floats (binary64) only, and no line of cloister's code; matrices are lists of rows.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction

from tests.oracle import slow_ring as ring

Rows = list[list[float]]


def float32(x: float) -> float:
    """A binary64 number rounded to binary32; infinite where it does not fit."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def room(limit: int, n_features: int, head_room: float = 1.0) -> float:
    return (limit * head_room - math.sqrt(n_features) / 2) * (1 - 2.0**-30)


def norm(row: list[float]) -> float:
    """The root of the sum of squares in binary64: feature i goes to partial sum i mod 8, which are added pairwise."""
    sums = [0.0] * 8
    for i, x in enumerate(row):
        sums[i % 8] += x * x
    return math.sqrt(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])))


def quantize(row: list[float], divisor: float) -> tuple[list[int], float]:
    """x_q and the scale of a row of binary32 numbers. round() of a float is to even."""
    length = norm(row)
    scale = length / divisor
    return [round(x / (scale or 1.0)) for x in row], scale


def layer(w: ring.Matrix, rows: Rows, name: str, head_room: float = 1.0) -> list[tuple[list[int], float]]:
    """Per row the integer products with w, the rows of the direction's weight, and the row's scale."""
    divisor = room(ring.limit(w, ring.MODULUS[name]), len(w[0]), head_room)
    quantized = [quantize(row, divisor) for row in rows]
    products = ring.integer_product([x_q for x_q, _ in quantized], w)
    return [(y, scale) for y, (_, scale) in zip(products, quantized, strict=True)]


def forward(w_q: ring.Matrix, scales: list[float], bias: list[float] | None, x: Rows, name: str) -> Rows:
    found = []
    for y, scale in layer(w_q, x, name):
        assert all(2 * abs(e) < ring.MODULUS[name] for e in y)
        row = [float32(e * scale * s) for e, s in zip(y, scales, strict=True)]
        if bias is not None:
            row = [float32(float(Fraction(e) + Fraction(b))) if math.isfinite(e) else e
                   for e, b in zip(row, bias, strict=True)]  # fmt: skip
        found.append(row)
    return found


def backward(w_q: ring.Matrix, scales: list[float], g: Rows, name: str) -> Rows:
    # The product of two binary32 numbers is exact in binary64.
    folded = [[float32(e * s) for e, s in zip(row, scales, strict=True)] for row in g]
    return [[float32(e * scale) for e in y] for y, scale in layer(ring.transpose(w_q), folded, name)]


def is_accepted(difference: list[int], rho: list[int]) -> bool:
    """Whether an answer that is wrong by these integers passes the check with these words."""
    return sum(d * r for d, r in zip(difference, rho, strict=True)) % 2**64 == 0
