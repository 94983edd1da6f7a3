"""Memory for long-lived keys: outside the kernel's own mappings where it offers that, else locked and never dumped."""

from __future__ import annotations

import mmap
import os

from cloister.enclave._kernel import Kernel, LinuxKernel


def kernel_hides_memory(kernel: Kernel) -> bool:
    """Whether memfd_secret works here (Linux 5.14; some distributions switch it off)."""
    descriptor = kernel.syscall("memfd_secret", 0)
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True


class SecretBytes:
    """A secret that lives in its own pages, which no core dump holds and which are zeroed at the end.

    With memfd_secret the pages are unmapped from the kernel, so that not even root reads them through /proc/PID/mem.
    Best effort all the same: Python copies bytes as it works, so whatever `reveal` returned lives on as ordinary memory
    until it is freed.

    Args:
        value: SECRET, not empty.
        kernel: the port; tests play others.
    """

    def __init__(self, value: bytes, *, kernel: Kernel | None = None) -> None:
        self._size = len(value)
        self._memory, self.hidden = _secret_memory(self._size, kernel or LinuxKernel())
        self._memory[: self._size] = value

    def __repr__(self) -> str:
        return f"SecretBytes({self._size} bytes)"

    def __len__(self) -> int:
        return self._size

    def reveal(self) -> bytes:
        """A copy of the secret in ordinary memory. SECRET: keep it short-lived.

        Raises:
            ValueError: it was closed.
        """
        return self._memory[: self._size]

    def close(self) -> None:
        """Zero and release the pages. May be called again."""
        if not self._memory.closed:
            self._memory[: self._size] = bytes(self._size)
            self._memory.close()


def _secret_memory(size: int, kernel: Kernel) -> tuple[mmap.mmap, bool]:
    descriptor = kernel.syscall("memfd_secret", 0)
    if descriptor >= 0:
        try:
            os.ftruncate(descriptor, size)
            return mmap.mmap(descriptor, size), True
        except OSError:
            # Locked memory is limited (RLIMIT_MEMLOCK): ordinary pages then.
            pass
        finally:
            os.close(descriptor)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memory, False
