"""A second implementation of spec/pad.md, "Homomorphic pads": slow, obvious, and without a line of cloister's code.

Python integers. Polynomials are lists of coefficients modulo X^n + 1, multiplied by the rule of schools or, for the
real n, packed into one long integer each. A smaller n (a power of two) makes everything quick; the rest stays as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from tests.oracle import slow_pad

PSI = {754974721: 119670, 545253377: 342519, 1018089473: 206569}
MODULI = (256, 255, 253, 251)
EXCLUDED = (754974721 - 45) // 2


@dataclass(frozen=True)
class Set:
    """One line of the table of parameter sets."""

    primes: tuple[int, ...]
    p: int
    k: int
    noise: bool = False
    n: int = 1024

    @property
    def q(self) -> int:
        return prod(self.primes)

    @property
    def is_fast(self) -> bool:
        return len(self.primes) == 1


SETS = {
    "fast": Set((754974721,), 2**24, 2),
    "fast-mlwe": Set((754974721,), 2**24, 2, noise=True),
    "faithful": Set((545253377, 1018089473), prod(MODULI), 2),
    "faithful-high": Set((545253377, 1018089473), prod(MODULI), 3),
}


def lattice_key(job_key: bytes, job: int, layer: str, direction: str, index: int) -> bytes:
    labels = (struct.pack(">Q", job), layer.encode(), direction.encode(), struct.pack(">Q", index))
    return slow_pad.expand_label(job_key, b"lattice", *labels)


def stream(key: bytes, fresh: Sequence[bytes], n: int, *moduli: int) -> list[list[int]]:
    """The first n residues of a pad stream of these planes whose blocks draw `fresh` in order."""
    blocks = {b: slow_pad.block_key(key, b, fresh[b]) for b in range((n - 1 >> 16) + 1)}
    return slow_pad.expand(blocks, 0, n, moduli)


def secrets(key: bytes, fresh: Sequence[bytes], par: Set, d: int) -> list[list[list[int]]]:
    """s[i][j], each a list of coefficients in {-1, 0, 1}."""
    size = par.n * par.k * d
    (drawn,) = stream(slow_pad.expand_label(key, b"secrets"), fresh, -(-size // 5), 243)
    digits = [drawn[m // 5] // 3 ** (m % 5) % 3 - 1 for m in range(size)]
    return [[[digits[(par.n * j + c) * d + i] for c in range(par.n)] for j in range(par.k)] for i in range(d)]


def products(weight: list[list[int]], s: list[list[list[int]]], par: Set) -> list[list[list[int]]]:
    """z[o][j] = sum of weight[o][i] s[i][j], over the integers."""
    return [
        [[sum(w * s_i[j][c] for w, s_i in zip(row, s, strict=True)) for c in range(par.n)] for j in range(par.k)]
        for row in weight
    ]


def noise(key: bytes, fresh: Sequence[bytes], par: Set, d: int) -> list[list[int]]:
    """What is added to v [token][in], from the vector's key."""
    low, high = stream(slow_pad.expand_label(key, b"noise"), fresh, par.n * d, 252, 255)
    added = [x % 9 + 9 * (y % 5) - 22 for x, y in zip(low, high, strict=True)]
    return [added[t * d : (t + 1) * d] for t in range(par.n)]


def vector_key(key: bytes, counter: int, fresh: bytes) -> bytes:
    return slow_pad.expand_label(key, b"vector", struct.pack(">Q", counter), fresh)


def vector(key: bytes, par: Set) -> list[list[list[int]]]:
    """values[c][j][i] = a_j at psi^(2 i + 1) modulo the c-th prime, from the vector's key."""
    return [[_below(key, c, j, q, par.n) for j in range(par.k)] for c, q in enumerate(par.primes)]


def _below(key: bytes, c: int, j: int, q: int, n: int) -> list[int]:
    context = Cipher(algorithms.AES(key), modes.CTR(bytes([c, j]) + bytes(14))).encryptor()
    words = [word % 2**30 for word in struct.unpack("<4096I", context.update(bytes(4 * 4096)))]
    good = [word for word in words if word < q]
    assert len(good) >= n
    return good[:n]


def from_values(values: Sequence[int], q: int) -> list[int]:
    """The polynomial modulo q with those values at psi^(2 i + 1): the inverse of a transform, term by term."""
    n = len(values)
    inverse = pow(PSI[q], -(1024 // n), q)
    powers = [pow(inverse, e, q) for e in range(2 * n)]
    scale = pow(n, -1, q)
    return [sum(v * powers[(2 * i + 1) * c % (2 * n)] for i, v in enumerate(values)) * scale % q for c in range(n)]


def polynomials(values: list[list[list[int]]], par: Set) -> list[list[int]]:
    """a_j in R: by Chinese remainders where there are two primes."""
    found: list[list[int]] = []
    for j in range(par.k):
        parts = [from_values(values[c][j], q) for c, q in enumerate(par.primes)]
        combiners = [par.q // q * pow(par.q // q, -1, q) for q in par.primes]
        found.append(
            [sum(x * m for x, m in zip(xs, combiners, strict=True)) % par.q for xs in zip(*parts, strict=True)]
        )
    return found


def multiply(a: Sequence[int], b: Sequence[int], q: int) -> list[int]:
    """a b modulo X^n + 1 and q; by schoolbook."""
    n, found = len(a), [0] * len(a)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[(i + j) % n] += x * y if i + j < n else -x * y
    return [x % q for x in found]


def multiply_packed(a: Sequence[int], b: Sequence[int], q: int) -> list[int]:
    """The same by two long integers (Kronecker), for the real n: coefficients a multiple of 2^160 apart."""
    n, width = len(a), 20
    packed = [int.from_bytes(b"".join((x % q).to_bytes(width, "little") for x in side), "little") for side in (a, b)]
    whole = (packed[0] * packed[1]).to_bytes(2 * n * width, "little")
    parts = [int.from_bytes(whole[i : i + width], "little") for i in range(0, len(whole), width)]
    return [(low - high) % q for low, high in zip(parts[:n], parts[n:], strict=True)]


def combine(a: list[list[int]], keys: list[list[int]], par: Set) -> list[int]:
    """sum over j of a_j keys_j in R: v of one input, w of one output."""
    terms = [(multiply_packed if par.n > 64 else multiply)(x, y, par.q) for x, y in zip(a, keys, strict=True)]
    return [sum(xs) % par.q for xs in zip(*terms, strict=True)]


def rounded(v: int, par: Set) -> int:
    """round(p v / Q), which never lies half way."""
    return (2 * par.p * v + par.q) // (2 * par.q)


def planes(r: int, par: Set) -> tuple[int, ...]:
    """The planes of a pad."""
    r %= par.p
    return (r % 256, r // 256 % 256, r // 65536) if par.is_fast else tuple(r % m for m in MODULI)


@dataclass(frozen=True)
class Block:
    """What a block gives: r and u before their reduction, and k_t."""

    r: list[list[int]]  # [token][in]
    u: list[list[int]]  # [token][out]
    correction: list[int]


def block(
    a: list[list[int]],
    s: list[list[list[int]]],
    z: list[list[list[int]]],
    v_keys: Sequence[int],
    rho: Sequence[int],
    par: Set,
    errors: list[list[int]] | None = None,
) -> Block | None:
    """One block, or nothing where it has the excluded value. `errors` are [token][in], from `noise`."""
    v = [combine(a, s_i, par) for s_i in s]
    w = [combine(a, z_o, par) for z_o in z]
    added = errors or [[0] * len(s)] * par.n
    if par.is_fast and any((v[i][t] + added[t][i]) % par.q == EXCLUDED for i in range(len(s)) for t in range(par.n)):
        return None
    found = Block([], [], [])
    for t in range(par.n):
        r = [rounded(v_i[t] + e, par) for v_i, e in zip(v, added[t], strict=True)]
        u = [rounded(w_o[t], par) for w_o in w]
        total = sum(key * (par.q * x - par.p * v_i[t]) for key, x, v_i in zip(v_keys, r, v, strict=True))
        total -= sum(key * (par.q * x - par.p * w_o[t]) for key, x, w_o in zip(rho, u, w, strict=True))
        found.r.append(r)
        found.u.append(u)
        found.correction.append(total * pow(par.q, -1, 2**64) % 2**64)
    return found
