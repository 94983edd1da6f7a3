"""Method 1 beside plain FedAvg on Flower: the same data, model, first adapter, batches and their order; whole runs.

Ours is `cloister.run` of a job with `method.name = "enclave"`: three institutions, attested enclaves, masked layers,
the real relay over TLS. The peer is bench/peers/flower_lora.py, plain Flower with PEFT, without any security. Three
clients, three rounds, AdamW anew in every round, no dropout, no clipping, no weight decay, a constant rate: what is
left between the two is arithmetic. Adapters are LoRA on every linear, and the prefix of P-tuning v2.

CPU time of a step is that of the enclave and its accelerator together, here both on the processor, for one optimiser
step; the peer's is its own training loop's, in plain float32 on as many threads. `lattice` pads are measured once.

    python bench/method1_vs_flower.py [--quick] [--data quickstart|hoc|druglib] [--only lora|prefix] [--seeds 3]
                                      [--local-epochs 1] [--keep FOLDER] [--out FILE] [--profile]

Results: bench/results/method1_vs_flower_DATA.csv. `--profile` tells where the CPU time of a step goes, in place of
running anything (bench/results/method1_profile.csv). Needs the `quickstart` extra; hoc and druglib need the project's
data folder (CLOISTER_SHARED, or `shared` beside the checkout). Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import difference, load_average, ours_alone, out_path, row, write_csv
from bench._method1 import N_CLIENTS, N_ROUNDS, SIZES, Adapter, Setting, Variant, make_setting, run_ours
from bench._sides import in_child, peer_job, work_folder, write_result
from bench.peers.flower_lora import run_peer

from cloister.config import Job

ADAPTERS: tuple[Adapter, ...] = ("lora", "prefix")
METRIC_GOAL, CPU_GOAL = "difference within 0.5 or around 0", "<= 1.5"
Results = dict[str, list[dict[str, Any]]]


def variants(only: str | None, *, quick: bool) -> list[Variant]:
    """What is run with every seed."""
    rings = ("faithful",) if quick else ("faithful", "fast")
    return [Variant(adapter, ring, "otp") for adapter in ADAPTERS if only in (None, adapter) for ring in rings]


def lattice_variants(only: str | None, *, quick: bool) -> list[Variant]:
    """What is run with the first seed alone, for its cost; with `--pads lattice`."""
    return [Variant("lora", ring, "lattice") for ring in ("faithful", "fast") if only != "prefix" and not quick]


# --- running ----------------------------------------------------------------------------------------------------------


def run_side(order: Path) -> None:
    """The child: reads what to run, writes what came of it beside it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave by every context's end
    what = json.loads(order.read_text(encoding="utf-8"))
    if what["side"] == "ours":
        found = run_ours(Job.model_validate_json(json.dumps(what["job"])), order.parent)
    else:
        found = run_peer(peer_job(what["job"]))
    write_result(order, found)


def compare(setting: Setting, folder: Path, args: argparse.Namespace) -> Iterator[Results]:
    """Every seed's runs; who begins changes from seed to seed. Gives what there is after each."""
    found: Results = {}
    for seed in range(args.seeds):
        chosen = variants(args.only, quick=args.quick)
        chosen += lattice_variants(args.only, quick=args.quick) if seed == 0 and "lattice" in args.pads else []
        sides: list[Variant | Adapter] = [*dict.fromkeys(variant.adapter for variant in chosen), *chosen]
        for side in sides if seed % 2 == 0 else reversed(sides):
            if isinstance(side, Variant):
                key, job = side.key, json.loads(setting.ours(seed, side).model_dump_json())
            else:
                key, job = side, vars(setting.peer(seed, side))
            what = {"side": "ours" if isinstance(side, Variant) else "peer", "job": job}
            told = in_child(Path(__file__), folder, f"{key}-{seed}", what)
            told = told if isinstance(side, Variant) else told | _peers_steps(told, setting)
            found.setdefault(key, []).append(told)
            cpu = 1e3 * (told["enclave_cpu_s"] + told["accelerator_cpu_s"])
            name = f"cloister, {side}" if isinstance(side, Variant) else f"Flower, {side}"
            print(
                f"seed {seed}, {name}: {told['wall_s']:.1f} s, accuracy {told['metric']:.4f}, loss {told['loss']:.4f}, "
                f"a step {1e3 * told['step_s']:.0f} ms, CPU {cpu:.0f} ms",
                file=sys.stderr,
                flush=True,
            )
        yield found


def _peers_steps(told: dict[str, Any], setting: Setting) -> dict[str, float]:
    """The peer's figures of an optimiser step, under the names of ours."""
    examples = setting.n_seen / setting.n_steps  # of a step, on average
    return {
        "step_s": told["example_s"] * examples,
        "enclave_cpu_s": told["example_cpu_s"] * examples,
        "accelerator_cpu_s": 0.0,
        "round_bytes": told["payload_bytes"] / N_ROUNDS,
    }


# --- the table --------------------------------------------------------------------------------------------------------


def table(found: Results, chosen: Sequence[Variant]) -> list[dict[str, Any]]:
    """The CSV's rows, for each way to run ours."""
    rows = []
    for variant in chosen:
        ours = found[variant.key]
        peer = found[variant.adapter][: len(ours)]

        def pair(value: Callable[[Any], float], ours: Any = ours, peer: Any = peer) -> tuple[list[float], list[float]]:
            return [value(run) for run in ours], [value(run) for run in peer]

        measures: tuple[tuple[str, str, str, Callable[[Any], float]], ...] = (
            ("wall time of a whole run", "s", "", lambda run: run["wall_s"]),
            ("wall time of a step", "ms", "", lambda run: 1e3 * run["step_s"]),
            ("CPU time of a step, enclave and accelerator / plain fp32", "ms", CPU_GOAL, _cpu_ms),
            ("CPU time of a step, enclave alone / plain fp32", "ms", "", lambda run: 1e3 * run["enclave_cpu_s"]),
            ("bytes of a round between clients and server", "MB", "", lambda run: run["round_bytes"] / 1e6),
        )
        apart = pair(lambda run: 100 * run["metric"])
        rows.append(difference(f"accuracy, ours - peer, {variant}", *apart, "points", METRIC_GOAL))
        rows.append(difference(f"test loss, ours - peer, {variant}", *pair(lambda run: run["loss"]), "nats"))
        for measure, unit, goal, value in measures:
            rows.append(row(f"{measure}, {variant}", *pair(value), unit, goal))
        moved = [run["accelerator_bytes"] / 1e6 for run in ours]
        rows.append(ours_alone(f"bytes to and from an accelerator, of the whole run by step, {variant}", moved, "MB"))
        used = [run["pad_elements"] / 1e6 for run in ours]
        rows.append(ours_alone(f"pad elements, of the whole run by step, {variant}", used, "millions"))
    return rows


def _cpu_ms(run: dict[str, Any]) -> float:
    return 1e3 * (run["enclave_cpu_s"] + run["accelerator_cpu_s"])


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, one format, 96 examples")
    parser.add_argument("--data", choices=("quickstart", *SIZES), default="quickstart")
    parser.add_argument("--only", choices=ADAPTERS, help="one adapter in place of both")
    parser.add_argument("--seeds", type=int, help="default: 3, or 1 with --quick")
    parser.add_argument("--pads", nargs="+", choices=("otp", "lattice"), default=("otp", "lattice"))
    parser.add_argument("--local-epochs", type=int, default=1, help="in a round; from 2 on the orders differ")
    parser.add_argument("--profile", action="store_true", help="where the CPU time of a step goes")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--keep", type=Path, help="work in this folder, leave everything there, and go on from what is there"
    )
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        run_side(args.side)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.seeds = args.seeds or (1 if args.quick else 3)
    if (load := load_average()) > 0.5 * len(os.sched_getaffinity(0)):
        print(f"warning: this machine is busy (load {load:.1f}); the times will say little", file=sys.stderr)
    with work_folder(args.keep) as folder:
        setting = make_setting(folder / "data", args.data, quick=args.quick, epochs=args.local_epochs)
        if args.profile:
            from bench._method1_profile import tell_profiles

            rows = tell_profiles(setting, only=args.only, quick=args.quick)
            write_csv(out_path("method1_profile", args.out, quick=args.quick), rows)
            return
        sizes = ", ".join(f"{name} {n}" for name, n in setting.n_train.items())
        print(f"{args.data}: {N_CLIENTS} clients ({sizes}), {N_ROUNDS} rounds", file=sys.stderr)
        # Both sides' libraries once through the page cache, so that whoever is first does not pay for it.
        subprocess.run([sys.executable, "-c", "import peft, transformers.models.bert, flwr.serverapp"], check=True)
        chosen = variants(args.only, quick=args.quick)
        chosen += lattice_variants(args.only, quick=args.quick) if "lattice" in args.pads else []
        path = out_path(f"method1_vs_flower_{args.data}", args.out, quick=args.quick)
        for found in compare(setting, folder, args):
            write_csv(path, table(found, chosen))


if __name__ == "__main__":
    main()
