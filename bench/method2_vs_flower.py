"""Method 2 beside plain Flower + PEFT LoRA: the same data, model, epochs, adapter and batches, whole runs of both.

Ours is `cloister.run` of recipes/hoc-five-institutions without its baselines: five institutions, attestation, sealed
shards, relay over TLS. The peer is bench/peers/flower_lora.py on the same files, without any security. Both start all
of their processes anew for every run, on this machine, in alternation.

The peer is given what makes it quick: no evaluation but one of the final model, and as many torch threads in each app
as there are processors for it. (With torch's own choice, `--peer-threads 0`, five apps wait for each other's cores.)

    python bench/method2_vs_flower.py [--quick] [--pairs 5] [--data hoc|quickstart] [--layers all upper]
                                      [--peer-threads N] [--out bench/results/method2_vs_flower.csv] [--keep FOLDER]

Needs the `quickstart` extra. Without the project's data folder (CLOISTER_SHARED, or `shared` beside the checkout) the
quickstart's three hospitals are used. Run it on an idle machine: a hundred processes share two cores badly.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import REPOSITORY, TreeWatch, load_average, out_path, row, write_csv
from bench._sides import in_child, peer_job, recipe_file, rows_of, work_folder, write_result, write_rows
from bench.peers.flower_lora import PeerJob, run_peer

from cloister.config import Job, load_job

RECIPE = REPOSITORY / "recipes/hoc-five-institutions/job.toml"
EPOCHS = 3
QUICK_TRAIN, QUICK_TEST = 32, 64
WALL_GOAL = "<= 0.5"
LAYERS = {"all": "LoRA on all blocks", "upper": "LoRA on the upper blocks"}


# --- the setting: one set of files for both ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Files and jobs of both sides.

    Attributes:
        folder: with `CLIENT-train.jsonl` and `CLIENT-test.jsonl` of each client, and `test.jsonl`, all tests together.
        job: ours; its paths are these files.
    """

    folder: Path
    job: Job

    @property
    def epochs(self) -> int:
        return self.job.training.epochs

    def ours(self, seed: int) -> Job:
        return self.job.model_copy(update={"training": self.job.training.model_copy(update={"seed": seed})})

    def peer(self, seed: int, layers: str, num_threads: int) -> PeerJob:
        from cloister.slicing import inspect_backbone, resolve_cut

        job = self.job
        return PeerJob(
            model=Path(job.model.path),
            train=tuple(self.folder / f"{name}-train.jsonl" for name in job.client_names),
            test=self.folder / "test.jsonl",
            n_labels=len(job.task.labels),
            max_length=job.task.max_length or 512,
            layers="upper" if layers == "upper" else "all",
            cut_layer=resolve_cut(inspect_backbone(job.model.path), job.model.cut_layer),
            r=job.adapter.r,
            alpha=job.adapter.alpha,
            lr=job.training.lr,
            weight_decay=job.training.weight_decay,
            batch_size=job.training.batch_size,
            epochs=job.training.epochs,
            seed=seed,
            num_threads=num_threads,
        )


def make_setting(folder: Path, data: str, *, quick: bool) -> Setting:
    """Reads every client's data as its job says, and writes it once, for both sides."""
    folder.mkdir(parents=True, exist_ok=True)
    job = load_job(_job_file(folder, data))
    clients, every_test = [], []
    for client in job.clients:
        update: dict[str, Any] = {"columns": type(client.columns)()}
        for split, part in client.datasets.items():
            limit = (QUICK_TRAIN if split == "train" else QUICK_TEST) if quick else None
            rows = rows_of(job, client, part)[:limit]
            every_test += rows if split == "test" else []
            path = folder / f"{client.name}-{split}.jsonl"
            update[split] = type(part)(path=str(write_rows(path, rows)))
        clients.append(client.model_copy(update=update))
    write_rows(folder / "test.jsonl", every_test)
    changed = {
        "clients": tuple(clients),
        "training": job.training.model_copy(update={"epochs": EPOCHS}),
        "evaluation": job.evaluation.model_copy(update={"baselines": ()}),
    }
    return Setting(folder, job.model_copy(update=changed))


def _job_file(folder: Path, data: str) -> Path:
    if data == "hoc" and (found := recipe_file(RECIPE, folder)) is not None:
        return found
    from cloister.cli._quickstart import write_quickstart

    if data == "hoc":
        print("no data folder: the quickstart's hospitals stand in for hoc", file=sys.stderr)
    return write_quickstart(folder / "quickstart")


# --- one run of one side, in a process of its own ---------------------------------------------------------------------


def run_ours(job: Job, folder: Path) -> dict[str, Any]:
    """One whole run, from the call to its report; the take-down is in it."""
    with TreeWatch(os.getpid()) as memory:
        began = time.perf_counter()
        import cloister

        found = cloister.run(job, runs_dir=folder / "runs")
        wall_s = time.perf_counter() - began
    result = found.result
    phases = result["phases_s"]
    events = [json.loads(line) for line in (found.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    near = [event["t"] for event in events if event["event"] == "progress"]
    return {
        "metric": found.metric,
        "wall_s": wall_s,
        "train_s": phases["prepare"] + phases["train"],
        "loop_s": max(near) - min(near) + phases["train"],
        "payload_bytes": sum(result["bytes"].values()),
        "sum_rss_bytes": memory.sum_bytes,
        "largest_rss_bytes": memory.largest_bytes,
        "phases_s": {**phases, "of prepare: until every near side runs": max(_near_began(events)) - events[0]["t"],
                     "of prepare: near sides": max(near) - min(near)},
        "restarts": result["restarts"],
    }  # fmt: skip


def _near_began(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """When each client's near side began, in Unix time."""
    first: dict[str, float] = {}
    for event in events:
        if event["event"] == "progress":
            first.setdefault(event["client"], event["t"])
    return list(first.values())


def run_side(order: Path) -> None:
    """The child: reads what to run, writes what came of it beside it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave by every context's end
    what = json.loads(order.read_text(encoding="utf-8"))
    if what["side"] == "ours":
        found = run_ours(Job.model_validate_json(json.dumps(what["job"])), order.parent)
    else:
        found = run_peer(peer_job(what["job"]))
    write_result(order, found)


# --- the table --------------------------------------------------------------------------------------------------------


def compare(
    setting: Setting, folder: Path, *, n_pairs: int, layers: Sequence[str], num_threads: int
) -> Iterator[Results]:
    """All pairs; who begins changes from pair to pair. Gives what there is after each, so that a stop loses little."""
    sides = ["ours", *layers]
    found: Results = {side: [] for side in sides}
    for seed in range(n_pairs):
        for side in sides if seed % 2 == 0 else reversed(sides):
            if side == "ours":
                what = {"side": "ours", "job": json.loads(setting.ours(seed).model_dump_json())}
            else:
                what = {"side": "peer", "job": vars(setting.peer(seed, side, num_threads))}
            result = in_child(Path(__file__), folder, f"{side}-{seed}", what)
            found[side].append(result)
            told = f"{result['wall_s']:.1f} s, training {result['train_s']:.1f} s, accuracy {result['metric']:.4f}"
            print(f"pair {seed + 1}, {_label(side)}: {told}", file=sys.stderr)
        yield found


Results = dict[str, list[dict[str, Any]]]


def _label(side: str) -> str:
    return "cloister" if side == "ours" else f"Flower, {LAYERS[side]}"


def table(found: Results, epochs: int) -> list[dict[str, Any]]:
    """The CSV's rows, for each placement of the peer's LoRA."""
    measures: tuple[tuple[str, str, str, str, Callable[[Any], float]], ...] = (
        ("wall time of a whole run", "wall_s", "s", WALL_GOAL, float),
        ("time from the first instruction to the tuned weights", "train_s", "s", "", float),
        ("time in near sides, far training / local epochs alone", "loop_s", "s", "", float),
        ("accuracy on the common test set", "metric", "accuracy", "", float),
        ("bytes that went between institutions and server", "payload_bytes", "MB", "", _mega),
        ("peak memory, sum over processes", "sum_rss_bytes", "MB", "", _mega),
        ("peak memory, largest process", "largest_rss_bytes", "MB", "", _mega),
    )
    rows = []
    for side in [side for side in found if side != "ours"]:
        for measure, key, unit, goal, scale in measures:
            ours, peer = ([scale(result[key]) for result in found[who]] for who in ("ours", side))
            rows.append(row(f"{measure}, {epochs} epochs, Flower + {LAYERS[side]}", ours, peer, unit, goal))
    return rows


def _mega(n_bytes: float) -> float:
    return n_bytes / 1e6


def tell_phases(found: Results) -> None:
    """Where our wall time goes."""
    runs = found["ours"]
    print("cloister by phase, mean seconds:", file=sys.stderr)
    for name in runs[0]["phases_s"]:
        print(f"  {statistics.fmean(run['phases_s'][name] for run in runs):8.2f}  {name}", file=sys.stderr)
    known = statistics.fmean(
        run["wall_s"] - sum(s for name, s in run["phases_s"].items() if not name.startswith("of ")) for run in runs
    )
    print(f"  {known:8.2f}  in no phase: imports, checks, set-up, report, take-down", file=sys.stderr)


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one pair, few examples")
    parser.add_argument("--pairs", type=int, help="default: 5, or 1 with --quick")
    parser.add_argument("--data", choices=("hoc", "quickstart"), default="hoc", help="five institutions, or three")
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=["all"], help="the peer's LoRA")
    parser.add_argument("--peer-threads", type=int, help="of torch in each Flower app; 0: torch's own choice")
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
    n_pairs = args.pairs or (1 if args.quick else 5)
    if (load := load_average()) > 0.5 * len(os.sched_getaffinity(0)):
        print(f"warning: this machine is busy (load {load:.1f}); the times will say little", file=sys.stderr)
    with work_folder(args.keep) as folder:
        setting = make_setting(folder / "data", args.data, quick=args.quick)
        # Both sides' libraries once through the page cache, so that whoever is first does not pay for it.
        subprocess.run([sys.executable, "-c", "import peft, transformers.models.bert, flwr.serverapp"], check=True)
        num_threads = args.peer_threads
        if num_threads is None:
            num_threads = max(1, len(os.sched_getaffinity(0)) // len(setting.job.clients))
        name = "method2_vs_flower" + ("_quickstart" if args.data == "quickstart" else "")
        for found in compare(setting, folder, n_pairs=n_pairs, layers=args.layers, num_threads=num_threads):
            write_csv(out_path(name, args.out, quick=args.quick), table(found, setting.epochs))
            tell_phases(found)


if __name__ == "__main__":
    main()
