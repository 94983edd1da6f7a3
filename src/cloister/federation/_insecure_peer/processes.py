"""Starts and stops the peer's Flower: one SuperLink, one SuperNode for each client. No TLS, no authentication."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from cloister._process_tree import TreeWatch
from cloister.errors import RelayError
from cloister.federation._flower import free_port
from cloister.federation._insecure_peer.job import RESULT_FILE, STATE_FILE, InsecurePeerJob, round_file
from cloister.federation._insecure_peer.wire_count import HOST, CountingProxy, counting_proxy

APP = Path(__file__).parent / "app"
CONNECTION = "insecure-peer"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TAIL_CHARS = 3000


def run_insecure_peer(
    job: InsecurePeerJob,
    *,
    count_wire: bool = False,
    timeout_s: float = 3600.0,
    keep: Path | None = None,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains with plain Flower in processes of its own, and takes all of them down again. Nothing is protected.

    Args:
        count_wire: put a counting proxy between SuperNodes and SuperLink. Costs a little time.
        keep: folder that gets the final state, and the logs where it fails.
        on_round: called at the end of each round with its number.

    Returns:
        metric: accuracy of the final global model on the test set (causal-lm: of its tokens); loss: its mean loss.
        wall_s: from the first process started to the metric; the take-down is not in it.
        train_s: from the first training message to the last aggregate.
        loop_s: time in the training loops alone: mean over clients, added up over rounds.
        example_s, example_cpu_s: of these loops for an example, over all clients and rounds.
        losses: of each round's steps, the mean.
        n_trained: trainable parameters.
        payload_bytes: arrays that went down to the clients and up again.
        wire_bytes: what the SuperNodes' sockets carried, both ways; None without `count_wire`.
        peak_rss_bytes, sum_rss_bytes, largest_rss_bytes: by process; of all at once; of the largest one.

    Raises:
        RelayError: Flower did not come to a result.
    """
    with tempfile.TemporaryDirectory(prefix="flower-peer-") as scratch, TreeWatch(os.getpid(), itself=False) as memory:
        began = time.perf_counter()
        with _Federation(Path(scratch), count_wire=count_wire, keep=keep, on_round=on_round) as federation:
            found = federation.train(job, deadline=time.monotonic() + timeout_s)
            wall_s = time.perf_counter() - began
            wire_bytes = federation.wire_bytes
        if keep is not None:
            shutil.copy(Path(scratch) / STATE_FILE, keep / STATE_FILE)
    rounds = found.pop("rounds").values()
    return {
        **found,
        "wall_s": wall_s,
        "loop_s": sum(metrics["train_seconds"] for metrics in rounds),
        "example_s": statistics.fmean(metrics["train_seconds_per_example"] for metrics in rounds),
        "example_cpu_s": statistics.fmean(metrics["train_cpu_seconds_per_example"] for metrics in rounds),
        "losses": [metrics["train_loss"] for metrics in rounds],
        "wire_bytes": wire_bytes,
        "peak_rss_bytes": memory.by_process,
        "sum_rss_bytes": memory.sum_bytes,
        "largest_rss_bytes": memory.largest_bytes,
    }


class _Federation:
    """SuperLink and SuperNodes of one run."""

    def __init__(
        self, folder: Path, *, count_wire: bool, keep: Path | None, on_round: Callable[[int], None] | None
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._on_round = on_round
        self._n_rounds = 0
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._count_wire = count_wire
        self._cleanup = contextlib.ExitStack()
        self._proxy: CountingProxy | None = None
        self.address = ""

    def __enter__(self) -> _Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._cleanup.close()

    @property
    def wire_bytes(self) -> int | None:
        return self._proxy.n_bytes if self._proxy else None

    def train(self, job: InsecurePeerJob, *, deadline: float) -> dict[str, Any]:
        self._start_superlink()
        fleet = self.address
        if self._count_wire:
            self._proxy = self._cleanup.enter_context(counting_proxy(self.address))
            fleet = self._proxy.address
        for number, path in enumerate(job.train):
            config = f"client-id={number} train-path={json.dumps(str(path))}"
            argv = ["flower-supernode", "--insecure", "--superlink", fleet, "--host", HOST, "--port", str(free_port()),
                    "--node-config", config]  # fmt: skip
            self._start(f"client-{number}", argv)
        result = self._folder / RESULT_FILE
        config = job.run_config(self._folder)
        self._start("run", ["flwr", "run", str(APP), CONNECTION, "--stream", "--run-config", config])
        while not result.exists():
            time.sleep(0.05)
            self._tell_rounds()
            # `flwr run --stream` ends with the run; the result is there before that.
            dead = {name: code for name, p in self._processes.items() if (code := p.poll()) is not None}
            if (dead or time.monotonic() > deadline) and not result.exists():
                raise self._failure(f"came to no result, ended: {', '.join(dead) or 'nothing in time'}")
        self._tell_rounds()
        return json.loads(result.read_text(encoding="utf-8"))

    def _tell_rounds(self) -> None:
        while round_file(self._folder, self._n_rounds + 1).exists():
            self._n_rounds += 1
            if self._on_round is not None:
                self._on_round(self._n_rounds)

    def _start_superlink(self) -> None:
        port = free_port()
        self.address = f"{HOST}:{port}"
        home = self._home("superlink")
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "{self.address}"\ninsecure = true\n',
            encoding="utf-8",
        )
        argv = ["flower-superlink", "--insecure", "--host", HOST, "--port", str(port),
                "--disable-runtime-dependency-installation"]  # fmt: skip
        self._start("superlink", argv)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _listens(port):
            if self._processes["superlink"].poll() is not None or time.monotonic() > deadline:
                raise self._failure("has no SuperLink: it did not come up")
            time.sleep(0.05)

    def _start(self, name: str, argv: Sequence[str]) -> None:
        binaries = Path(sys.executable).parent
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith("FLWR_")}
        env |= {
            "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(self._home("superlink" if name == "run" else name)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
            "HF_HUB_OFFLINE": "1",
        }
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [str(binaries / argv[0]), *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  one call into the kernel, no lock is taken
            )

    def _home(self, name: str) -> Path:
        folder = self._folder / "home" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _stop(self) -> None:
        """Ends every process of this federation: the ones started here, and by their FLWR_HOME all others."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while (left := self._left()) and time.monotonic() < deadline:
            for process in self._processes.values():
                process.poll()
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
        for process in self._processes.values():
            process.wait(STOP_TIMEOUT_S)

    def _left(self) -> list[psutil.Process]:
        prefix, found = str(self._folder), []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.environ().get("FLWR_HOME", "").startswith(prefix):
                    found.append(process)
        return found

    def _failure(self, what: str) -> RelayError:
        """With the logs kept, or where there is no place for them with their ends in the hint."""
        logs = sorted(self._folder.glob("*.log"))
        if self._keep is not None:
            for log in logs:
                shutil.copy(log, self._keep / log.name)
            return RelayError(f"plain Flower {what}", hint=f"see the logs in {self._keep}")
        ends = (f"--- {p.name}\n{p.read_text(encoding='utf-8', errors='replace')[-_TAIL_CHARS:]}" for p in logs)
        return RelayError(f"plain Flower {what}", hint="\n".join(ends))


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
