"""The filter program, run by a small interpreter of classic BPF on both architectures."""

from __future__ import annotations

import errno

import pytest

from cloister.enclave import _seccomp
from cloister.enclave._kernel import REFUSED_SYSCALLS, SYSCALLS, LinuxKernel, syscall_number

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW = 0x7FFF0000
EPERM = 0x00050000 | errno.EPERM
ENOSYS = 0x00050000 | errno.ENOSYS
KILL = 0x80000000


def run(program, number: int, architecture: int, argument_0: int = 0) -> int:
    memory = {0: number, 4: architecture, 16: argument_0 & 0xFFFFFFFF}
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == 0x20:
            accumulator = memory[constant]
        elif code == 0x06:
            return constant
        else:
            holds = {
                0x15: accumulator == constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[code]
            at += if_true if holds else if_false


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request) -> str:
    return request.param


def test_program_fits_the_kernel(machine):
    program = _seccomp.build_filter(machine)
    assert len(program) < 4096
    assert all(0 <= jump <= 255 for _, *jumps, _ in program for jump in jumps)


def test_every_refused_call(machine):
    program = _seccomp.build_filter(machine)
    for name in REFUSED_SYSCALLS:
        number = syscall_number(name, machine, REFUSED_SYSCALLS)
        if number >= 0:
            assert run(program, number, ARCH[machine]) == EPERM, name


def test_ordinary_calls_are_allowed(machine):
    program = _seccomp.build_filter(machine)
    ordinary = {"x86_64": [0, 1, 9, 202, 257, 288, 53], "aarch64": [63, 64, 222, 98, 56, 242, 199]}[machine]
    for number in ordinary:  # read, write, mmap, futex, openat, accept4, socketpair
        assert run(program, number, ARCH[machine]) == ALLOW, number


def test_another_architecture_is_killed(machine):
    program = _seccomp.build_filter(machine)
    other = ARCH["aarch64" if machine == "x86_64" else "x86_64"]
    assert run(program, 0, other) == KILL
    assert run(program, 0, 0x40000003) == KILL  # 32-bit x86


def test_x32_calls_are_refused():
    program = _seccomp.build_filter("x86_64")
    assert run(program, 0x40000000 | 59, ARCH["x86_64"]) == EPERM
    assert run(program, 0x40000000, ARCH["x86_64"]) == EPERM


def test_prctl_cannot_undo_the_hardening(machine):
    program = _seccomp.build_filter(machine)
    number = syscall_number("prctl", machine, SYSCALLS)
    assert run(program, number, ARCH[machine], 4) == EPERM
    assert run(program, number, ARCH[machine], 0x59616D61) == EPERM
    assert run(program, number, ARCH[machine], 15) == ALLOW  # PR_SET_NAME


def test_threads_may_start_and_processes_may_not(machine):
    program = _seccomp.build_filter(machine)
    number = syscall_number("clone", machine, SYSCALLS)
    thread = 0x003D0F00  # what glibc's pthread_create passes
    assert run(program, number, ARCH[machine], thread) == ALLOW
    assert run(program, number, ARCH[machine], 0x01200011) == EPERM  # fork
    assert run(program, number, ARCH[machine], thread | 0x10000000) == EPERM  # with a user namespace
    assert run(program, syscall_number("clone3", machine, SYSCALLS), ARCH[machine]) == ENOSYS


def test_unknown_machine_has_no_filter():
    kernel = LinuxKernel()
    kernel.machine = "riscv64"
    assert not _seccomp.install_filter(kernel)
    assert syscall_number("seccomp", "riscv64", SYSCALLS) == -1
    assert syscall_number("fork", "aarch64", REFUSED_SYSCALLS) == -1
