"""Starts, watches and stops the processes of one run on this machine: server enclave, clients, and the relay."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.enclave import host_call
from cloister.errors import CloisterError, EnclaveError, FederationError, error_for_code
from cloister.federation import ClientEndpoint, Relay

from ._events import Event, EventFile, EventTail, OnEvent
from ._memory import MemoryWatch
from ._platform import provision
from ._process import BUG_CODE, EXIT_BUG

if TYPE_CHECKING:
    from cloister.config import Job

    from ._folder import RunFolder

QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Idle OpenMP threads sleep instead of spinning. Several processes share the cores of one machine here, and a thread
that spins takes the core from the one it waits for: small steps were 16 times slower on two busy cores."""

MAX_RESTARTS = 3
STOP_TIMEOUT_S = 5.0
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Programs:
    """What a run starts; tests put doubles in their place.

    Attributes:
        server, client, enclave_client, accelerator: argument lists to which the run's own arguments are added.
        relay: builds the relay.
        env: added to the environment of our own processes.
    """

    server: Sequence[str] = (sys.executable, "-m", "cloister.api._server_main")
    client: Sequence[str] = (sys.executable, "-m", "cloister.api._client_main")
    enclave_client: Sequence[str] = (sys.executable, "-m", "cloister.api._enclave_client_main")
    accelerator: Sequence[str] = (sys.executable, "-m", "cloister.api._accelerator_main")
    relay: Callable[..., Relay] = Relay
    env: Mapping[str, str] = field(default_factory=dict)


class Child:
    """One of our own processes, with how often it was started."""

    def __init__(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path, secret: bytes = b""
    ) -> None:
        self.name = name
        self._argv = list(argv)
        self._env = {**QUIET_THREADS, **os.environ, **env}
        self._log = log
        self._secret = secret
        self.n_starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"Child({self.name!r}, n_starts={self.n_starts})"

    def start(self) -> None:
        """Starts the process; the secret, if any, goes over its standard input and nowhere else."""
        self.n_starts += 1
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._argv, "--parent", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )
        if self.process.stdin is None:
            raise EnclaveError(f"{self.name} has no standard input")
        try:
            self.process.stdin.write(self._secret)
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; `code` tells why

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self.process.poll() if self.process is not None else None

    def stop(self, patience_s: float = STOP_TIMEOUT_S) -> None:
        """Terminates the process and everything it started; after `patience_s` without asking."""
        if self.process is None:
            return
        for sig, patience in ((signal.SIGTERM, patience_s), (signal.SIGKILL, STOP_TIMEOUT_S)):
            if self.process.poll() is not None:
                break
            os.killpg(self.process.pid, sig)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


class Launch:
    """All processes of a run. Use as a context manager: leaving it stops every one of them, whatever happened."""

    def __init__(self, job: Job, folder: RunFolder, *, on_event: OnEvent, programs: Programs | None = None) -> None:
        self._job = job
        self._folder = folder
        self._programs = programs or Programs()
        self._sockets = Path(tempfile.mkdtemp(prefix="cloister-"))
        self._on_event = on_event
        self._tail = EventTail()
        self._log = EventFile(folder.events, "run")
        self._relay: Relay | None = None
        self._failures: list[Event] = []
        self.phase = ""
        self.is_done = False
        self.memory = MemoryWatch()
        self.server = self._server_child()
        has_enclaves = job.method.name == "enclave"
        self.accelerators = {n: self._accelerator_child(n) for n in job.client_names if self._needs_accelerator(n)}
        client_child = self._enclave_client_child if has_enclaves else self._client_child
        self.clients = {name: client_child(name) for name in job.client_names}
        for path in (folder.events, *map(self._events_of, ("server", *self.clients))):
            self._tail.skip(path)  # what was said before this start: told, and no reason for anything now

    # --- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    def start_server(self) -> None:
        """Starts the server enclave alone, for predictions on this machine."""
        self.server.start()

    def start(self) -> None:
        """Starts everything."""
        self.start_server()
        for child in self.accelerators.values():
            child.start()
        for child in self.clients.values():
            child.start()
        self._relay = relay = self._programs.relay(
            self._folder.relay,
            clients={name: self._endpoint(name) for name in self.clients},
            server_socket=self.server_socket,
            tls=self._job.federation.tls,
            port=self._job.federation.port,
            on_event=lambda event: self.emit(event.pop("event"), **event),
        )
        relay.start()

    def poll(self) -> None:
        """One look at everything: passes events on, restarts what was killed.

        Raises:
            CloisterError: the run cannot go on.
        """
        self.drain()
        for child in (self.server, *self.accelerators.values(), *self.clients.values()):
            self._revive(child)
        if self._relay is not None:
            self._relay.poll()
        self.memory.sample(self.pids())

    def stop_relay(self) -> None:
        """Takes the relay down; the server enclave and the clients stay."""
        if self._relay is not None:
            self._relay.stop()
            self._relay = None

    def stop(self) -> None:
        """Takes everything down; safe to call twice."""
        self.stop_relay()
        for child in (*self.clients.values(), self.server, *self.accelerators.values()):
            child.stop()
        self.drain()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def pids(self) -> dict[str, list[int]]:
        """Process ids by role, for tests that kill them and for memory figures."""
        children = (self.server, *self.accelerators.values(), *self.clients.values())
        own = {c.name: [c.process.pid] for c in children if c.process and c.code is None}
        return own | (self._relay.processes() if self._relay is not None else {})

    @property
    def server_socket(self) -> Path:
        return self._sockets / "server"

    def client_socket(self, name: str) -> Path:
        return self._sockets / f"c{sorted(self._job.client_names).index(name)}"

    def _endpoint(self, name: str) -> ClientEndpoint:
        folder = self._folder
        return ClientEndpoint(self.client_socket(name), folder.node_key(name), folder.registered_key(name))

    # --- children -------------------------------------------------------------------------------------------------

    def _server_child(self) -> Child:
        argv = [*self._programs.server, "--run", str(self._folder.path), "--socket", str(self.server_socket)]
        secret = provision(self._job.enclave.backend)
        return Child("server", argv, env=self._programs.env, log=self._folder.logs / "server.log", secret=secret)

    def _client_child(self, name: str) -> Child:
        argv = [*self._programs.client, "--run", str(self._folder.path), "--name", name,
                "--socket", str(self.client_socket(name))]  # fmt: skip
        log = self._folder.logs / f"client-{name}.log"
        return Child(f"client/{name}", argv, env=self._shared_cores(), log=log)

    def start_asking(self, name: str) -> Path:
        """Starts one client's enclave to answer its own questions, with its accelerator. Returns its host port."""
        if name in self.accelerators:
            self.accelerators[name].start()
        child = self.clients[name] = self._enclave_client_child(name, "--ask")
        child.start()
        self._wait_until_serving(self.client_socket(name), child.name)
        return self.client_socket(name)

    def _needs_accelerator(self, name: str) -> bool:
        return self._job.method.name == "enclave" and self._job.client(name).accelerator is None

    def _accelerator_address(self, name: str) -> str:
        number = sorted(self._job.client_names).index(name)
        return self._job.client(name).accelerator or f"unix:{self._sockets / f'a{number}'}"

    def _enclave_client_child(self, name: str, *options: str) -> Child:
        argv = [*self._programs.enclave_client, "--run", str(self._folder.path), "--name", name,
                "--socket", str(self.client_socket(name)), "--accelerator", self._accelerator_address(name),
                *options]  # fmt: skip
        secret = provision(self._job.enclave.backend)
        log = self._folder.logs / f"client-{name}.log"
        return Child(f"client/{name}", argv, env=self._shared_cores(), log=log, secret=secret)

    def _accelerator_child(self, name: str) -> Child:
        argv = [*self._programs.accelerator, "--connect", self._accelerator_address(name)]
        log = self._folder.logs / f"accelerator-{name}.log"
        return Child(f"accelerator/{name}", argv, env=self._shared_cores(), log=log)

    def _shared_cores(self) -> dict[str, str]:
        """Every client computes at the same time, and on this machine they share the cores."""
        threads = max(1, (os.cpu_count() or 1) // len(self._job.client_names))
        return {"OMP_NUM_THREADS": str(threads), **os.environ, **self._programs.env}

    def _revive(self, child: Child) -> None:
        code = child.code
        if code is None or child.process is None:
            return
        if code < 0 and child.n_starts <= MAX_RESTARTS:
            self.emit("restart", process=child.name, attempt=child.n_starts)
            child.start()
            return
        self.drain()
        raise self._why(child, code)

    def _why(self, child: Child, code: int) -> CloisterError:
        """The most telling error: what a client said of itself before what the server heard of it."""
        told = sorted(
            (e for e in self._failures if e["code"] != BUG_CODE),
            key=lambda event: not str(event["source"]).startswith("client/"),
        )
        if told:
            return error_for_code(told[0]["code"])(told[0]["cause"], hint=told[0].get("hint", ""))
        log = child.name.replace("/", "-")
        what = f"was killed {child.n_starts} times" if code < 0 else f"exited with {code}"
        if code == EXIT_BUG:
            what = "met a bug"
        return FederationError(
            f"{child.name} {what}", peer=child.name, hint=f"see {self._folder.logs / f'{log}.log'}; then resume the run"
        )

    # --- events ---------------------------------------------------------------------------------------------------

    def emit(self, event: str, **fields: object) -> None:
        """An event of the run itself."""
        self._log.emit(event, **fields)
        self.drain()

    def drain(self) -> None:
        """Passes on what the processes have said since the last call, in one file and to the caller."""
        for name in ("server", *self.clients):
            for event in self._tail.read(self._events_of(name)):
                if (name, event["event"]) != ("server", "progress"):  # the client's own is finer
                    self._log.append(event)
        for event in self._tail.read(self._folder.events):
            self._notice(event)
            self._on_event(event)

    def _notice(self, event: Event) -> None:
        if event["event"] == "error" and (event.get("fatal") or str(event["source"]).startswith("client/")):
            self._failures.append(event)
        elif event["event"] == "phase" and event["source"] == "server":
            self.phase = f"{event['phase']}/{event['status']}"
        elif event["event"] == "done" and event["source"] == "server":
            self.is_done = True

    def _events_of(self, name: str) -> Path:
        base = self._folder.server if name == "server" else self._folder.client(name)
        return base / "events.jsonl"

    # --- talking to the server enclave -----------------------------------------------------------------------------

    def wait_until_serving(self) -> None:
        """Blocks until the server enclave answers on its host port with a trained model."""
        self._wait_until_serving(self.server_socket, "server")

    def _wait_until_serving(self, socket_path: Path, name: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.poll()
            if socket_path.exists():
                try:
                    if host_call(socket_path, "status", {}, timeout_s=5.0)["serving"]:
                        return
                except EnclaveError:
                    pass  # it listens before it answers: hardening comes in between
            time.sleep(0.1)
        log = name.replace("/", "-")
        raise EnclaveError(f"the enclave {name} did not come up", hint=f"see {self._folder.logs / f'{log}.log'}")
