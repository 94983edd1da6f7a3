"""The system-call filter of the enclave process: a classic BPF program that refuses what an enclave never needs."""

from __future__ import annotations

import ctypes
import errno
import struct

from cloister.enclave._kernel import ARCHITECTURES, REFUSED_SYSCALLS, SYSCALLS, Kernel, syscall_number

# linux/bpf_common.h, linux/filter.h: class | size or operation | mode.
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
# linux/seccomp.h: return actions, and where struct seccomp_data keeps what we look at (little-endian machines).
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
_ALLOW = 0x7FFF0000
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENT_0 = 0, 4, 16
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_X32_BIT = 0x40000000  # system calls of the x32 interface have this bit, and other numbers
_SET_MODE_FILTER = 1
_FLAG_TSYNC = 1  # all threads, or none

_PR_SET_DUMPABLE = 4
_PR_SET_PTRACER = 0x59616D61
_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWNS

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def build_filter(machine: str) -> list[Instruction]:
    """The program for `machine` ("x86_64" or "aarch64"). Public; deterministic.

    It refuses (EPERM) every call of `REFUSED_SYSCALLS`, a new process or namespace, and undoing PR_SET_DUMPABLE. It
    says that clone3 does not exist, since its flags are out of a filter's sight and libc then falls back to clone. A
    call of another architecture kills the process. Everything else is allowed, new threads included.
    """
    refuse: Instruction = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    allow: Instruction = (_RETURN, 0, 0, _ALLOW)
    program: list[Instruction] = [
        (_LOAD_WORD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD_WORD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [(_JUMP_AT_LEAST, 0, 1, _X32_BIT), refuse]
    for name in REFUSED_SYSCALLS:
        number = syscall_number(name, machine, REFUSED_SYSCALLS)
        if number >= 0:
            program += [(_JUMP_EQUAL, 0, 1, number), refuse]
    program += [
        (_JUMP_EQUAL, 0, 1, syscall_number("clone3", machine, SYSCALLS)),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_JUMP_EQUAL, 0, 5, syscall_number("prctl", machine, SYSCALLS)),
        (_LOAD_WORD, 0, 0, _OFFSET_ARGUMENT_0),
        (_JUMP_EQUAL, 1, 0, _PR_SET_DUMPABLE),
        (_JUMP_EQUAL, 0, 1, _PR_SET_PTRACER),
        refuse,
        allow,
        (_JUMP_EQUAL, 0, 4, syscall_number("clone", machine, SYSCALLS)),
        (_LOAD_WORD, 0, 0, _OFFSET_ARGUMENT_0),
        (_JUMP_ANY_BIT, 1, 0, _CLONE_NAMESPACES),
        (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD),
        refuse,
        allow,
    ]
    return program


def install_filter(kernel: Kernel) -> bool:
    """Put the filter on every thread of this process. It cannot be taken off again.

    Returns:
        False where the kernel or the machine has no such filter. no_new_privs must be set before.
    """
    if kernel.machine not in ARCHITECTURES:
        return False
    instructions = build_filter(kernel.machine)
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)
    return kernel.syscall("seccomp", _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(program)) == 0
