"""The relay over real processes: it carries, survives every kill, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloister.enclave import HostServer, bind_host_socket
from cloister.federation import _flower
from cloister.federation._flower import ClientEndpoint
from cloister.federation._keys import generate_node_key, register_node_key
from cloister.federation._relay import Relay

pytestmark = pytest.mark.slow

PATIENCE_S = 120.0


class FakeEnclave:
    """Host port of a server enclave that sends each client `n_rounds` messages, and checks what comes back."""

    def __init__(self, clients: list[str], n_rounds: int) -> None:
        self._lock = threading.Lock()
        self._n_rounds = n_rounds
        self._in_flight: set[str] = set()
        self.n_answers = dict.fromkeys(clients, 0)
        self.errors: list[str] = []

    def blob(self, client: str) -> bytes:
        return f"{client}/{self.n_answers[client]}".encode()

    def __call__(self, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            if method == "deliver":
                self._deliver(body["client"], body["blob"], body["error"])
                return {}
            self._in_flight.intersection_update(body["carrying"])
            waiting = [c for c, n in self.n_answers.items() if n < self._n_rounds]
            send = [
                {"client": c, "attempt": 0, "blob": self.blob(c), "timeout_s": 60.0}
                for c in waiting
                if c not in self._in_flight
            ]
            self._in_flight.update(waiting)
            return {"send": send, "fetch": [], "done": not waiting, "wait_s": 0.1}

    def _deliver(self, client: str, blob: bytes | None, error: str | None) -> None:
        self._in_flight.discard(client)
        if error is not None:
            self.errors.append(error)
        elif blob == self.blob(client) + b" from " + client.encode():
            self.n_answers[client] += 1


class Bench:
    """A relay with doubles in place of the server enclave and the clients' processes."""

    def __init__(self, folder: Path, clients: list[str], *, n_rounds: int, **options: Any) -> None:
        self.clients = clients
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        self.enclave = FakeEnclave(clients, n_rounds)
        self.n_asked = dict.fromkeys(clients, 0)
        self._servers = [self._serve(folder / "the-server-enclave.sock", self.enclave)]
        self._servers += [self._serve(folder / f"{c}.sock", self._client(c)) for c in clients]
        self.relay = Relay(
            folder / "relay",
            clients={c: self._endpoint(c) for c in clients},
            server_socket=folder / "the-server-enclave.sock",
            on_event=self.events.append,
            **options,
        )

    def _serve(self, path: Path, handler: Callable[[str, dict[str, Any]], dict[str, Any]]) -> HostServer:
        server = HostServer(bind_host_socket(path), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def _client(self, name: str) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
        def handler(method: str, body: dict[str, Any]) -> dict[str, Any]:
            self.n_asked[name] += 1
            return {"blob": body["blob"] + b" from " + name.encode()}

        return handler

    def _endpoint(self, name: str) -> ClientEndpoint:
        private, public = self.folder / f"{name}.pem", self.folder / f"{name}.pub"
        generate_node_key(private)
        register_node_key(private, public)
        return ClientEndpoint(self.folder / f"{name}.sock", private, public)

    def wait(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not in time; {self.events} {self.enclave.errors}"
            self.relay.poll()
            time.sleep(0.05)
        return found

    def close(self) -> None:
        self.relay.stop()
        for server in self._servers:
            server.close()


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(clients: list[str], *, n_rounds: int, **options: Any) -> Bench:
        # pytest's own folders are too deep for the 107 bytes of a Unix socket's path.
        made.append(Bench(Path(tempfile.mkdtemp(prefix="cl-")), clients, n_rounds=n_rounds, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()
        shutil.rmtree(bench.folder, ignore_errors=True)


def is_gone(pid: int) -> bool:
    # Where nobody reaps orphans (a container without an init), the dead stay as zombies.
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_two_relays_at_once_carry_and_leave_nothing(make_bench: Callable[..., Bench]) -> None:
    """One as it is by default; one without TLS, whose nodes have no registered keys and say who they are."""
    benches = [make_bench(["a", "server"], n_rounds=2), make_bench(["a"], n_rounds=2, tls=False)]
    for bench in benches:
        bench.relay.start()
    for bench in benches:
        bench.wait(lambda bench=bench: bench.relay.is_done)
        assert bench.enclave.n_answers == dict.fromkeys(bench.clients, 2)
        assert bench.n_asked == bench.enclave.n_answers
        assert bench.events == []
    assert benches[0].relay.address != benches[1].relay.address
    processes = benches[0].relay.processes()
    assert {"keeper", "superlink", "server-superexec", "supernode-a", "superexec-a", "supernode-server"} <= set(
        processes
    )
    pids = [p for bench in benches for found in bench.relay.processes().values() for p in found]
    for bench in benches:
        bench.relay.stop()
    assert all(is_gone(pid) for pid in pids)


KILLED = ("superlink", "supernode-a", "serverapp", "clientapp-a", "superexec-a", "server-superexec", "keeper")


def test_it_survives_the_kill_of_any_of_its_processes(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(["a", "b"], n_rounds=10_000)
    bench.relay.start()
    bench.wait(lambda: min(bench.enclave.n_answers.values()) >= 1)
    for name in KILLED:
        (pid,) = bench.wait(lambda name=name: bench.relay.processes().get(name))
        before = dict(bench.enclave.n_answers)
        os.kill(pid, signal.SIGKILL)
        bench.wait(lambda before=before: all(n > before[c] for c, n in bench.enclave.n_answers.items()))
        assert is_gone(pid)
        restarted = [e["process"] for e in bench.events if e["event"] == "restart"]
        assert name in restarted
    pids = [p for found in bench.relay.processes().values() for p in found]
    bench.relay.stop()
    assert all(is_gone(pid) for pid in pids)
    bench.relay.stop()


ORCHESTRATOR = """
import sys, time
from pathlib import Path
from cloister.federation._relay import ClientEndpoint, Relay
folder = Path(sys.argv[1])
relay = Relay(folder / "relay", clients={"a": ClientEndpoint(folder / "s", folder / "a.pem", folder / "a.pub")},
              server_socket=folder / "s")
relay.start()
while "serverapp" not in relay.processes():
    relay.poll()
print(*[p for pids in relay.processes().values() for p in pids], flush=True)
time.sleep(600)
"""


def test_nothing_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    generate_node_key(tmp_path / "a.pem")
    register_node_key(tmp_path / "a.pem", tmp_path / "a.pub")
    argv = [sys.executable, "-c", ORCHESTRATOR, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 6
        run.kill()
    deadline = time.monotonic() + 20
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_runs_no_code_that_the_superlink_sends(
    make_bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil, trace = tmp_path / "app", tmp_path / "was-here"
    shutil.copytree(_flower.APP_FOLDER, evil, ignore=shutil.ignore_patterns("__pycache__"))
    module = evil / "cloister_courier/client.py"
    module.write_text(f"open({str(trace)!r}, 'w')\n{module.read_text(encoding='utf-8')}", encoding="utf-8")
    monkeypatch.setattr(_flower, "APP_FOLDER", evil)  # what is submitted; what clients expect stays the same
    bench = make_bench(["a"], n_rounds=1)
    bench.relay.start()
    bench.wait(lambda: bench.enclave.errors)
    assert not trace.exists()
    assert bench.n_asked == {"a": 0}
    log = (bench.folder / "relay/logs/clientapp-a.log").read_text(encoding="utf-8")
    assert "not this installation's courier" in log
