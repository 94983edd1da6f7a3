"""The peer of every table: plain Flower, PEFT LoRA or prefix, FedAvg, as a user of Flower would write it; no security.

The app is in `flower_lora_app/`. It runs on Flower's deployment runtime: one SuperLink, one SuperNode for each client,
all on loopback with Flower's own defaults, without TLS and without authentication. Rounds x local epochs = epochs. The
final global model is tested once, on the common test set, by the ServerApp.

    python bench/peers/flower_lora.py --model FOLDER --train A.jsonl B.jsonl --test T.jsonl --labels 10 [--layers upper]

Data: JSON lines of `text` and `label` (an index). One JSON object with the result goes to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench._common import TreeWatch

APP = Path(__file__).parent / "flower_lora_app"
CONNECTION = "bench"
HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class PeerJob:
    """What is trained, on whose data.

    Attributes:
        model: folder of a BERT-like sentence encoder.
        train: one file for each client.
        test: the common test set.
        n_labels: number of classes.
        layers: "all", as a user would have it; "upper" puts LoRA on the blocks from `cut_layer` on only.
        epochs: in all; each round has `epochs / rounds` local ones.
        rounds: None means one for each epoch.
        evaluate_every_round: also have the clients evaluate the global model after every round, as the tutorial does.
        num_threads: of torch in each app process; 0 leaves the choice to torch, as a user would.
        adapter: LoRA, or the prefix of P-tuning v2.
        backbone_dropout: train with the dropout of the model's configuration.
        initial: a state of the app's own names to begin with; None lets the app draw one.
    """

    model: Path
    train: tuple[Path, ...]
    test: Path
    n_labels: int
    max_length: int = 128
    layers: Literal["all", "upper"] = "all"
    cut_layer: int = 3
    r: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 32
    epochs: int = 3
    rounds: int | None = None
    seed: int = 0
    evaluate_every_round: bool = False
    num_threads: int = 0
    adapter: Literal["lora", "prefix"] = "lora"
    prefix_tokens: int = 16
    backbone_dropout: bool = True
    initial: Path | None = None

    def run_config(self, result_dir: Path) -> str:
        """For `flwr run --run-config`."""
        rounds = self.rounds or self.epochs
        if self.epochs % rounds:
            raise ValueError(f"{self.epochs} epochs do not divide into {rounds} rounds")
        values: dict[str, object] = {
            "num-server-rounds": rounds,
            "local-epochs": self.epochs // rounds,
            "fraction-evaluate": float(self.evaluate_every_round),
            "num-clients": len(self.train),
            "model-path": str(self.model),
            "num-labels": self.n_labels,
            "max-length": self.max_length,
            "adapter": self.adapter,
            "prefix-tokens": self.prefix_tokens,
            "backbone-dropout": self.backbone_dropout,
            "initial-path": str(self.initial or ""),
            "lora-r": self.r,
            "lora-alpha": float(self.alpha),
            "first-layer": self.cut_layer if self.layers == "upper" else 0,
            "learning-rate": self.lr,
            "weight-decay": self.weight_decay,
            "batch-size": self.batch_size,
            "seed": self.seed,
            "num-threads": self.num_threads,
            "test-path": str(self.test),
            "result-dir": str(result_dir),
        }
        return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def run_peer(job: PeerJob, *, count_wire: bool = False, timeout_s: float = 3600.0) -> dict[str, Any]:
    """Trains with Flower in processes of its own, and takes all of them down again.

    Args:
        count_wire: put a counting proxy between SuperNodes and SuperLink. Costs a little time.

    Returns:
        metric: accuracy of the final global model on the test set.
        wall_s: from the first process started to the metric; the take-down is not in it.
        train_s: from the first training message to the last aggregate.
        loop_s: time in the training loops alone: mean over clients, added up over rounds.
        example_s, example_cpu_s: of these loops for an example, over all clients and rounds.
        payload_bytes: arrays that went down to the clients and up again.
        wire_bytes: what the SuperNodes' sockets carried, both ways; None without `count_wire`.
        peak_rss_bytes, sum_rss_bytes, largest_rss_bytes: by process; of all at once; of the largest one.

    Raises:
        RuntimeError: Flower did not come to a result; the end of the logs is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="flower-peer-") as scratch, TreeWatch(os.getpid(), itself=False) as memory:
        began = time.perf_counter()
        with _Federation(Path(scratch), count_wire=count_wire) as federation:
            found = federation.train(job, deadline=time.monotonic() + timeout_s)
            wall_s = time.perf_counter() - began
            wire_bytes = federation.wire_bytes
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

    def __init__(self, folder: Path, *, count_wire: bool) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._count_wire = count_wire
        self._cleanup = contextlib.ExitStack()
        self._proxy: _Proxy | None = None
        self.address = ""

    def __enter__(self) -> _Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._cleanup.close()

    @property
    def wire_bytes(self) -> int | None:
        return self._proxy.n_bytes if self._proxy else None

    def train(self, job: PeerJob, *, deadline: float) -> dict[str, Any]:
        self._start_superlink()
        fleet = self.address
        if self._count_wire:
            self._proxy = self._cleanup.enter_context(_counting_proxy(self.address))
            fleet = self._proxy.address
        for number, path in enumerate(job.train):
            config = f"client-id={number} train-path={json.dumps(str(path))}"
            argv = ["flower-supernode", "--insecure", "--superlink", fleet, "--host", HOST, "--port", str(free_port()),
                    "--node-config", config]  # fmt: skip
            self._start(f"client-{number}", argv)
        result = self._folder / "result.json"
        config = job.run_config(self._folder)
        self._start("run", ["flwr", "run", str(APP), CONNECTION, "--stream", "--run-config", config])
        while not result.exists():
            time.sleep(0.05)
            # `flwr run --stream` ends with the run; the result is there before that.
            dead = {name: code for name, p in self._processes.items() if (code := p.poll()) is not None}
            if (dead or time.monotonic() > deadline) and not result.exists():
                raise RuntimeError(f"Flower came to no result, ended processes: {dead}\n{self._log_tails()}")
        return json.loads(result.read_text(encoding="utf-8"))

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
                raise RuntimeError(f"the SuperLink did not come up\n{self._log_tails()}")
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

    def _log_tails(self) -> str:
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(f"--- {p.name}\n{p.read_text(encoding='utf-8', errors='replace')[-3000:]}" for p in logs)


def free_port() -> int:
    """A port of the loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


# --- counting bytes ---------------------------------------------------------------------------------------------------


@dataclass
class _Proxy:
    """Passes bytes on in both directions and counts them."""

    target: tuple[str, int]
    address: str = ""
    n_bytes: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self.target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                self.n_bytes += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()


@contextlib.contextmanager
def _counting_proxy(address: str) -> Iterator[_Proxy]:
    host, _, port = address.rpartition(":")
    proxy = _Proxy((host, int(port)))
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.serve, HOST, 0))
    proxy.address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="counting-proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def main() -> None:
    """One run of the peer alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="one file for each client")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--layers", choices=("all", "upper"), default="all", help="where LoRA goes")
    parser.add_argument("--cut-layer", type=int, default=PeerJob.cut_layer, help="the first block of `upper`")
    parser.add_argument("--max-length", type=int, default=PeerJob.max_length)
    parser.add_argument("--adapter", choices=("lora", "prefix"), default=PeerJob.adapter)
    parser.add_argument("--epochs", type=int, default=PeerJob.epochs)
    parser.add_argument("--rounds", type=int, help="default: one for each epoch")
    parser.add_argument("--lora-r", type=int, default=PeerJob.r)
    parser.add_argument("--lora-alpha", type=float, default=PeerJob.alpha)
    parser.add_argument("--lr", type=float, default=PeerJob.lr)
    parser.add_argument("--batch-size", type=int, default=PeerJob.batch_size)
    parser.add_argument("--seed", type=int, default=PeerJob.seed)
    parser.add_argument("--threads", type=int, default=PeerJob.num_threads, help="torch's, in each app process")
    parser.add_argument("--evaluate-every-round", action="store_true", help="by the clients, as in the tutorial")
    parser.add_argument("--count-wire", action="store_true", help="count what the SuperNodes' sockets carry")
    args = parser.parse_args()
    job = PeerJob(
        model=args.model.absolute(),
        train=tuple(path.absolute() for path in args.train),
        test=args.test.absolute(),
        n_labels=args.labels,
        max_length=args.max_length,
        adapter=args.adapter,
        layers=args.layers,
        cut_layer=args.cut_layer,
        r=args.lora_r,
        alpha=args.lora_alpha,
        lr=args.lr,
        batch_size=args.batch_size,
        epochs=args.epochs,
        rounds=args.rounds,
        seed=args.seed,
        evaluate_every_round=args.evaluate_every_round,
        num_threads=args.threads,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(json.dumps(run_peer(job, count_wire=args.count_wire), indent=1))


if __name__ == "__main__":
    main()
