"""Arrays of a seed, without torch: the sanitizers run these tests too. Each owns its memory, whose ends they watch."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import strategies as st

MODULI = {0: (256, 255, 253, 251), 1: (256, 256, 256)}
RINGS = (0, 1)

# Around the widths of vectors and of the kernels' own blocks, and anything else.
WIDTHS = st.sampled_from([1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 256, 257, 300]) | st.integers(1, 80)
TOKENS = st.integers(1, 3)
SEEDS = st.integers(0, 2**32 - 1)


def integers(seed: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Any value of `dtype`, each as likely."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = hashlib.shake_256(f"{seed} {np.dtype(dtype)} {shape}".encode()).digest(n_bytes)
    return np.frombuffer(found, dtype).reshape(shape).copy()


def floats(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Uniform in [-scale, scale)."""
    return (integers(seed, shape, np.int32) * (scale * 2.0**-31)).astype(np.float32)


def pads(seed: int, shape: tuple[int, ...], ring: int) -> np.ndarray:
    """[planes, *shape]: residues, or digits."""
    planes = [integers(seed * 8 + i, shape, np.uint32) % m for i, m in enumerate(MODULI[ring])]
    return np.stack(planes).astype(np.uint8)


def bits(array: np.ndarray) -> list[object]:
    """Floats as their bits, for comparisons that know of -0 and NaN; anything else as it is."""
    kinds = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}
    return array.view(kinds.get(array.dtype, array.dtype)).tolist()
