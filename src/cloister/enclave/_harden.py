"""Hardening of the simulated enclave process: what it does to itself before it receives any secret.

What this protects from: other processes of the same user that start later, core dumps, stray file and network leaks.
What it does not protect from: root, the kernel, whoever launched the process, a debugger that was attached first. It is
not a TEE, and nothing that cloister prints calls it one.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

from cloister.attest import HARDENING_LAYERS
from cloister.enclave._kernel import Kernel, LinuxKernel
from cloister.enclave._landlock import confine
from cloister.enclave._seccomp import install_filter
from cloister.enclave._secret import kernel_hides_memory
from cloister.errors import HardeningError

# Every Linux that torch supports has these. Landlock (5.13, and not in every container) and memfd_secret (5.14) are
# reported, and a policy can require them.
REQUIRED_LAYERS = frozenset({"no_dump", "no_tracer", "no_core", "no_new_privs", "seccomp"})

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39

# What Python, torch and libc read while they run. Single files of /etc in place of all of it.
_SYSTEM_READ = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/group",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/ssl",
    "/dev/random",
    "/dev/urandom",
    "/proc",
    "/sys/devices",
    "/sys/fs/cgroup",
    "/sys/kernel/mm",
)
_SYSTEM_READ_WRITE = ("/dev/full", "/dev/null", "/dev/zero")


def harden(
    *, work_dirs: Iterable[Path], read_dirs: Iterable[Path], require: frozenset[str] = REQUIRED_LAYERS
) -> tuple[str, ...]:
    """Harden this process for good, before it has any secret and before it has a second thread.

    Success means that every layer in the result holds for this process and for all threads that it starts. Import torch
    and numpy only afterwards: they start threads, and a thread that is there already would stay outside the file rules.
    A socket that is bound and listening before can still accept connections.

    Args:
        work_dirs: folders that may be written; they must exist.
        read_dirs: folders or files that may be read, besides the system's libraries and this Python installation.
        require: layers without which the process must not go on.

    Returns:
        The achieved layers, in the order of `cloister.attest.HARDENING_LAYERS`. They belong into the evidence.

    Raises:
        HardeningError: a required layer is missing, a debugger is attached, or other threads run already.
    """
    return harden_with(LinuxKernel(), work_dirs=work_dirs, read_dirs=read_dirs, require=require)


def harden_with(
    kernel: Kernel, *, work_dirs: Iterable[Path], read_dirs: Iterable[Path], require: frozenset[str]
) -> tuple[str, ...]:
    """`harden` on a given kernel; tests play others."""
    unknown = require - set(HARDENING_LAYERS)
    if unknown:
        raise HardeningError(f"unknown hardening layers: {', '.join(sorted(unknown))}")
    layers: list[str] = []
    kernel.syscall("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    if kernel.syscall("prctl", _PR_GET_DUMPABLE, 0, 0, 0, 0) == 0:
        layers.append("no_dump")
    # After no_dump, so that nobody of this user can attach between the look and the lock.
    _check_alone(kernel)
    layers.append("no_tracer")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    layers.append("no_core")
    kernel.syscall("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if kernel.syscall("prctl", _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1:
        layers.append("no_new_privs")
    layers += confine(
        kernel,
        write=list(work_dirs),
        read=[*read_dirs, *_python_folders(), *_existing(_SYSTEM_READ)],
        read_write=_existing(_SYSTEM_READ_WRITE),
    )
    if kernel_hides_memory(kernel):
        layers.append("memfd_secret")
    if install_filter(kernel):
        layers.append("seccomp")
    missing = require - set(layers)
    if missing:
        raise HardeningError(
            f"required hardening layers are missing: {', '.join(sorted(missing))}",
            hint="run on Linux 4.14 or newer, on x86_64 or aarch64, outside of restrictive containers",
        )
    return tuple(name for name in HARDENING_LAYERS if name in layers)


def _check_alone(kernel: Kernel) -> None:
    """No debugger and no second thread."""
    try:
        status = kernel.process_status()
    except OSError as error:
        raise HardeningError(f"cannot read /proc/self/status: {error.strerror}", hint="mount /proc") from None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    tracer, threads = int(fields.get("TracerPid", "-1")), int(fields.get("Threads", "-1"))
    if tracer != 0:
        raise HardeningError(
            f"a debugger or tracer is attached to the enclave process (TracerPid {tracer})",
            hint="start it without strace, gdb or a debugging IDE",
        )
    if threads != 1:
        raise HardeningError(
            f"{threads} threads run before hardening, and file rules would not hold for them",
            hint="harden before importing torch or numpy and before starting threads",
        )


def _python_folders() -> list[Path]:
    """Where this interpreter and this package are loaded from; not the whole of sys.path, which names work folders."""
    package = Path(__file__).resolve().parent.parent
    return _existing({sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, str(package)})


def _existing(paths: Iterable[str]) -> list[Path]:
    # os.path.exists: a path that this user may not look at counts as missing, where Path.exists would raise.
    return [Path(path) for path in sorted(paths) if os.path.exists(path)]  # noqa: PTH110
