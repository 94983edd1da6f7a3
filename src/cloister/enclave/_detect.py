"""Which hardening layers this kernel offers, asked without changing the process that asks."""

from __future__ import annotations

import errno

from cloister.attest import HARDENING_LAYERS
from cloister.enclave._kernel import ARCHITECTURES, Kernel, LinuxKernel
from cloister.enclave._secret import kernel_hides_memory

_PR_GET_DUMPABLE, _PR_GET_NO_NEW_PRIVS = 3, 39
_LANDLOCK_GET_VERSION = 1
_LANDLOCK_NET_VERSION, _LANDLOCK_SCOPE_VERSION = 4, 6
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FLAG_TSYNC = 1, 1


def available_layers() -> tuple[str, ...]:
    """The layers that `harden` would achieve here, in the order of `cloister.attest.HARDENING_LAYERS`.

    Only calls that read are made, and one that the kernel must refuse, so that the process stays as it is. A container
    can still forbid what its kernel offers: what a process achieved is what `harden` returns and its evidence says.
    """
    return layers_of(LinuxKernel())


def layers_of(kernel: Kernel) -> tuple[str, ...]:
    """`available_layers` on a given kernel; tests play others."""
    version = kernel.syscall("landlock_create_ruleset", None, 0, _LANDLOCK_GET_VERSION)
    offered = {
        "no_dump": kernel.syscall("prctl", _PR_GET_DUMPABLE, 0, 0, 0, 0) >= 0,
        "no_tracer": _is_untraced(kernel),
        "no_core": True,  # every process may lower its own limit
        "no_new_privs": kernel.syscall("prctl", _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) >= 0,
        "landlock": version >= 1,
        "landlock_net": version >= _LANDLOCK_NET_VERSION,
        "landlock_scope": version >= _LANDLOCK_SCOPE_VERSION,
        "seccomp": _filters(kernel),
        "memfd_secret": kernel_hides_memory(kernel),
    }
    return tuple(name for name in HARDENING_LAYERS if offered[name])


def _filters(kernel: Kernel) -> bool:
    """Whether a filter for all threads could be set: where it could, only the missing program is wrong (seccomp(2))."""
    if kernel.machine not in ARCHITECTURES:
        return False
    return kernel.syscall("seccomp", _SECCOMP_SET_MODE_FILTER, _SECCOMP_FLAG_TSYNC, None) == -errno.EFAULT


def _is_untraced(kernel: Kernel) -> bool:
    """Whether /proc says that nobody traces this process; a tracer of it would often trace its children too."""
    try:
        lines = kernel.process_status().splitlines()
    except OSError:
        return False
    return any(line.split() == ["TracerPid:", "0"] for line in lines)
