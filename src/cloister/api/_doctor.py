"""What this machine has: attestation backends, hardening, versions, and whether the processes of a run would start."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import psutil

from cloister import __version__
from cloister.attest import HARDENING_LAYERS, detect_backends
from cloister.config import EnclaveConfig
from cloister.enclave import REQUIRED_LAYERS, available_layers

from ._platform import cloister_home

_PACKAGES = ("torch", "transformers", "flwr", "cryptography", "dcap-qvl")
_FLOWER = ("flower-superlink", "flower-supernode")
_START_TIMEOUT_S = 120  # seconds of imports on a small, busy machine


def examine_machine() -> dict[str, Any]:
    """What `cloister doctor` prints; JSON types only. Looks, and changes nothing: no report is asked for.

    Nothing of it is proven. The backends are in the order in which they should be preferred.
    """
    layers = available_layers()
    return {
        "backends": [
            {"type": b.type, "found": b.found, "has": list(b.has), "missing": list(b.missing), "hint": b.hint}
            for b in detect_backends()
        ],
        # A job names its backend. None is chosen for it, and there is no fall-back to a weaker one.
        "job_backend": EnclaveConfig().backend,
        "layers": [
            {"name": name, "available": name in layers, "required": name in REQUIRED_LAYERS}
            for name in HARDENING_LAYERS
        ],
        "versions": {
            "cloister": __version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "flower": [_start(name) for name in _FLOWER],
        "memory": {"total": psutil.virtual_memory().total, "available": psutil.virtual_memory().available},
        "disk": [_disk(Path.cwd()), _disk(cloister_home())],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _start(command: str) -> dict[str, Any]:
    """Whether a Flower process starts far enough to tell its version. It opens no connection for that."""
    path = shutil.which(command, path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    if path is None:
        return {"command": command, "starts": False, "why": "not installed beside this Python"}
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_START_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"command": command, "starts": False, "why": type(error).__name__}
    return {"command": command, "starts": done.returncode == 0, "why": "" if done.returncode == 0 else "it failed"}


def _disk(folder: Path) -> dict[str, Any]:
    """Free space where `folder` is, or will be."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(there).free}
