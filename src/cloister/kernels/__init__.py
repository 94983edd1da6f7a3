"""Compiled kernels of the enclave (native/): masking, unmasking, the check, pads. Used by pad and offload only."""

from __future__ import annotations

try:
    from cloister.kernels import _native as _native
except ImportError as error:
    raise ImportError(
        "cloister's compiled kernels are missing: install it with pip and a C++17 compiler (apt-get install g++)"
    ) from error

__all__: list[str] = []
