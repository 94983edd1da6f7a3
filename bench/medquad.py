"""Short answers to health questions (medquad-qa) by a small Llama: SPF + LoRA, LoRA alone and FedAvg on Flower.

`cloister compare` on recipes/medquad-five-sites with 1,500 of the 6,000 training questions, those of each web site at a
site of its own (`natural`) or dealt out evenly (`iid`): whole runs, secured ones for Method 2 and plain Flower for
FedAvg, each with the rate that `--tune` found best on the validation split. Beside the secured SPF + LoRA, the same
training without any security (bench/_unsecured.py). A ratio column holds the mean over seeds and its 95 % interval: of
ratios of perplexity, and of differences of ROUGE-L in points over completions of 100 held-out questions.

    python bench/medquad.py [--seeds 5] [--tune] [--quick] [--keep FOLDER] [--out bench/results/medquad.csv]

Finished runs in `--keep` are not made again. Needs the project's data folder (CLOISTER_SHARED, or `shared` beside the
checkout).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import REPOSITORY, difference, out_path, row, write_csv
from bench._sides import recipe_file, sample_rows, work_folder, write_rows
from bench._unsecured import train_unsecured

from cloister.api import compare
from cloister.api._compare_data import held_out
from cloister.api._compare_jobs import derive_job
from cloister.api._predict import MAX_NEW_TOKENS
from cloister.config import Job, load_job
from cloister.evaluate import rouge_l_scores

RECIPES = {"natural": "job.toml", "iid": "iid.toml"}
METHODS = {"method2-spf": "SPF + LoRA", "method2-lora": "LoRA alone", "fedavg": "FedAvg on Flower"}
UNSECURED = "unsecured"
NAMES = METHODS | {UNSECURED: "the same without security"}
PAIRS = (
    ("method2-spf", "method2-lora"),
    ("method2-spf", "fedavg"),
    ("method2-lora", "fedavg"),
    ("method2-spf", UNSECURED),
)
LR = {"method2-spf": 1e-2, "method2-lora": 3e-2, "fedavg": 1e-2}
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
N_TRAIN = 1500
N_QUESTIONS = 100
TUNING_SEED = 1000
Figures = dict[str, dict[str, dict[int, float]]]
"""By figure, method and seed."""


def recipe(partition: str, folder: Path, tested: str = "test") -> Job:
    """The recipe's job on fewer training questions, those with the smallest hash of their id."""
    found = recipe_file(REPOSITORY / "recipes/medquad-five-sites" / RECIPES[partition], folder)
    if found is None:
        sys.exit("error: no data folder\nhint: set CLOISTER_SHARED to the folder that holds data/datasets")
    job = load_job(found)
    whole = Path(job.clients[0].datasets["train"].path)
    paths = {
        "train": write_rows(folder / "train.jsonl", sample_rows(whole, N_TRAIN)),
        "test": whole.with_name(f"{tested}.jsonl"),
    }
    clients = [
        client.model_copy(
            update={split: data.model_copy(update={"path": str(paths[split])})
                    for split, data in client.datasets.items()}
        )
        for client in job.clients
    ]  # fmt: skip
    return job.model_copy(update={"clients": tuple(clients)})


def run(job: Job, folder: Path, seeds: list[int], lr: Mapping[str, float], *, quick: bool) -> Figures:
    """Every method with every seed, and what each came to."""
    n = n_questions(quick)
    found = compare(job, out=folder, methods=METHODS, seeds=seeds, generate=n, lr=lr, on_event=_tell)
    figures: Figures = {"perplexity": {}, "ROUGE-L": {}}
    for method in METHODS:
        for seed in seeds:
            path = found.folder / f"{method}-{seed}" / "result.json"
            if not path.is_file():
                sys.exit(f"error: {method} with seed {seed} failed\nhint: {path.with_name('failure.json')} says why")
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            figures["perplexity"].setdefault(method, {})[seed] = float(result["metric"]["value"])
            told = result["completions"]
            scores = rouge_l_scores(told["references"], told["completions"], ids=told["ids"], clients=told["clients"])
            figures["ROUGE-L"].setdefault(method, {})[seed] = 100 * scores.overall
    return figures


def unsecured(job: Job, kept: Path, seed: int, *, quick: bool) -> dict[str, float]:
    """SPF + LoRA's figures without any security; what is kept is not made again."""
    if not kept.is_file():
        trained = train_unsecured(derive_job(job, "method2-spf", seed, lr=LR["method2-spf"]))
        asked = held_out(job, n_questions(quick))
        ids, clients = [question.id for question in asked], [question.client for question in asked]
        told = [trained.complete(str(question.asked), MAX_NEW_TOKENS) for question in asked]
        scores = rouge_l_scores([question.reference for question in asked], told, ids=ids, clients=clients)
        kept.write_text(json.dumps({"perplexity": trained.metric, "ROUGE-L": 100 * scores.overall}), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def n_questions(quick: bool) -> int:
    return 4 if quick else N_QUESTIONS


def _tell(event: Mapping[str, Any]) -> None:
    if event["event"].startswith("compare"):
        print(json.dumps(event, default=str), file=sys.stderr, flush=True)


def tune(folder: Path) -> None:
    """Each method's perplexity on the validation split, of the natural partition, by rate."""
    for rate in RATES:
        job, where = recipe("natural", folder, "valid"), folder / f"tune-{rate}"
        found = run(job, where, [TUNING_SEED], dict.fromkeys(METHODS, rate), quick=True)["perplexity"]
        told = ", ".join(f"{name} {found[method][TUNING_SEED]:.3f}" for method, name in METHODS.items())
        print(f"rate {rate}: perplexity {told}", flush=True)


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, four questions, one partition")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="rates, on the validation split")
    parser.add_argument("--keep", type=Path, help="work in this folder, leave everything there, and go on from there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with work_folder(args.keep) as folder:
        if args.tune:
            tune(folder)
            return
        for partition in ("natural",) if args.quick else RECIPES:
            seeds = list(range(1 if args.quick else args.seeds))
            job = recipe(partition, folder)
            found = run(job, folder / partition, seeds, LR, quick=args.quick)
            for seed in seeds:
                kept = folder / partition / f"{UNSECURED}-{seed}.json"
                for figure, value in unsecured(job, kept, seed, quick=args.quick).items():
                    found[figure].setdefault(UNSECURED, {})[seed] = value
            for ours, peer in PAIRS:
                for figure, line in (("perplexity", row), ("ROUGE-L", difference)):
                    sides = [list(found[figure][method].values()) for method in (ours, peer)]
                    sign, unit = ("/", "") if line is row else ("-", "points")
                    label = f"{figure}, {NAMES[ours]} {sign} {NAMES[peer]}, {partition}"
                    rows.append(line(label, sides[0], sides[1], unit))
            write_csv(out_path("medquad", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
