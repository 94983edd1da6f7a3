"""File, network and signal rules that the enclave process puts on itself (Landlock, linux/landlock.h)."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from cloister.enclave._kernel import Kernel, error_text
from cloister.errors import HardeningError

_GET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FIRST_VERSION = (1 << 13) - 1
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NET_BIND_TCP, _NET_CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1, 2

_READ = _READ_FILE | _READ_DIR
# Devices and sockets are never made, and nothing is ever executed, not even in a work folder.
_NEVER = _EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_BLOCK | _IOCTL_DEV


def confine(kernel: Kernel, *, write: Iterable[Path], read: Iterable[Path], read_write: Iterable[Path]) -> list[str]:
    """Confine this thread, and every thread it starts later, to the given paths.

    Args:
        kernel: the port.
        write: folders in which files may be made, changed, moved and removed.
        read: folders or files that may be read.
        read_write: single files, such as /dev/null, that may also be written.

    Returns:
        Achieved layers, out of "landlock", "landlock_net" and "landlock_scope"; empty on a kernel without Landlock.

    Raises:
        HardeningError: a path does not exist, or the kernel has Landlock and refuses a rule.
    """
    version = kernel.syscall("landlock_create_ruleset", None, 0, _GET_VERSION)
    if version <= 0:
        return []
    handled = _FIRST_VERSION | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled |= _IOCTL_DEV if version >= 5 else 0
    net = _NET_BIND_TCP | _NET_CONNECT_TCP if version >= 4 else 0
    scope = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= 6 else 0
    # The structure grew with the versions; an older kernel refuses the longer one unless the rest is zero, which it is.
    attributes = struct.pack("=QQQ", handled, net, scope)
    ruleset = _checked(kernel.syscall("landlock_create_ruleset", attributes, len(attributes), 0), "make a ruleset")
    try:
        for paths, rights in ((write, handled & ~_NEVER), (read, _READ), (read_write, _READ_FILE | _WRITE_FILE)):
            for path in paths:
                _allow(kernel, ruleset, path, rights & handled)
        _checked(kernel.syscall("landlock_restrict_self", ruleset, 0), "restrict this process")
    finally:
        os.close(ruleset)
    return ["landlock"] + (["landlock_net"] if net else []) + (["landlock_scope"] if scope else [])


def _allow(kernel: Kernel, ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise HardeningError(f"cannot confine the enclave to {path}: {error.strerror}") from None
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        # struct landlock_path_beneath_attr is packed: u64 rights, s32 descriptor.
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
        _checked(kernel.syscall("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, rule, 0), f"allow {path}")
    finally:
        os.close(descriptor)


def _checked(result: int, purpose: str) -> int:
    if result < 0:
        # Half a sandbox would look like a whole one.
        raise HardeningError(f"Landlock is there and cannot {purpose}: {error_text(result)}")
    return result
