"""SPF + LoRA against LoRA alone in the same far side at the same cut, and both against plain FedAvg LoRA on Flower.

On the classification data sets of the project's data folder, of each at most 600 training texts and the whole test
split, with the examples dealt out to five institutions evenly (`iid`) or with uneven shares of every label
(`dirichlet`). `lora` and `spf` are the far side's training over the clients' quantised boundary tensors, as the server
enclave does it, without any security; `secured` is a whole secured run of SPF + LoRA, which must come to the same.
`fedavg` is plain Flower's FedAvg with PEFT's LoRA on every linear of the whole model, as many epochs, one a round
(bench/peers/flower_in_process.py).

Rates were chosen by `--tune`, by the mean accuracy on validation splits; SPF's criterion and shares are those that a
job has by default, `--curve` shows others, also on validation splits. A test split is read once for each finished
training. Every figure is kept in bench/results/kept/spf_accuracy.csv as soon as it is there, and not computed
again; spf_accuracy.csv is made of what is kept, and `--table` only makes it. A ratio column holds the mean of the
seeds' differences in points and its 95 % interval; the pooled rows are over data sets. Two processes may run at once,
on different data sets.

    python bench/spf_accuracy.py [--data hoc druglib ...] [--seeds 5] [--methods lora spf fedavg secured] [--threads 1]
                                 [--tune | --curve | --table] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench._common import commit, difference, out_path, write_csv
from bench._sides import read_rows, sample_rows, work_folder, write_rows
from bench._unsecured import boundary_features
from bench.peers.flower_in_process import answers, train_in_process
from bench.peers.flower_lora import PeerJob

from cloister.adapters import LoraSpec, SpfSpec
from cloister.evaluate import macro_f1
from cloister.slicing import BackboneInfo, inspect_backbone, load_far, load_near, load_tokenizer
from cloister.testing import shared_dir
from cloister.train import (
    Columns,
    FarTrainer,
    Feature,
    MemoryFeatures,
    NearEncoder,
    TaskSpec,
    TrainSpec,
    evaluate,
    open_dataset,
)

DATA = ("hoc", "druglib", "mtsdialog", "medabs", "pubmedqa")
PARTITIONS = ("iid", "dirichlet")
METHODS = ("lora", "spf", "fedavg", "secured")
N_CLIENTS, N_TRAIN, EPOCHS, BATCH_SIZE, CUT, MAX_LENGTH = 5, 600, 3, 16, 3, 128
TUNING_SEED = 1000
LORA = LoraSpec(r=8, alpha=16)
SPF = SpfSpec()
LR = {"lora": 2e-3, "spf": 1e-3, "fedavg": 4e-3}
RATES = {"lora": (1e-3, 2e-3, 4e-3), "spf": (5e-4, 1e-3, 2e-3), "fedavg": (2e-3, 4e-3, 8e-3)}
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
RUN_COLUMNS = ("data", "partition", "method", "seed", "split", "accuracy", "macro_f1", "commit")
Method = Literal["lora", "spf", "fedavg", "secured"]


# --- data: each set's features once -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One data set. Its labels are public, its text is a file's."""

    name: str
    folder: Path
    task: TaskSpec
    info: BackboneInfo
    quick: bool

    @cache  # noqa: B019 - a setting lives as long as the process
    def rows(self, split: str) -> list[dict[str, Any]]:
        """Of the training split those with the smallest hash of their id; of others all."""
        path = self.folder / f"{split}.jsonl"
        rows = sample_rows(path, N_TRAIN) if split == "train" else read_rows(path)
        return rows[:96] if self.quick else rows

    @property
    def columns(self) -> dict[str, str]:
        return {"text": "text_a", "text_b": "text"} if self.name == "pubmedqa" else {}

    @cache  # noqa: B019
    def features(self, split: str) -> list[Feature]:
        """Quantised at the boundary and back, as the enclave sees them, in the order of `rows`."""
        with work_folder(None) as folder:
            path = write_rows(folder / f"{split}.jsonl", self.rows(split))
            dataset = open_dataset(path, columns=Columns(**self.columns), task=self.task)
            encoder = NearEncoder(
                load_near(self.info, CUT), load_tokenizer(self.info), self.task, model_max_length=self.info.max_length
            )
            return boundary_features(encoder, dataset)

    def source(self, partition: str, tested: str) -> MemoryFeatures:
        """All clients' training examples, and one split as the first client's held-out ones."""
        of = [line["clients"][partition] for line in self.rows("train")]
        parts: dict[str, dict[str, list[Feature]]] = {f"institution-{i}": {"train": []} for i in range(N_CLIENTS)}
        for client, feature in zip(of, self.features("train"), strict=True):
            parts[f"institution-{client}"]["train"].append(feature)
        parts["institution-0"]["test"] = self.features(tested)
        return MemoryFeatures(parts)


def settings(names: Sequence[str], *, quick: bool) -> Iterator[Setting]:
    shared = shared_dir()
    if shared is None or not (shared / "data/datasets").is_dir():
        sys.exit("error: there is no data\nhint: CLOISTER_SHARED names the project's data folder")
    from cloister.cli._quickstart import write_quickstart
    from cloister.config import load_job

    with work_folder(None) as scratch:
        info = inspect_backbone(load_job(write_quickstart(scratch / "quickstart")).model.path)
    for name in names:
        folder = shared / "data/datasets" / name
        labels = tuple(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["labels"])
        task = TaskSpec("sequence-classification", labels=labels, pooling="mean", max_length=MAX_LENGTH,
                        on_too_long="truncate")  # fmt: skip
        yield Setting(name, folder, task, info, quick)


# --- one training -----------------------------------------------------------------------------------------------------


def train_far(
    setting: Setting, partition: str, adapter: LoraSpec | SpfSpec, lr: float, seed: int, tested: str
) -> dict[str, float]:
    """The far side's training, and how good it then is on a split."""
    far = load_far(setting.info, CUT, task=setting.task.name, n_labels=len(setting.task.labels),
                   pooling=setting.task.pooling, seed=seed)  # fmt: skip
    source = setting.source(partition, tested)
    spec = TrainSpec(epochs=1 if setting.quick else EPOCHS, batch_size=BATCH_SIZE, lr=lr, seed=seed)
    FarTrainer(far, spec, adapter, setting.task, source).train()
    found = evaluate(far, source, setting.task)
    return {"accuracy": found.value, "macro_f1": found.extra["macro_f1"]}


def run_fedavg(setting: Setting, partition: str, lr: float, seed: int, tested: str) -> dict[str, float]:
    """Plain Flower and PEFT over the whole model, as many epochs, one a round."""
    with work_folder(None) as folder:
        files = []
        for i in range(N_CLIENTS):
            own = [plain(line) for line in setting.rows("train") if line["clients"][partition] == i]
            files += [write_rows(folder / f"{i}.jsonl", own)] if own else []
        rows = [plain(line) for line in setting.rows(tested)]
        job = PeerJob(
            # Its own test at the end would only ask everything twice.
            model=Path(setting.info.path), train=tuple(files), test=write_rows(folder / "one.jsonl", rows[:1]),
            n_labels=len(setting.task.labels), max_length=MAX_LENGTH, r=LORA.r, alpha=LORA.alpha, lr=lr,
            batch_size=BATCH_SIZE, epochs=1 if setting.quick else EPOCHS, seed=seed,
            num_threads=torch.get_num_threads(),
        )  # fmt: skip
        train_in_process(job, folder)
        predicted = answers(replace(job, test=write_rows(folder / "tested.jsonl", rows)), folder)
    truth = [row["label"] for row in rows]
    right = statistics.fmean(a == b for a, b in zip(truth, predicted, strict=True))
    return {"accuracy": right, "macro_f1": macro_f1(truth, predicted)}


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """The peer's tokenizer gets one text; a pair is joined as the tokenizer itself would."""
    text = f"{line['text_a']} [SEP] {line['text']}" if "text_a" in line else line["text"]
    return {"text": text, "label": line["label"]}


def run_secured(setting: Setting, partition: str, seed: int) -> dict[str, float]:
    """A whole run of Method 2: processes, relay, evidence, sealed shards."""
    import cloister
    from cloister.config import Job

    task = {"name": setting.task.name, "labels": setting.task.labels, "pooling": "mean", "max_length": MAX_LENGTH,
            "on_too_long": "truncate"}  # fmt: skip
    found: dict[str, Any] = {
        "name": "spf-accuracy", "task": task, "model": {"path": setting.info.path, "cut_layer": CUT},
        "adapter": {"name": "spf", "heads": SPF.heads, "neurons": SPF.neurons, "criterion": SPF.criterion, "r": SPF.r,
                    "alpha": SPF.alpha},
        "training": {"epochs": 1 if setting.quick else EPOCHS, "batch_size": BATCH_SIZE, "lr": LR["spf"], "seed": seed},
        "evaluation": {"baselines": []},
    }  # fmt: skip
    with work_folder(None) as folder:
        train, test = (str(write_rows(folder / f"{split}.jsonl", setting.rows(split))) for split in ("train", "test"))
        found["clients"] = [
            {"name": f"institution-{i}", "train": {"path": train, "where": {f"clients.{partition}": i}}}
            | {"columns": setting.columns}
            | ({"test": test} if i == 0 else {})
            for i in sorted({line["clients"][partition] for line in setting.rows("train")})
        ]
        metric = cloister.run(Job.model_validate_json(json.dumps(found)), runs_dir=folder).result["metric"]
    return {"accuracy": metric["value"], "macro_f1": metric["extra"]["macro_f1"]}


def run_method(setting: Setting, partition: str, method: Method, seed: int) -> dict[str, float]:
    if method == "fedavg":
        return run_fedavg(setting, partition, LR["fedavg"], seed, "test")
    if method == "secured":
        return run_secured(setting, partition, seed)
    return train_far(setting, partition, LORA if method == "lora" else SPF, LR[method], seed, "test")


# --- what is kept, and the table --------------------------------------------------------------------------------------


class Kept:
    """The figures of finished runs, in a CSV that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def rows(self) -> list[dict[str, str]]:
        """Those of every process."""
        if not self._path.is_file():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def has(self, **key: object) -> bool:
        return any(all(found[name] == str(value) for name, value in key.items()) for found in self.rows)

    def add(self, figures: dict[str, float], **key: object) -> None:
        told = {name: f"{value:.6f}" for name, value in figures.items()}
        line = {name: str(value) for name, value in key.items()} | told | {"commit": commit()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._path.is_file()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, RUN_COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(line)
        print(", ".join(f"{name} {line[name]}" for name in RUN_COLUMNS[:-1]), file=sys.stderr, flush=True)

    def figures(self, data: str, partition: str, method: str, figure: str) -> dict[int, float]:
        """By seed, in points."""
        return {
            int(found["seed"]): 100 * float(found[figure])
            for found in self.rows
            if (found["data"], found["partition"], found["method"], found["split"]) == (data, partition, method, "test")
        }


PAIRS = (
    ("SPF + LoRA - LoRA alone", "spf", "lora"),
    ("SPF + LoRA - FedAvg on Flower", "spf", "fedavg"),
    ("LoRA alone - FedAvg on Flower", "lora", "fedavg"),
    ("secured - not secured, SPF + LoRA", "secured", "spf"),
)


def table(kept: Kept, names: Sequence[str]) -> list[dict[str, Any]]:
    """Differences by seed, for each data set and over all of them."""
    rows = []
    for (what, ours, peer), figure in ((pair, figure) for pair in PAIRS for figure in ("accuracy", "macro_f1")):
        for partition in PARTITIONS:
            means: list[tuple[float, float]] = []
            for name in names:
                a, b = (kept.figures(name, partition, method, figure) for method in (ours, peer))
                seeds = sorted(a.keys() & b.keys())
                if not seeds or any(math.isnan(b[seed]) for seed in seeds):
                    continue
                sides = [a[seed] for seed in seeds], [b[seed] for seed in seeds]
                goal = "difference within 0 or around 0" if ours == "secured" else ""
                rows.append(difference(f"{figure}, {what}, {name}, {partition}", *sides, "points", goal))
                means.append((statistics.fmean(sides[0]), statistics.fmean(sides[1])))
            if len(means) > 1:
                label = f"{figure}, {what}, mean over {len(means)} data sets, {partition}"
                rows.append(difference(label, *map(list, zip(*means, strict=True)), "points"))
    return rows


# --- tuning, on validation splits -------------------------------------------------------------------------------------


def tune(chosen: Sequence[Setting], kept: Kept, methods: Sequence[str]) -> None:
    """The methods' rates, with a seed that no table has; tells the means."""
    trainings: dict[str, Callable[[Setting], dict[str, float]]] = {}
    for lr in RATES["lora"]:
        trainings[f"lora lr={lr}"] = lambda s, lr=lr: train_far(s, "iid", LORA, lr, TUNING_SEED, "valid")
    for lr in RATES["spf"]:
        trainings[f"spf lr={lr}"] = lambda s, lr=lr: train_far(s, "iid", SPF, lr, TUNING_SEED, "valid")
    for lr in RATES["fedavg"]:
        trainings[f"fedavg lr={lr}"] = lambda s, lr=lr: run_fedavg(s, "iid", lr, TUNING_SEED, "valid")
    trainings = {name: train for name, train in trainings.items() if name.split()[0] in methods}
    for name, train in trainings.items():
        for setting in chosen:
            key = {"data": setting.name, "partition": "iid", "method": name, "seed": TUNING_SEED, "split": "valid"}
            if not kept.has(**key):
                kept.add(train(setting), **key)
    for name in trainings:
        found = [float(row["accuracy"]) for row in kept.rows if row["method"] == name]
        print(f"{name}: mean accuracy {100 * statistics.fmean(found):.2f} on {len(found)} validation splits")


def curve(chosen: Sequence[Setting], kept: Kept, seeds: int) -> None:
    """Every criterion over shares from 0.05 to 1, where every row trains whatever it says; on validation splits."""
    for setting in chosen:
        for share in SHARES:
            for criterion in ("l1", "gradient", "fisher", "random") if share < 1 else ("l1",):
                spec = replace(SPF, heads=max(share, 1 / 12), neurons=share, criterion=criterion)
                for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds):
                    key = {"data": setting.name, "partition": "iid", "method": f"curve {criterion} {share}",
                           "seed": seed, "split": "valid"}  # fmt: skip
                    if not kept.has(**key):
                        kept.add(train_far(setting, "iid", spec, LR["spf"], seed, "valid"), **key)


def main() -> None:
    """Runs alone; keeps every figure and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 96 examples, one epoch, two seeds")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--partitions", nargs="+", choices=PARTITIONS, default=PARTITIONS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="the grid, on validation splits")
    parser.add_argument("--curve", action="store_true", help="criteria over shares, on validation splits")
    parser.add_argument("--table", action="store_true", help="only make the table of what is kept")
    parser.add_argument("--threads", type=int, help="of torch; default: all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = out_path("spf_accuracy", args.out, quick=args.quick)
    kept = Kept(path.parent / "kept" / path.name)
    chosen = [] if args.table else list(settings(args.data, quick=args.quick))
    if args.tune:
        tune(chosen, kept, args.methods)
        return
    if args.curve:
        curve(chosen, kept, args.seeds)
        return
    for seed in range(2 if args.quick else args.seeds):
        for setting in chosen:
            for partition in args.partitions:
                for method in args.methods if seed % 2 == 0 else reversed(args.methods):
                    key = {"data": setting.name, "partition": partition, "method": method, "seed": seed,
                           "split": "test"}  # fmt: skip
                    if not kept.has(**key):
                        kept.add(run_method(setting, partition, method, seed), **key)
    write_csv(path, table(kept, DATA))


if __name__ == "__main__":
    main()
