"""Kernels of the enclave, in C++ (native/). Arrays are C-contiguous; another shape or type is an error.

The library calls these after it has checked its input. Who may see what stands where they are called: pad, offload.
"""

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

def levels() -> list[str]:
    """Instruction sets that this machine has, best first: "avx512", "avx2", "portable"."""

def level() -> str:
    """The one in use."""

def use_level(name: str) -> None:
    """Use another one; for tests and benchmarks. ValueError where the machine lacks it."""

def replace_rejected(row: U8, modulus: int, spares: U8) -> list[int]:
    """Replace bytes not below `modulus`, spec/pad.md section 3. `row` [n], starts with a group; `spares` [64 a group].

    Returns the groups with more rejected bytes than good spares, which were left unfinished. `modulus` is 129 to 255.
    """

def mask(
    x: F32, fold: F32 | None, room: float, r: U8, ring: int, v: U64, planes: I8, scales: F64, sums: U64
) -> bool:  # fmt: skip
    """Quantise rows (spec/pad.md section 2.2) and add their pad. All is *secret* but `planes`, which is *masked*.

    s = ||x * fold|| / room for each token, 0 for a row of zeros, and x_q = rint(x * fold / s): `room` is the norm of
    what is rounded, as in `quantize_rows`.

    Args:
        x: [tokens, features], *secret*. Where there is `fold` [features], it is multiplied by that in binary32.
        room: from 1 to 2^31 - 1.
        r: [planes, tokens, features], *secret*: the pad. It is spent, whatever the result.
        ring: `RingFormat.CODE`.
        v: [features], *secret*: of the check of the answer.
        planes: [planes, tokens, features], gets x_q + r, *masked*: the accelerator may read it at any time.
        scales: [tokens], gets s, *secret*.
        sums: [tokens], gets the sum of v * x_q modulo 2^64, *secret*.

    Returns:
        False where x * fold has a NaN or infinite value: then `planes`, `scales` and `sums` are all zero, and nothing
        masked was written.
    """

def unmask(
    answer: U32, u: U32, ring: int, scales: F64, channel: F32 | None, bias: F32 | None, rho: U64, expected: U64, y: F32
) -> bool:  # fmt: skip
    """Take the pad off an answer, check it, and scale it: y = y_q * scale * channel + bias.

    y_q = answer - u, in (-m/2, m/2], for any `answer`. The products are of binary64, from left to right, and rounded to
    binary32 once; the bias is added in binary32.

    Args:
        answer: [tokens, out], *masked*. Each element is read once: the accelerator may write into it meanwhile.
        u: [tokens, out], *secret*: the pad's own product.
        ring: `RingFormat.CODE`.
        scales: [tokens], *secret*, from `mask`.
        channel, bias: [out], *public*.
        rho: [out], *secret*.
        expected: [tokens], *secret*: what the sum of rho * y_q must be, modulo 2^64.
        y: [tokens, out], gets the result, *secret*.

    Returns:
        False where the sum of any token is another: then `y` is all zero.
    """

def encode_pad(r: U8, ring: int, planes: I8) -> None:
    """The balanced planes of a pad alone, *secret*: both are [planes, n]."""

def combine(acc: I32, ring: int, out: U32) -> None:
    """The elements in [0, m), to `out` [n], of exact accumulators [planes, n]; spec/pad.md section 1.3. *Secret*."""

def lattice_digits(stream: U8, digits: I8) -> None:
    """Five digits of base 3, less 1, of each byte below 243, lowest first, to `digits` [at most 5 a byte]. *Secret*."""

def lattice_encode(values: I64, ring: int, keys: U32) -> None:
    """Transform secrets, `values` [rank * 1024, features], each below 2^34 in size, into `keys`. *Secret*.

    `keys` is [blocks of 16 features, primes, rank, 1024, 16], the last block filled up with zeros; its order of the
    transform is the kernels' own.
    """

def lattice_block(
    ring: int, a: U32, s: U32, z: U32, v: U64, rho: U64, noise: U8 | None, r: U8, u: U32, correction: U64, first: int
) -> bool:  # fmt: skip
    """One block of 1,024 lattice pads, to the rows from `first` of `r`, `u` and `correction`. All of it is *secret*.

    Args:
        ring: `RingFormat.CODE`.
        a: [primes, rank, 1024], below the prime: the values at psi^(2 i + 1).
        s, z: from `lattice_encode`, of the `in` and of the `out` features.
        v, rho: [in] and [out], of the check of the answer.
        noise: [2, 1024, in], of the ring fast: what is added to v is noise[0] mod 9 + 9 (noise[1] mod 5) - 22.
        r: [planes, tokens, in], gets round(p v / Q) in the planes of a pad.
        u: [tokens, out], gets round(p w / Q) in [0, p).
        correction: [tokens], gets the sum of V (Q r - p v) less that of rho (Q u - p w), over Q, modulo 2^64.

    Returns:
        False where a value of v is the excluded one: nothing written may be used, and `a` is to be drawn again.
    """

def lattice_preimages(counts: U8) -> bool:
    """Round every v of fast, for tests: `counts` [2^24] gets how many are rounded to each r, without the excluded one.

    Returns whether the rounding of `lattice_block` and the definition agree on every v.
    """
