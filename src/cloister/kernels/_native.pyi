"""Kernels of the enclave, in C++ (native/). Arrays are C-contiguous; another shape or type is an error.

The library calls these after it has checked its input. Who may see what stands where they are called: pad, offload.
"""

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]

def levels() -> list[str]:
    """Instruction sets that this machine has, best first: "avx512", "avx2", "portable"."""

def level() -> str:
    """The one in use."""

def use_level(name: str) -> None:
    """Use another one; for tests and benchmarks. ValueError where the machine lacks it."""

def replace_rejected(row: U8, modulus: int, spares: U8) -> list[int]:
    """Replace bytes not below `modulus`, spec/pad.md section 3. `row` [n], starts with a group; `spares` [64 a group].

    Returns the groups with more rejected bytes than good spares, which were left unfinished.
    """
