"""What the kernels must compute, a second time: Python's integers and floats, one element at a time, from the text.

Python's float is binary64, and its + * / round to nearest like the kernels' own; `round` takes ties to even.
"""

from __future__ import annotations

import ctypes
import math

from tests.oracle import slow_ring

NAMES = ("faithful", "fast")  # by code
U64 = 2**64


def binary32(x: float) -> float:
    """The nearest binary32, infinite beyond the largest."""
    return ctypes.c_float(x).value


def element(pad: list[int], name: str) -> int:
    """The element of Z_m that the residues or digits of a pad stand for."""
    if name == "fast":
        return sum(digit * 256**i for i, digit in enumerate(pad))
    return slow_ring.from_residues(pad, slow_ring.MODULI[name])


def fold_in(row: list[float], fold: list[float] | None) -> list[float]:
    return row if fold is None else [binary32(x * f) for x, f in zip(row, fold, strict=True)]


def norm(row: list[float]) -> float:
    """In 8 sums, feature i to sum i mod 8, that are then added in pairs."""
    sums = [0.0] * 8
    for i, x in enumerate(row):
        sums[i % 8] += x * x
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
    return math.sqrt(sums[0])


def mask(
    x: list[list[float]], fold: list[float] | None, room: float, r: list[list[list[int]]], code: int, v: list[int]
) -> tuple[list[list[list[int]]], list[float], list[int]] | None:  # fmt: skip
    """Planes, scales and sums; nothing where a value is not finite."""
    rows = [fold_in(row, fold) for row in x]
    if not all(math.isfinite(value) for row in rows for value in row):
        return None
    norms = [norm(row) for row in rows]
    scales = [n / room for n in norms]
    x_q = [[round(value / (scale or 1.0)) for value in row] for row, scale in zip(rows, scales, strict=True)]
    sums = [sum(a * b for a, b in zip(v, row, strict=True)) % U64 for row in x_q]
    name = NAMES[code]
    planes: list[list[list[int]]] = [[[] for _ in x] for _ in r]
    for t, row in enumerate(x_q):
        for i, whole in enumerate(row):
            masked = whole + element([plane[t][i] for plane in r], name)
            for plane, value in zip(planes, slow_ring.encode(masked, name), strict=True):
                plane[t].append(value)
    return planes, scales, sums


def unmask(
    answer: list[list[int]], u: list[list[int]], code: int, scales: list[float], channel: list[float] | None,
    bias: list[float] | None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """The centred integers and what they stand for."""
    m = slow_ring.MODULUS[NAMES[code]]
    y_q = [[slow_ring.centre(a - b, m) for a, b in zip(*rows, strict=True)] for rows in zip(answer, u, strict=True)]
    y = []
    for row, scale in zip(y_q, scales, strict=True):
        real = [whole * scale for whole in row]
        if channel is not None:
            real = [value * factor for value, factor in zip(real, channel, strict=True)]
        real = [binary32(value) for value in real]
        if bias is not None:
            real = [binary32(value + b) for value, b in zip(real, bias, strict=True)]
        y.append(real)
    return y_q, y


def checksums(y_q: list[list[int]], rho: list[int]) -> list[int]:
    return [sum(a * b for a, b in zip(row, rho, strict=True)) % U64 for row in y_q]


def replace_rejected(row: list[int], modulus: int, spares: list[int]) -> tuple[list[int], list[int]]:
    """The k-th rejected byte of a group of 1,024 becomes its k-th good spare; and the groups that lack spares."""
    row, lacking = list(row), []
    for group in range(-(-len(row) // 1024)):
        good = [byte for byte in spares[64 * group : 64 * group + 64] if byte < modulus]
        rejected = [i for i in range(1024 * group, min(len(row), 1024 * group + 1024)) if row[i] >= modulus]
        for i, byte in zip(rejected, good, strict=False):
            row[i] = byte
        if len(rejected) > len(good):
            lacking.append(group)
    return row, lacking
