"""Which layers a kernel offers: on played kernels, and here, against what a real process achieves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.attest import HARDENING_LAYERS
from cloister.enclave import available_layers
from cloister.enclave._detect import layers_of

CHANGING_CALLS = {"prctl_4", "prctl_38", "landlock_restrict_self", "landlock_add_rule"}


class FakeKernel:
    """Offers everything, unless told otherwise."""

    def __init__(self, *, landlock: int = 7, status: str = "TracerPid:\t0\n", machine="x86_64", **results: int) -> None:
        self.machine = machine
        self.landlock = landlock
        self.status = status
        self.results = results
        self.calls: list[str] = []

    def syscall(self, name: str, *arguments) -> int:
        if name == "prctl":
            name = f"prctl_{arguments[0]}"
        self.calls.append(name)
        if name in self.results:
            return self.results[name]
        if name == "landlock_create_ruleset":
            assert arguments == (None, 0, 1)
            return self.landlock
        if name == "seccomp":
            assert arguments == (1, 1, None)
            return -errno.EFAULT
        return os.open("/dev/null", os.O_RDONLY) if name == "memfd_secret" else 0

    def process_status(self) -> str:
        if not self.status:
            raise PermissionError(errno.EACCES, "Permission denied")
        return self.status


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in HARDENING_LAYERS if name not in names)


def test_a_kernel_that_offers_everything():
    kernel = FakeKernel()
    assert layers_of(kernel) == HARDENING_LAYERS
    assert not set(kernel.calls) & CHANGING_CALLS


@pytest.mark.parametrize(
    ("kernel", "missing"),
    [
        (FakeKernel(landlock=6), ()),
        (FakeKernel(landlock=5), ("landlock_scope",)),
        (FakeKernel(landlock=3), ("landlock_net", "landlock_scope")),
        (FakeKernel(landlock=-errno.EOPNOTSUPP), ("landlock", "landlock_net", "landlock_scope")),
        (FakeKernel(memfd_secret=-errno.ENOSYS), ("memfd_secret",)),
        (FakeKernel(seccomp=-errno.EINVAL), ("seccomp",)),
        (FakeKernel(machine="riscv64"), ("seccomp",)),
        (FakeKernel(prctl_3=-errno.EPERM), ("no_dump",)),
        (FakeKernel(prctl_39=-errno.EINVAL), ("no_new_privs",)),
        (FakeKernel(status="Name:\tx\nTracerPid:\t41\n"), ("no_tracer",)),
        (FakeKernel(status="Name:\tx\n"), ("no_tracer",)),
        (FakeKernel(status=""), ("no_tracer",)),
    ],
)
def test_each_layer_that_a_kernel_lacks(kernel, missing):
    assert layers_of(kernel) == without(*missing)


def test_here_as_a_real_process_achieves_it_and_without_a_trace(tmp_path):
    """One process asks, shows that it has stayed as it was, hardens itself, and says what it got."""
    code = """
import json, os, pathlib, resource, sys
from cloister.enclave import available_layers, harden
def state():
    fields = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    names = ("NoNewPrivs", "Seccomp", "Seccomp_filters", "TracerPid", "Threads")
    return [fields.get(n) for n in names] + [resource.getrlimit(resource.RLIMIT_CORE), len(os.listdir("/proc/self/fd"))]
before = state()
offered = available_layers()
after = state()
achieved = harden(work_dirs=[pathlib.Path(sys.argv[1])], read_dirs=[])
print(json.dumps([before, after, offered, achieved]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    before, after, offered, achieved = json.loads(done.stdout)
    assert before == after
    assert offered == achieved
    assert tuple(offered) == available_layers()
