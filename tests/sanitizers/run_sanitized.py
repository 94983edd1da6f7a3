"""Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run their tests on that build.

The tests see a copy of the package in which the built module is the sanitized one, so nothing of the installation
changes. Exit code 0: the tests passed, and no kernel read or wrote outside of its arrays, nor did what C++ leaves open.

    python -m tests.sanitizers.run_sanitized [TEST ...]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nanobind
from tests.refusals.remove_checks import FORGET_THE_CHECKOUT

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize"
TESTS = ["tests/unit/native"]


def build() -> Path:
    """The sanitized module."""
    # A cmake of the environment that this runs in comes before one of the system.
    environment = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    options = {
        "CLOISTER_SANITIZE": "ON",
        "CMAKE_BUILD_TYPE": "Debug",
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind.cmake_dir(),
    }
    configure = ["cmake", "-S", ROOT / "native", "-B", BUILD, *(f"-D{name}={value}" for name, value in options.items())]
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD, "--parallel", "2"], check=True, env=environment)
    [module] = BUILD.glob("_native.*.so")
    return module


def overlay(module: Path) -> Path:
    """A folder with a copy of the package around the sanitized module, for PYTHONPATH."""
    folder = BUILD / "overlay"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "src/cloister", folder / "cloister", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(module, folder / "cloister" / "kernels")
    (folder / "sitecustomize.py").write_text(FORGET_THE_CHECKOUT, encoding="utf-8")
    return folder


def run(folder: Path, tests: list[str]) -> int:
    """The exit code of the tests."""
    # Before the C library, so before Python; and what throws, which the sanitizer looks for when it starts.
    preloaded = [_library("libasan.so"), _library("libstdc++.so.6")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(folder),
        "CLOISTER_EXPECT_PACKAGE": str(folder / "cloister"),
    }
    # A sanitizer's report goes to file descriptor 2, which pytest must leave as it is.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run([*command, *tests], cwd=ROOT, env=environment, check=False).returncode


def _library(name: str) -> str:
    """Where the compiler has it."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(run(overlay(build()), sys.argv[1:] or TESTS))
