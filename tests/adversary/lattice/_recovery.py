"""Key recovery from raw outputs of a layer under lattice pads (`fast`, real parameters), without lattice reduction.

A raw output is y = s_t s_o (W x_q + (W e - f) / Q) in fp32, with e = Q r - p v. Least squares over the outputs gives
s_t (x_q + e / Q) up to what f and fp32 add; s_t follows from the norm, which the scale was made from, and from y being
whole numbers. What the accelerator saw is c = x_q + r mod p, so c - (x_q + e / Q) = p v / Q mod p, and as its error is
below p / 2Q = 1/90, v is exact. With a of as many blocks as the rank, which A1 lets everyone have, the secrets are the
solution of one small linear system at each point of the transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from tests.oracle import slow_lattice as slow

Q, P, N = 754974721, 2**24, 1024


def recover(
    raw: np.ndarray, masked: np.ndarray, weight: np.ndarray, scales: np.ndarray, room: float, a: Sequence[np.ndarray]
) -> np.ndarray:
    """The secrets [in, rank, 1024] modulo Q, centred: right ones if `raw` is what it should be.

    Args:
        raw: [tokens, out], tokens of as many whole blocks as the rank.
        masked: [tokens, in], what the accelerator saw, in [0, p).
        weight: [out, in], the integers.
        scales: [out], of the channels.
        room: what a row's norm is divided by to get its scale.
        a: of each block, [rank, 1024], its values at psi^(2 i + 1).
    """
    real = raw.astype(np.float64) / scales
    inverse = np.linalg.pinv(weight.astype(np.float64))
    scaled = real @ inverse.T
    token_scales = np.linalg.norm(scaled, axis=1) / room
    token_scales = np.array([_refined(row, guess) for row, guess in zip(real, token_scales, strict=True)])
    inputs = scaled / token_scales[:, None]
    v = np.rint(((masked - inputs) % P) * (Q / P)).astype(np.int64) % Q
    forward, backward = _matrices()
    values = [_times(forward, block) for block in np.split(v, len(a))]  # [1024, in] of each block
    solved = _solve(np.stack(a), np.stack(values))
    secrets = np.stack([_times(backward, each) for each in solved], 1).transpose(2, 1, 0)
    return secrets - Q * (secrets > Q // 2)


def n_recovered(found: np.ndarray, secrets: np.ndarray) -> int:
    """How many of the secrets [in, rank, 1024] were found, each as a whole."""
    return int((found == secrets).all(axis=(1, 2)).sum())


def _refined(real: np.ndarray, guess: float) -> float:
    """The scale near `guess` for which the outputs are whole numbers; the guess itself where they are all zero."""
    sizes = np.abs(real)
    order = np.argsort(sizes)
    anchor = real[order[sizes[order] > 2000 * guess][0]] if (sizes > 2000 * guess).any() else 0.0
    if anchor == 0 or not np.isfinite(guess) or guess <= 0:
        return max(guess, 1e-300)
    nearest = round(abs(anchor) / guess)
    candidates = np.abs(anchor) / np.arange(max(nearest - 40, 1), nearest + 41)
    # fp32 keeps whole numbers below 2^20 to within 2^-5 or better.
    usable = sizes < 2**20 * guess
    parts = real[usable] / candidates[:, None]
    best = candidates[np.abs(parts - np.rint(parts)).mean(1).argmin()]
    for bits in (16, 18, 20):  # ever larger numbers, so ever more digits of the scale
        near = sizes < 2**bits * guess
        whole = np.rint(real[near] / best)
        if (whole != 0).any():
            best = (real[near] @ whole) / (whole @ whole)
    return float(best)


@cache
def _matrices() -> tuple[np.ndarray, np.ndarray]:
    """[i, c] = psi^((2 i + 1) c), and its inverse."""
    powers = [1]
    for _ in range(2 * N - 1):
        powers.append(powers[-1] * slow.PSI[Q] % Q)
    exponents = (2 * np.arange(N)[:, None] + 1) * np.arange(N) % (2 * N)
    table = np.array(powers, np.int64)
    return table[exponents], table[-exponents.T % (2 * N)] * pow(N, -1, Q) % Q


def _times(matrix: np.ndarray, block: np.ndarray) -> np.ndarray:
    """matrix @ block modulo Q, in two halves that fit 63 bits."""
    high, low = np.divmod(block, 1 << 15)
    return ((matrix @ high % Q << 15) + matrix @ low) % Q


def _solve(a: np.ndarray, values: np.ndarray) -> np.ndarray:
    """s [rank, 1024, in] of sum_j a[b, j] s[j] = values[b], for rank 2, by Cramer's rule modulo Q at each point."""
    (a_0, a_1), (b_0, b_1) = a.astype(object)
    first, second = values.astype(object)
    determinant = [pow(int(x), -1, Q) for x in (a_0 * b_1 - a_1 * b_0) % Q]
    inverse = np.array(determinant, object)[:, None]
    s_0 = (first * b_1[:, None] - second * a_1[:, None]) * inverse % Q
    s_1 = (second * a_0[:, None] - first * b_0[:, None]) * inverse % Q
    return np.stack([s_0, s_1]).astype(np.int64)
