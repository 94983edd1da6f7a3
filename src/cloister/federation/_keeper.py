"""The keeper: one process that starts every Flower process of a relay and takes all of them with it when it goes.

Why not start them from the run itself: whoever runs a job may be killed at any moment, and nothing of the relay may
outlive it. The keeper makes that a property of the kernel and not of good manners:

- it ends when its control socket closes or its parent is gone, and kills every process below it first;
- every process it starts is its own direct child and dies with it (PR_SET_PDEATHSIG), should it be killed itself;
- a process that Flower's SuperExec asks for is started here too, so SuperExec has no children that could be left over;
- it is the reaper of whatever else comes below (PR_SET_CHILD_SUBREAPER).

It loads Flower once and forks, because every Flower process spends more than a second on imports alone; a run has two
for each client, two for the server and one more for every message. It stays single-threaded: forking is safe only so.

Talks JSON lines with `KeeperLink`. Carries no message of the run, holds no key.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = ("flwr.superlink.main", "flwr.supernode.main", "flwr.clientapp", "flwr.serverapp")
"""Loaded before the first fork to make the forks quick. Only that: a name that a release moves is skipped."""

COMMANDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp", "flwr")
DEACTIVATE = "cloister-deactivate"
APPS_SOCKET = "apps"
KILL_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36  # linux/prctl.h
_MAX_REQUEST_BYTES = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Spec:
    """What to start.

    Attributes:
        argv: a Flower command of `COMMANDS`, or `DEACTIVATE`, and its arguments.
        env: the whole environment.
        log: where standard output and error go.
        is_job: runs to its end; its standard output is sent back.
        guard: folder of the installed app; if set, no other app code may be imported (see `_app_guard`).
        apps: for a SuperExec: what it may start, by command.
    """

    name: str
    argv: list[str]
    env: dict[str, str]
    log: str
    is_job: bool = False
    guard: str = ""
    apps: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Child:
    spec: Spec
    owner: str = ""
    output: Path | None = None


class Keeper:
    """The keeper's loop. Args: control: connected to `KeeperLink`; folder: private, short path."""

    def __init__(self, control: socket.socket, folder: Path) -> None:
        self._control = control
        self._folder = folder
        self._parent = os.getppid()
        self._children: dict[int, _Child] = {}
        self._entries: dict[str, Callable[[], object]] = {}
        self._buffer = b""
        self._n_jobs = 0
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / APPS_SOCKET))
        self._listener.listen(16)

    def run(self) -> None:
        """Serves until told to stop, or until the parent is gone; leaves no process behind."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        try:
            self._preload()
            self._tell(event="ready")
            with selectors.DefaultSelector() as selector:
                for source in (self._control, self._listener, self._wake_read):
                    selector.register(source, selectors.EVENT_READ)
                while not self._stopping and os.getppid() == self._parent:
                    for key, _ in selector.select(timeout=1.0):
                        self._serve(key.fileobj)
                    self._reap()
        except BrokenPipeError:
            pass  # the parent is gone
        finally:
            self._kill_all()
            shutil.rmtree(self._folder, ignore_errors=True)  # keys; the parent may not be there to do it

    def _terminate(self, *_: object) -> None:
        self._stopping = True

    def _preload(self) -> None:
        # Seconds of imports, in which nobody looks at the control socket. A thread would not do: see the module's text.
        signal.signal(signal.SIGALRM, self._leave_if_alone)
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        scripts = {e.name: e for e in entry_points(group="console_scripts") if e.value.startswith("flwr.")}
        for command in COMMANDS:
            self._entries[command] = scripts[command].load()
        for module in PRELOAD:
            with contextlib.suppress(ImportError):
                import_module(module)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        gc.collect()
        gc.freeze()  # keeps the collector from touching, and so copying, the pages that the forks share

    def _leave_if_alone(self, *_: object) -> None:
        if os.getppid() != self._parent:
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(1)

    def _tell(self, **message: object) -> None:
        self._control.sendall(json.dumps(message).encode() + b"\n")

    # --- requests -----------------------------------------------------------------------------------------------

    def _serve(self, source: object) -> None:
        if source is self._control:
            self._read_control()
        elif source is self._listener:
            self._read_app_request()
        else:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)

    def _read_control(self) -> None:
        try:
            data = self._control.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._stopping = True
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request["op"] == "start":
                self._start(Spec(**request["spec"]))
            elif request["op"] == "kill":
                self._kill(request["name"])
            else:
                self._stopping = True

    def _read_app_request(self) -> None:
        """SuperExec wants an app process: `_app_shim` stands where it looks for Flower's command."""
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(1.0)
            data = b""
            try:
                while len(data) < _MAX_REQUEST_BYTES and (part := connection.recv(65536)):
                    data += part
                request = json.loads(data)
                owner, argv = str(request["role"]), [str(a) for a in request["argv"]]
            except (OSError, ValueError, KeyError, TypeError):
                return
        execs = [c.spec for c in self._children.values() if c.spec.name == owner]
        if execs and argv and argv[0] in execs[0].apps:
            self._start(Spec(argv=argv, **execs[0].apps[argv[0]]), owner=owner)

    # --- children -----------------------------------------------------------------------------------------------

    def _start(self, spec: Spec, owner: str = "") -> None:
        output = None
        if spec.is_job:
            self._n_jobs += 1
            output = self._folder / f"job-{self._n_jobs}"
        pid = os.fork()
        if pid == 0:
            self._become(spec, output)
        self._children[pid] = _Child(spec, owner, output)
        self._tell(event="started", name=spec.name, pid=pid)

    def _become(self, spec: Spec, output: Path | None) -> NoReturn:
        """The rest of a forked child's life. Never returns: the keeper's own clean-up must not run in a child."""
        code = 1
        try:
            keeper = os.getppid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:
                os._exit(1)  # the keeper died between fork and prctl
            os.setsid()
            _prctl(_PR_SET_NAME, ctypes.c_char_p(spec.name.encode()[:15]))
            _redirect(spec.log, output)
            for fd in (self._control.fileno(), self._listener.fileno(), self._wake_read, self._wake_write):
                os.close(fd)
            os.environ.clear()
            os.environ.update(spec.env)
            code = self._run_entry(spec)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _run_entry(self, spec: Spec) -> int:
        sys.argv = list(spec.argv)
        if spec.argv[0] == DEACTIVATE:
            from cloister.federation._deactivate import main

            return main(spec.argv[1:])
        if spec.guard:
            from cloister.federation._app_guard import guard_apps

            guard_apps(Path(spec.env["FLWR_HOME"]) / "apps", Path(spec.guard))
        result = self._entries[spec.argv[0]]()
        return result if isinstance(result, int) else 0

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            # What it left behind is in its own session. As long as it is not reaped, its number belongs to nobody else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(ended.si_pid, signal.SIGKILL)
            pid, status = os.waitpid(ended.si_pid, 0)
            child = self._children.pop(pid, None)
            if child is not None:
                self._after(child, pid, os.waitstatus_to_exitcode(status))

    def _after(self, child: _Child, pid: int, code: int) -> None:
        # An app without its SuperExec has nobody to report to.
        for other in [p for p, c in self._children.items() if c.owner == child.spec.name]:
            _kill_group(other)
        output = ""
        if child.output is not None:
            with contextlib.suppress(OSError):
                output = child.output.read_text(encoding="utf-8", errors="replace")
                child.output.unlink()
        self._tell(event="exit", name=child.spec.name, pid=pid, code=code, output=output)

    def _kill(self, name: str) -> None:
        for pid, child in self._children.items():
            if child.spec.name == name:
                _kill_group(pid)

    def _kill_all(self) -> None:
        """Kills until there is nothing left: orphans of a killed child come to us, so they turn up in the next turn."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while time.monotonic() < deadline:
            for pid in {*self._children, *_direct_children()}:
                _kill_group(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            self._children.pop(pid, None)
            if pid == 0:
                time.sleep(0.01)


def _ignore(*_: object) -> None:
    """Only wakes the selector."""


def _prctl(option: int, value: object) -> None:
    _libc.prctl(option, value, 0, 0, 0)


def _kill_group(pid: int) -> None:
    """Kills an own child that is not reaped yet, and its session. Between fork and setsid there is no such group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _direct_children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []  # a kernel without CONFIG_PROC_CHILDREN: the process groups cover what we started


def _redirect(log: str, output: Path | None) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    err = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    out = err if output is None else os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    for fd in {null, err, out}:
        os.close(fd)


def main() -> None:
    """`python -m cloister.federation._keeper FD FOLDER`."""
    with socket.socket(fileno=int(sys.argv[1])) as control:
        control.set_inheritable(False)
        Keeper(control, Path(sys.argv[2])).run()


if __name__ == "__main__":
    main()
