"""Compiled kernels of the enclave (native/): masking, unmasking, the check, pads. Used by pad and offload only."""

from __future__ import annotations

from cloister.errors import CloisterError

try:
    from cloister.kernels import _native as _native
except ImportError as error:
    raise CloisterError(
        f"cloister's compiled kernels are not here, or not for this Python and system: {error}",
        hint="install cloister with pip where there is a C++17 compiler (Debian, Ubuntu: apt-get install g++)",
    ) from error

__all__ = ["_native"]
