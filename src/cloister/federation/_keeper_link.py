"""The run's end of the line to its keeper (see `_keeper`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloister.errors import RelayError

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0
_BUFFER_BYTES = 4 << 20  # room for the events of hours in which nobody polls


class KeeperLink:
    """Starts a keeper and talks to it. One thread at a time.

    Args:
        folder: private folder with a short path, for the keeper's socket.
        env: the keeper's environment.
        log: its standard output and error.

    Raises:
        RelayError: it does not come up (Flower is not installed, say).
    """

    def __init__(self, folder: Path, *, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._events: deque[dict[str, Any]] = deque()
        self._buffer = b""
        self._pids: dict[str, int] = {}
        self._control, theirs = socket.socketpair()
        for end in (self._control, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cloister.federation._keeper", str(theirs.fileno()), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the run, which then takes the relay down in order
            )
        self._control.setblocking(False)

    def __repr__(self) -> str:
        return f"KeeperLink(pid={self._process.pid}, alive={self.is_alive})"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of what runs, by name, as far as `take_events` has been told."""
        return dict(self._pids)

    def wait_until_ready(self) -> None:
        """Blocks until Flower is loaded."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if any(event["event"] == "ready" for event in self.take_events()):
                return
            if not self.is_alive or time.monotonic() > deadline:
                raise RelayError("the relay's keeper process did not come up", hint=f"see {self._log}")
            time.sleep(0.02)

    def start(self, name: str, argv: list[str], **spec: object) -> None:
        """Starts a process under a name of its own; `spec` are the other fields of `_keeper.Spec`."""
        self._send(op="start", spec={"name": name, "argv": argv, **spec})

    def kill(self, name: str) -> None:
        """Kills the process of that name, if there is one; an exit event follows."""
        self._send(op="kill", name=name)

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call: `ready`, `started` (name, pid), `exit` (name, pid, code, output)."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self._control.recv(1 << 16):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for event in events:
            if event["event"] == "started":
                self._pids[event["name"]] = event["pid"]
            elif event["event"] == "exit" and self._pids.get(event["name"]) == event["pid"]:
                del self._pids[event["name"]]
        return events

    def close(self) -> None:
        """Takes everything down and returns once it is down. Safe to call twice."""
        self._control.close()  # the keeper sees the end of its line, kills all below it, and exits
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # Its children die with it: each has the kernel's parent-death signal.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_TIMEOUT_S)
        self._pids.clear()

    def _send(self, **request: object) -> None:
        self._control.setblocking(True)
        try:
            self._control.sendall(json.dumps(request).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is dead: `is_alive` says so, and whoever supervises starts another
        finally:
            self._control.setblocking(False)
