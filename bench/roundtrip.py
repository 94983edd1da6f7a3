"""Time of one empty round-trip through cloister's couriers, beside a plain Flower app's.

A round sends an empty message to every client and ends when all have answered. Both run on Flower's deployment runtime
over TLS on loopback: one SuperLink, one SuperNode for each client. `ours` goes from the server enclave's host port
through both couriers to the client's process and back, with node authentication and a SuperLink that survives a kill;
`peer` goes from ServerApp to ClientApp, started by Flower's own commands with Flower's own defaults.

    python bench/roundtrip.py [--quick] [--pairs 5] [--rounds 4] [--clients 3] [--out bench/results/roundtrip.csv]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import load_average, out_path, row, write_csv

from cloister.enclave import HostServer, bind_host_socket
from cloister.federation import ClientEndpoint, Relay, generate_node_key, register_node_key
from cloister.federation._flower import free_port
from cloister.federation._tls import make_tls

ECHO_APP = Path(__file__).parent / "peers" / "flower_echo_app"
CONNECTION = "bench"
TIMEOUT_S = 600.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Timing:
    """One federation: until it could send, and every round after that."""

    start_s: float
    rounds_s: list[float]


# --- ours -------------------------------------------------------------------------------------------------------------


class _EchoEnclave:
    """Host port of a server enclave that has nothing to say: round after round, an empty message to every client."""

    def __init__(self, clients: list[str], n_rounds: int) -> None:
        self._lock = threading.Lock()
        self._clients = clients
        self._n_rounds = n_rounds
        self._unsent = set(clients)
        self._unanswered = set(clients)
        self._began = 0.0
        self.ready_at = 0.0
        self.rounds_s: list[float] = []

    def __call__(self, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            return self._poll(body["nodes"]) if method == "poll" else self._deliver(body)

    def _poll(self, nodes: list[str]) -> dict[str, Any]:
        done = len(self.rounds_s) == self._n_rounds
        send: list[dict[str, Any]] = []
        if not done and set(self._clients) <= set(nodes):
            if not self.ready_at:
                self.ready_at = time.time()
            if self._unsent == set(self._clients):
                self._began = time.perf_counter()
            send = [{"client": c, "attempt": 0, "blob": b"", "timeout_s": 60.0} for c in self._unsent]
            self._unsent = set()
        return {"send": send, "fetch": [], "done": done, "wait_s": 0.2}

    def _deliver(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if body["blob"] is None:
            self._unsent.add(body["client"])
            return {}
        self._unanswered.discard(body["client"])
        if not self._unanswered:
            self.rounds_s.append(time.perf_counter() - self._began)
            self._unsent, self._unanswered = set(self._clients), set(self._clients)
        return {}


def time_ours(n_clients: int, n_rounds: int) -> Timing:
    """Rounds over our relay, with an echo in place of each client's process."""
    names = [f"client-{number}" for number in range(n_clients)]
    enclave = _EchoEnclave(names, n_rounds)
    with tempfile.TemporaryDirectory(prefix="cl-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        _serve(stack, folder / "server", enclave)
        endpoints = {}
        for name in names:
            _serve(stack, folder / name, lambda method, body: {"blob": body["blob"]})
            private, public = folder / f"{name}.pem", folder / f"{name}.pub"
            generate_node_key(private)
            register_node_key(private, public)
            endpoints[name] = ClientEndpoint(folder / name, private, public)
        began = time.time()
        relay = stack.enter_context(Relay(folder / "relay", clients=endpoints, server_socket=folder / "server"))
        deadline = time.monotonic() + TIMEOUT_S
        while not relay.is_done:
            relay.poll()
            if time.monotonic() > deadline:
                raise TimeoutError("the relay did not come to an end")
            time.sleep(0.05)
    return Timing(enclave.ready_at - began, enclave.rounds_s)


def _serve(stack: contextlib.ExitStack, path: Path, handler: Any) -> None:
    server = HostServer(bind_host_socket(path), handler)
    stack.callback(server.close)
    threading.Thread(target=server.serve_forever, daemon=True).start()


# --- plain Flower -----------------------------------------------------------------------------------------------------


def time_peer(n_clients: int, n_rounds: int) -> Timing:
    """Rounds of a plain Flower app."""
    with tempfile.TemporaryDirectory(prefix="cl-") as scratch, contextlib.ExitStack() as stack:
        folder, port = Path(scratch), free_port()
        tls = make_tls(folder, "127.0.0.1")
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\nroot-certificates = "{tls.ca}"\n',
            encoding="utf-8",
        )
        began = time.time()
        _start(stack, folder, "superlink", ["flower-superlink", "--host", "127.0.0.1", "--port", str(port),
               "--ssl-certfile", str(tls.certificate), "--ssl-keyfile", str(tls.key), "--ssl-ca-certfile", str(tls.ca),
               "--disable-runtime-dependency-installation"])  # fmt: skip
        for number in range(n_clients):
            _start(stack, folder, f"node-{number}", ["flower-supernode", "--superlink", f"127.0.0.1:{port}",
                   "--root-certificates", str(tls.ca), "--host", "127.0.0.1", "--port", str(free_port())])  # fmt: skip
        result = folder / "result.json"
        config = f'num-clients={n_clients} num-server-rounds={n_rounds} result-path="{result}"'
        _submit(folder, config)
        deadline = time.monotonic() + TIMEOUT_S
        while not result.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the plain app did not come to an end")
            time.sleep(0.05)
        found = json.loads(result.read_text(encoding="utf-8"))
    return Timing(found["ready_at"] - began, found["rounds_s"])


def _submit(folder: Path, config: str) -> None:
    """`flwr run`, again until the SuperLink is up."""
    argv = [str(_binaries() / "flwr"), "run", str(ECHO_APP), CONNECTION, "--run-config", config, "--format", "json"]
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        done = subprocess.run(argv, env=_env(folder), capture_output=True, text=True, check=False)
        if '"success": true' in done.stdout:
            return
        time.sleep(0.5)
    raise TimeoutError(f"flwr run: {done.stdout} {done.stderr}")


def _start(stack: contextlib.ExitStack, folder: Path, name: str, argv: list[str]) -> None:
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(_binaries() / argv[0]), *argv[1:]],
            env=_env(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 (it only makes one system call)
        )
    stack.callback(_stop, process)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Flower's SuperExec notices within a second that its parent is gone, and its apps that it is.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _binaries() -> Path:
    return Path(sys.executable).parent


def _env(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("FLWR_")}
    path = f"{_binaries()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    own = {"PATH": path, "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**kept, **own, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}


def main() -> None:
    """Both in alternation; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one pair of two rounds, one client")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    n_pairs, n_rounds, n_clients = (1, 2, 1) if args.quick else (args.pairs, args.rounds, args.clients)
    ours: list[Timing] = []
    peer: list[Timing] = []
    for number in range(n_pairs):
        print(f"pair {number + 1} of {n_pairs}, load average {load_average():.1f}", file=sys.stderr)
        ours.append(time_ours(n_clients, n_rounds))
        peer.append(time_peer(n_clients, n_rounds))
    # The first round is left out: it waits for the nodes' first look, and unpacks the app.
    steady = [[statistics.fmean(t.rounds_s[1:]) for t in times] for times in (ours, peer)]
    rows = [
        row(f"empty round-trip, {n_clients} clients", *steady, unit="s", goal="<= 1"),
        row(f"first empty round-trip, {n_clients} clients", *_each(ours, peer, lambda t: t.rounds_s[0]), unit="s"),
        row(f"start until {n_clients} nodes are there", *_each(ours, peer, lambda t: t.start_s), unit="s"),
    ]
    write_csv(out_path("roundtrip", args.out, quick=args.quick), rows)


def _each(ours: list[Timing], peer: list[Timing], value: Any) -> tuple[list[float], list[float]]:
    return [value(t) for t in ours], [value(t) for t in peer]


if __name__ == "__main__":
    main()
