"""An accelerator that is a child process of this one, over shared memory."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from cloister.errors import AcceleratorLostError, OffloadError
from cloister.offload._client import ConnectedAccelerator, Timeouts
from cloister.offload._transport import Link, OwnerLink

_EXIT_S = 2.0
_MAX_LOG_BYTES = 4096
# What drivers, threads and the search for modules and libraries need. Nothing else goes along: an environment may hold
# credentials.
_PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|TMPDIR|LANG|LC_.*|LD_LIBRARY_PATH|PYTHON.*|(OMP|KMP|GOMP|MKL|CUDA|NVIDIA|TORCH|TRITON)_.*"
)


class LocalAccelerator(ConnectedAccelerator):
    """Starts `python -m cloister.offload` and is its only client; an `Accelerator`. Close it.

    The child has an environment without what is not needed, no terminal, and one end of a nameless connection. It ends
    with this process, or when the connection ends. `revive` kills it and starts another.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        timeouts: how long to wait for what.

    Raises:
        OffloadError: the process did not start, or has no such device.
    """

    def __init__(self, device: str = "auto", *, timeouts: Timeouts | None = None) -> None:
        super().__init__(timeouts)
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as this object
        try:
            self._open()
        except OffloadError:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"LocalAccelerator(device={self._device!r})"

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """See `Accelerator.close`. Waits until the process is gone."""
        super().close()
        self._log.close()

    def _open(self) -> None:
        try:
            super()._open()
        except AcceleratorLostError as error:
            self._drop()
            raise OffloadError(f"the accelerator did not start: {self._last_error() or error.cause}") from None

    def _connect(self) -> Link:
        ours, theirs = socket.socketpair()
        self._log.seek(0)
        self._log.truncate()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "cloister.offload", "--listen", f"fd:{theirs.fileno()}",
                     "--device", self._device],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log,
                    pass_fds=[theirs.fileno()], env=_environment(os.environ),
                )  # fmt: skip
        except OSError:
            ours.close()
            raise
        return OwnerLink(ours)

    def _drop(self) -> None:
        """Hang up, and see the process off: it ends by itself, unless it computes or was stopped."""
        super()._drop()
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S if self._closed else 0)
        self._process.kill()
        self._process.wait()
        self._process = None

    def _last_error(self) -> str:
        """The line `error: ...` of the process's log. The process is not trusted: printable characters only."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - _MAX_LOG_BYTES, 0))
        lines = self._log.read(_MAX_LOG_BYTES).decode("ascii", "replace").splitlines()
        found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return re.sub(r"[^ -~]", "?", found[-1])[:200] if found else ""


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """With threads that sleep while they wait: on shared cores they would take the time of the enclave's."""
    return {"OMP_WAIT_POLICY": "PASSIVE"} | {name: ours[name] for name in ours if _PASSED_ON.fullmatch(name)}
