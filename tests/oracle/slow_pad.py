"""A second implementation of spec/pad.md: pads, their terms, the words of the check. Slow, and no line of cloister's.

Python integers, one element at a time; AES-256 in ECB mode on counters that are written out here.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from tests.oracle import slow_kernels, slow_ring

Matrix = list[list[int]]
V = b"cloister-pad/v1"


def enc(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def expand_label(secret: bytes, *labels: bytes) -> bytes:
    """HKDF-Expand-SHA256 for 32 bytes: one block of RFC 5869 section 2.3."""
    return hmac.new(secret, enc(V, *labels) + b"\x01", hashlib.sha256).digest()


def stream_key(job_key: bytes, job: int, layer: str, direction: str) -> bytes:
    return expand_label(job_key, b"stream", struct.pack(">Q", job), layer.encode(), direction.encode())


def block_key(key: bytes, index: int, fresh: bytes) -> bytes:
    return expand_label(key, b"block", struct.pack(">Q", index), fresh)


def key_byte(key: bytes, plane: int, modulus: int, round_: int, offset: int) -> int:
    counter = bytes([plane, modulus - 1, round_]) + bytes(5) + struct.pack(">Q", offset // 16)
    # ECB of single counters is CTR by hand, which is what this oracle is for.
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counter)[offset % 16]  # noqa: S305


def residue(key: bytes, plane: int, modulus: int, position: int) -> int:
    """The residue at `position` of a block (0 .. 65535)."""
    byte = key_byte(key, plane, modulus, 0, position)
    if byte < modulus:
        return byte
    group = position // 1024
    rank = sum(key_byte(key, plane, modulus, 0, other) >= modulus for other in range(group * 1024, position))
    for round_ in range(1, 65):
        for spare in range(64):
            byte = key_byte(key, plane, modulus, round_, group * 64 + spare)
            if byte < modulus:
                if rank == 0:
                    return byte
                rank -= 1
    raise AssertionError("not random")


def expand(block_keys: dict[int, bytes], position: int, n: int, moduli: tuple[int, ...]) -> list[list[int]]:
    return [
        [residue(block_keys[p >> 16], plane, modulus, p & 0xFFFF) for p in range(position, position + n)]
        for plane, modulus in enumerate(moduli)
    ]


def unmask_term(w: Matrix, r: list[Matrix], name: str) -> Matrix:
    """W r in [0, m), of a pad [planes][tokens][in]."""
    pad = [
        [slow_kernels.element(list(planes), name) for planes in zip(*rows, strict=True)]
        for rows in zip(*r, strict=True)
    ]
    m = slow_ring.MODULUS[name]
    return [[entry % m for entry in row] for row in slow_ring.integer_product(pad, w)]


def check_words(w: Matrix, rho: list[int]) -> list[int]:
    """V = W^T rho modulo 2^64."""
    return [sum(a * b for a, b in zip(column, rho, strict=True)) % 2**64 for column in zip(*w, strict=True)]
