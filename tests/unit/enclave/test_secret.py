from __future__ import annotations

import errno
import os

import pytest

from cloister.enclave import SecretBytes
from cloister.enclave._kernel import LinuxKernel
from cloister.enclave._secret import kernel_hides_memory


class NoSecretMemory(LinuxKernel):
    def syscall(self, name, *arguments):
        return -errno.ENOSYS if name == "memfd_secret" else super().syscall(name, *arguments)


class NoRoom(LinuxKernel):
    """A descriptor that cannot be mapped, as when locked memory is used up."""

    def syscall(self, name, *arguments):
        return os.open("/dev/null", os.O_RDONLY) if name == "memfd_secret" else super().syscall(name, *arguments)


@pytest.mark.parametrize("kernel", [LinuxKernel(), NoSecretMemory(), NoRoom()])
def test_keeps_and_forgets(kernel):
    secret = SecretBytes(b"\x01" * 48, kernel=kernel)
    assert secret.hidden == (type(kernel) is LinuxKernel and kernel_hides_memory(kernel))
    assert len(secret) == 48
    assert secret.reveal() == b"\x01" * 48
    assert "48" in repr(secret)
    assert "x01" not in repr(secret)
    secret.close()
    secret.close()
    with pytest.raises(ValueError, match="closed"):
        secret.reveal()


def test_default_kernel():
    secret = SecretBytes(b"k")
    assert secret.reveal() == b"k"
    secret.close()


def test_report_of_the_kernel():
    assert not kernel_hides_memory(NoSecretMemory())
    assert kernel_hides_memory(NoRoom())
