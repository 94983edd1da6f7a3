"""The few system calls that hardening needs and Python does not offer, behind one small port."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Protocol

# Numbers from the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64); None where an architecture has
# no such call.
SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "memfd_secret": (447, 447),
    "prctl": (157, 167),
    "seccomp": (317, 277),
}
# Refused for good. First what the design names (network, programs, other processes' memory, kernel interfaces), then
# the calls that would be a way around it: other doors to mounts, to clocks, to modules, to files by handle.
REFUSED_SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "mount": (165, 40),
    "umount2": (166, 39),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "fork": (57, None),
    "vfork": (58, None),
}
ARCHITECTURES = ("x86_64", "aarch64")


class Kernel(Protocol):
    """What hardening asks of the kernel. Tests play kernels that lack a feature."""

    machine: str

    def syscall(self, name: str, *arguments: object) -> int:
        """Call `name` of `SYSCALLS`; the result, or minus errno."""
        ...

    def process_status(self) -> str:
        """The text of /proc/self/status."""
        ...


class LinuxKernel:
    """The kernel below, called through libc."""

    def __init__(self) -> None:
        self.machine = platform.machine()
        self._libc = ctypes.CDLL(None, use_errno=True)

    def syscall(self, name: str, *arguments: object) -> int:
        """Call `name`; the result, or minus errno. Whole numbers are passed as 64-bit values."""
        number = syscall_number(name, self.machine, SYSCALLS)
        # Variadic C: every argument must be widened by hand, or its upper half is undefined.
        widened = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        result: int = self._libc.syscall(ctypes.c_long(number), *widened)
        return result if result >= 0 else -ctypes.get_errno()

    def process_status(self) -> str:
        """The text of /proc/self/status."""
        return Path("/proc/self/status").read_bytes().decode(errors="replace")


def syscall_number(name: str, machine: str, table: dict[str, tuple[int | None, int | None]]) -> int:
    """The number of a call on `machine`; -1, which no kernel knows, where it has none."""
    if machine not in ARCHITECTURES:
        return -1
    number = table[name][ARCHITECTURES.index(machine)]
    return -1 if number is None else number


def error_text(result: int) -> str:
    """Words for a negative result of `Kernel.syscall`."""
    return os.strerror(-result)
