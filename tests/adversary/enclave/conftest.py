"""Runs a script in a fresh process that hardens itself, and reads back what each attempt gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

PRELUDE = """
import ctypes, json, os, socket, subprocess, sys, threading
from pathlib import Path
from cloister.enclave import SecretBytes, bind_host_socket, harden, host_call, HostServer
from cloister.enclave._kernel import REFUSED_SYSCALLS, SYSCALLS, LinuxKernel, syscall_number

folder = Path(sys.argv[1])
work, read = folder / "work", folder / "read"
kernel = LinuxKernel()
results = {}

def attempt(name, action):
    try:
        value = action()
    except Exception as error:
        results[name] = type(error).__name__
    else:
        results[name] = value if isinstance(value, (bool, int, str, list)) else "ok"

def raw(name, *arguments):
    "errno of a refused system call, 0 where it was let through"
    number = syscall_number(name, kernel.machine, REFUSED_SYSCALLS | SYSCALLS)
    widened = [ctypes.c_long(a) for a in arguments]
    result = kernel._libc.syscall(ctypes.c_long(number), *widened)
    return ctypes.get_errno() if result < 0 else 0
"""


@pytest.fixture
def hardened(tmp_path: Path) -> Callable[[str], dict]:
    """Runs `script` after the prelude and returns its `results`; `work` is writable, `read` readable."""
    (tmp_path / "work").mkdir()
    (tmp_path / "read").mkdir()
    (tmp_path / "read" / "file").write_text("readable")
    (tmp_path / "secret").write_text("elsewhere")

    def run(script: str) -> dict:
        source = PRELUDE + textwrap.dedent(script) + "\nprint(json.dumps(results), flush=True)\n"
        environment = {**os.environ, "TMPDIR": str(tmp_path / "work"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", source, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
