"""A second implementation of spec/pad.md, sections 1 and 2: slow, obvious, and without a line of cloister's code.

Python integers and fractions only; matrices are lists of rows. Every function follows the specification's words.
"""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction

Matrix = list[list[int]]

MODULI = {"faithful": (256, 255, 253, 251)}
MODULUS = {"faithful": 256 * 255 * 253 * 251, "fast": 2**24}
DIGEST_LABEL = b"cloister-ring-weight/v1"

# --- section 1 --------------------------------------------------------------------------------------------------------


def balanced(x: int, n: int) -> int:
    """The representative of x modulo n in [-floor(n/2), ceil(n/2) - 1]."""
    return (x + n // 2) % n - n // 2


def residues(x: int, moduli: tuple[int, ...]) -> list[int]:
    return [balanced(x, modulus) for modulus in moduli]


def limbs(x: int, n_limbs: int, base: int) -> list[int]:
    digits = []
    for _ in range(n_limbs):
        digits.append(balanced(x, base))
        x = (x - digits[-1]) // base
    return digits


def encode(x: int, name: str) -> list[int]:
    return limbs(x, 3, 256) if name == "fast" else residues(x, MODULI[name])


def encode_weight(w: int, name: str) -> list[int]:
    return [w] if name == "fast" else residues(w, MODULI[name])


def from_residues(found: list[int], moduli: tuple[int, ...]) -> int:
    """Chinese remainders by search: step through the numbers that fit the moduli so far until the next fits too."""
    x, step = 0, 1
    for residue, modulus in zip(found, moduli, strict=True):
        while (x - residue) % modulus:
            x += step
        step *= modulus
    return x


def decode(accumulators: list[int], name: str) -> int:
    if name == "fast":
        return sum(a * 256**i for i, a in enumerate(accumulators)) % MODULUS[name]
    return from_residues(accumulators, MODULI[name])


def centre(y: int, m: int) -> int:
    y %= m
    return y - m if 2 * y > m else y


def integer_product(x: Matrix, w: Matrix) -> Matrix:
    """x W^T over the integers."""
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in w] for row in x]


def transpose(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def plane_product(c: Matrix, w: Matrix, name: str) -> list[Matrix]:
    """The accumulators that an honest accelerator returns for the elements c and the integer weight w."""
    n_planes = len(encode(0, name))
    found = []
    for plane in range(n_planes):
        c_plane = [[encode(x, name)[plane] for x in row] for row in c]
        w_plane = [[encode_weight(x, name)[plane % len(encode_weight(x, name))] for x in row] for row in w]
        found.append(integer_product(c_plane, w_plane))
    return found


def decode_all(accumulators: list[Matrix], name: str) -> Matrix:
    return [
        [decode(list(entries), name) for entries in zip(*rows, strict=True)]
        for rows in zip(*accumulators, strict=True)
    ]  # fmt: skip


# --- section 2 --------------------------------------------------------------------------------------------------------


def binary32(x: Fraction) -> Fraction:
    """x rounded to the nearest binary32, ties to even; subnormal numbers are kept, infinity is not reached here."""
    if x == 0:
        return Fraction(0)
    exponent = -126
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit  # round() of a Fraction is to even


def quantize_weight(weight: list[list[float]], bits: int) -> tuple[Matrix, list[Fraction]]:
    top = 2 ** (bits - 1) - 1
    w_q, scales = [], []
    for row in weight:
        scale = binary32(max(abs(Fraction(x)) for x in row) / top)
        if scale < Fraction(2) ** -126:
            scale = Fraction(0)
        scales.append(scale)
        w_q.append([0 if scale == 0 else round(binary32(Fraction(x) / scale)) for x in row])
    return w_q, scales


def largest_square(w: Matrix) -> int:
    """S: the largest squared norm of a row, at least 1."""
    return max(1, *(sum(x * x for x in row) for row in w))


def limit(w: Matrix, m: int) -> int:
    """L, by its property: the largest whole number with L * sqrt(S) < m/2."""
    return limit_of_square(largest_square(w), m)


def limit_of_square(square: int, m: int) -> int:
    return largest_whole(lambda n: 4 * n * n * square < m * m)


def largest_whole(holds) -> int:
    """The largest whole number that a property holds for, where it holds up to some number and never again."""
    low, high = 0, 1
    while holds(high):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def fits(row: list[int], bound: float) -> bool:
    """||row||_2 <= bound, exactly."""
    return sum(x * x for x in row) <= Fraction(bound) ** 2


def ideal_scale(row: list[float], bound: float) -> float:
    """s_t but for its margin of 2^-30, from an exact sum of squares."""
    square = sum(Fraction(x) ** 2 for x in row)
    shift = Fraction(2) ** 300  # so that the square root of a whole number is precise
    return math.isqrt(int(square * shift * shift)) / float(shift) / (bound - math.sqrt(len(row)) / 2)


def part(data: bytes) -> bytes:
    return struct.pack(">Q", len(data)) + data


def digest(name: str, bits: int, w_q: Matrix, scales: list[float]) -> bytes:
    parts = [DIGEST_LABEL, name.encode()] + [struct.pack(">Q", n) for n in (bits, len(w_q), len(w_q[0]))]
    parts.append(b"".join(struct.pack("<h", x) for row in w_q for x in row))
    parts.append(b"".join(struct.pack("<f", s) for s in scales))
    return hashlib.sha384(b"".join(part(p) for p in parts)).digest()
