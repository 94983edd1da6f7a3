"""Aggregation of synthetic clients in the server enclave: seconds and peak memory of every rule, by number of clients.

Each figure is of a process of its own. The peer is what no protection and no bound cost: `numpy.mean` over a buffer
[clients, numbers] that lies filled in memory (at most `--peer-clients` of it; above, its time is that of as many means
as it takes). Ours parses, checks and counts encoded updates, on a disk where the rule needs one.

    python bench/aggregation.py [--quick] [--clients 10 100 1000] [--rules fedavg exact-lora] [--pairs 5]

The updates are those of LoRA of rank 8 on 2048 x 2048 linears, 128 KiB each; privacy's noise needs the extra `dp`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import load_average, out_path, row, write_csv

from cloister.adapters import AdapterState, AdapterUpdate, LoraSpec, StateSpec
from cloister.federation import AggregationSpec, Aggregator, ClientPrivacy

WIDTH, RANK = 2048, 8
MIB = 1 << 20
RULES: dict[str, dict[str, object]] = {
    "fedavg": {},
    "fedadam": {"rule": "fedadam"},
    "trimmed-mean": {"rule": "trimmed-mean", "weighting": "uniform", "trim": 0.1},
    "exact-lora": {"exact_lora": True},
    "private": {"weighting": "uniform", "privacy": ClientPrivacy(1.0, 1.0, 1e-5)},
}
N_DRAWN = 4
"""Different updates; the others are the same bytes from another client, which costs a rule as much."""


def state_spec(megabytes: int) -> StateSpec:
    """LoRA on as many linears as make an update of that size."""
    n_layers = max(1, megabytes * MIB // (4 * 2 * RANK * WIDTH))
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(n_layers):
        path = f"base_model.model.model.layers.{index}.mlp.lora_"
        shapes |= {f"{path}A.weight": (RANK, WIDTH), f"{path}B.weight": (WIDTH, RANK)}
    return StateSpec(LoraSpec(r=RANK), "causal-lm", shapes, {})


def ours(rule: str, n_clients: int, megabytes: int, folder: Path) -> dict[str, float]:
    """One round of a rule: seconds in the aggregator, and this process's peak memory above what it began with."""
    spec = state_spec(megabytes)
    rng = np.random.default_rng(0)
    draw = {n: rng.normal(size=s).astype(np.float32) for n, s in spec.shapes.items()}
    start = AdapterState(spec, draw)
    blobs = [
        AdapterUpdate(spec, {n: np.roll(t, k).astype(np.float32) * 0.01 for n, t in draw.items()}).to_bytes()
        for k in range(N_DRAWN)
    ]
    aggregator = Aggregator(AggregationSpec(max_norm=1e6, **RULES[rule]), start, min_clients=1, folder=folder)  # type: ignore[arg-type]
    before = peak_bytes()
    began = time.perf_counter()
    number = aggregator.begin([str(i) for i in range(n_clients)])
    for client, blob in zip(range(n_clients), itertools.cycle(blobs), strict=False):
        aggregator.add(str(client), 100 + client, blob, round=number)
    added = time.perf_counter() - began
    result = aggregator.finish()
    seconds = time.perf_counter() - began
    assert len(result.clients) == n_clients
    return {"seconds": seconds, "adding_s": added, "peak": peak_bytes(), "before": before}


def peer(n_clients: int, megabytes: int, most: int) -> dict[str, float]:
    """`numpy.mean` over a filled buffer."""
    numbers, rows = megabytes * MIB // 4, min(n_clients, most)
    buffer = np.empty((rows, numbers), dtype=np.float32)
    buffer[:] = np.random.default_rng(0).normal(size=numbers)
    began = time.perf_counter()
    for _ in range(-(-n_clients // rows)):
        buffer.mean(axis=0)
    return {"seconds": time.perf_counter() - began, "peak": peak_bytes()}


def peak_bytes() -> int:
    """High-water mark of this process's memory; `ru_maxrss` would begin with that of whoever started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def apart(*arguments: str) -> dict[str, float]:
    """Runs one measurement in a fresh process."""
    # -P: a bench's neighbours do not stand in for modules of the standard library.
    argv = [sys.executable, "-P", __file__, "--child", *arguments]
    # One thread of BLAS: on shared cores, several measure whoever else is there.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(arguments)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def child(arguments: list[str], folder: Path) -> dict[str, float]:
    """What `apart` asked for."""
    kind, n_clients, megabytes, most = arguments[0], *map(int, arguments[1:])
    if kind == "numpy":
        return peer(n_clients, megabytes, most)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        return ours(kind, n_clients, megabytes, Path(name))


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """All rules and numbers of clients, ours and the peer in turn."""
    rows: list[dict[str, object]] = []
    peaks: dict[str, list[list[float]]] = {}
    for n in args.clients:
        for rule in args.rules:
            common = (str(n), str(args.megabytes), str(args.peer_clients))
            pairs = [(apart(rule, *common), apart("numpy", *common)) for _ in range(args.pairs)]
            mine, theirs = ([pair[side]["seconds"] for pair in pairs] for side in (0, 1))
            label = f"{rule}, {n} clients of {args.megabytes} MiB"
            rows.append(row(f"{label}: a round / numpy.mean of a filled buffer", mine, theirs, "s"))
            peaks.setdefault(rule, []).append([pair[0]["peak"] / MIB for pair in pairs])
            held = [min(n, args.peer_clients) * float(args.megabytes)] * args.pairs
            rows.append(row(f"{label}: peak memory / that buffer", peaks[rule][-1], held, "MiB"))
    for rule, by_n in peaks.items():
        if len(by_n) > 1:
            label = f"{rule}: peak memory of {args.clients[-1]} clients / of {args.clients[0]}"
            rows.append(
                row(label, by_n[-1], by_n[0], "MiB", "<= 1.1" if rule in ("fedavg", "fedadam", "private") else "")
            )
    return rows


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 5 and 10 clients of 1 MiB")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--peer-clients", type=int, default=100, help="of the peer's buffer, at most")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the sealed spools")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.folder)))
        return
    if args.quick:
        args.clients, args.megabytes, args.pairs = [10, 20], 1, 2
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    write_csv(out_path("aggregation", args.out, quick=args.quick), measure(args))


if __name__ == "__main__":
    main()
