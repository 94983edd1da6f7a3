"""This machine's simulated platform: one software Intel a machine, as there is one processor."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from cloister.attest import SimulatedRoot
from cloister.errors import StoreError

HOME_VARIABLE = "CLOISTER_HOME"


def cloister_home() -> Path:
    """Where cloister keeps what belongs to this machine and user: $CLOISTER_HOME, or the XDG data folder."""
    if found := os.environ.get(HOME_VARIABLE):
        return Path(found)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "cloister"


def simulated_platform() -> SimulatedRoot:
    """The platform's root and keys (*secret* to this user; no secret from root), made at first use.

    It outlives runs, so a policy can pin its root before a run starts. The collateral is issued afresh at every start
    of an enclave, as a real platform would fetch it.

    Raises:
        StoreError: the folder cannot be written.
    """
    home = cloister_home()
    folder, now = home / "simulated", int(time.time())
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (home / "simulated.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several runs may start at once
            if not folder.is_dir() or not any(folder.iterdir()):
                return SimulatedRoot.create(folder, now=now)
            root = SimulatedRoot.open(folder)
            root.refresh(now)
            return root
    except OSError as error:
        raise StoreError(
            f"cannot write {home}: {error.strerror}", path=str(home), hint=f"set {HOME_VARIABLE} to a folder of yours"
        ) from error


def provision(backend: str) -> bytes:
    """What the launcher hands to an enclave of `backend` after hardening. *Secret*; empty for a real TEE, which holds
    its own."""
    return simulated_platform().provision() if backend == "simulated" else b""
