"""Both sides of bench/method1_vs_flower.py: the same files, the same first adapter, the same order of examples."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench._masked import cpu_s_of
from bench._sides import Rows, rows_of, sample_rows, write_rows
from bench.peers.flower_lora import PeerJob

from cloister.config import Job, load_job
from cloister.testing import shared_dir

if TYPE_CHECKING:
    from cloister.api import Launch

Adapter = Literal["lora", "prefix"]

N_CLIENTS, N_ROUNDS = 3, 3
BATCH_SIZE, MAX_LENGTH = 16, 128
RANK, ALPHA, PREFIX_TOKENS = 8, 16.0, 16
LEARNING_RATE: dict[Adapter, float] = {"lora": 2e-3, "prefix": 1e-2}
SIZES = {"hoc": (300, 400), "druglib": (300, 400)}
"""Examples for training and test of a data set, over all clients; those with the smallest hash of their id."""
QUICK_SIZES = (96, 96)
NO_CLIPPING = 1e6  # a norm that no gradient has: the peer clips none


@dataclass(frozen=True)
class Variant:
    """One way to run Method 1."""

    adapter: Adapter
    ring: str
    pad: str

    def __str__(self) -> str:
        name = "LoRA" if self.adapter == "lora" else "P-tuning v2"
        return f"{name}, {self.ring}, {self.pad}"

    @property
    def key(self) -> str:
        return f"{self.adapter}-{self.ring}-{self.pad}"


@dataclass(frozen=True)
class Setting:
    """Files of both sides.

    Attributes:
        folder: with `CLIENT-train.jsonl` and `CLIENT-test.jsonl` of each client, and `test.jsonl`, all tests together.
        labels: classes; the files name them by index.
        model: the backbone's folder.
        n_train: examples of every client.
        epochs: local ones, in each round.
    """

    folder: Path
    labels: tuple[str, ...]
    model: str
    n_train: dict[str, int]
    epochs: int = 1

    @property
    def n_steps(self) -> int:
        """Optimiser steps of a whole run, all clients together."""
        return N_ROUNDS * self.epochs * sum(-(-n // BATCH_SIZE) for n in self.n_train.values())

    @property
    def n_seen(self) -> int:
        """Examples that a whole run trains on, one counted as often as it is seen."""
        return N_ROUNDS * self.epochs * sum(self.n_train.values())

    def ours(self, seed: int, variant: Variant) -> Job:
        adapter: dict[str, Any] = {"name": variant.adapter}
        adapter |= {"r": RANK, "alpha": ALPHA} if variant.adapter == "lora" else {"n_tokens": PREFIX_TOKENS}
        found = {
            "name": "method1-bench",
            "task": {
                "name": "sequence-classification",
                "labels": self.labels,
                "pooling": "mean",
                "max_length": MAX_LENGTH,
                "on_too_long": "truncate",
            },
            "model": {"path": self.model},
            "method": {"name": "enclave", "rounds": N_ROUNDS, "ring": variant.ring, "pad": variant.pad},
            "adapter": adapter,
            "training": {
                "epochs": self.epochs,
                "batch_size": BATCH_SIZE,
                "lr": LEARNING_RATE[variant.adapter],
                "weight_decay": 0.0,
                "warmup_ratio": 0.0,
                "schedule": "constant",
                "max_grad_norm": NO_CLIPPING,
                "seed": seed,
            },
            "clients": [
                {"name": name, **{split: str(self.folder / f"{name}-{split}.jsonl") for split in ("train", "test")}}
                for name in self.n_train
            ],
        }
        return Job.model_validate_json(json.dumps(found))

    def peer(self, seed: int, adapter: Adapter) -> PeerJob:
        """On as many threads as ours: each client has its share of the processors."""
        return PeerJob(
            model=Path(self.model),
            train=tuple(self.folder / f"{name}-train.jsonl" for name in self.n_train),
            test=self.folder / "test.jsonl",
            n_labels=len(self.labels),
            max_length=MAX_LENGTH,
            r=RANK,
            alpha=ALPHA,
            lr=LEARNING_RATE[adapter],
            weight_decay=0.0,
            batch_size=BATCH_SIZE,
            epochs=N_ROUNDS * self.epochs,
            rounds=N_ROUNDS,
            seed=seed,
            num_threads=max(1, (os.cpu_count() or 1) // N_CLIENTS),
            adapter=adapter,
            prefix_tokens=PREFIX_TOKENS,
            backbone_dropout=False,  # the enclave's frozen blocks are one fixed function
            initial=self._first_adapter(seed, adapter),
        )

    def _first_adapter(self, seed: int, adapter: Adapter) -> Path:
        """The adapter and head that our clients draw from this seed, by the peer's names."""
        import torch

        from cloister.adapters import adapter_state

        path = self.folder / f"first-{adapter}-{seed}.pt"
        state = adapter_state(whole_side(self.ours(seed, Variant(adapter, "faithful", "otp"))).peft)  # type: ignore[arg-type]
        torch.save({_peers_name(name): torch.tensor(array) for name, array in state.tensors.items()}, path)
        return path


def whole_side(job: Job) -> Any:
    """The model with its fresh adapter, as a client's enclave has it."""
    from cloister.adapters import attach_adapter
    from cloister.slicing import WholeSide, inspect_backbone, load_whole

    info, task = inspect_backbone(job.model.path), job.task_spec()
    model = load_whole(info, task=task.name, n_labels=len(task.labels))
    peft = attach_adapter(model, job.adapter_spec(), seed=job.training.seed)
    return WholeSide(peft, info, task=task.name, pooling=task.pooling)


def _peers_name(name: str) -> str:
    """The peer has the encoder alone in PEFT, and a head of its own."""
    if name.startswith("prompt_encoder."):
        return "adapter.prompt_embeddings"
    _, is_head, rest = name.partition("classifier.")
    return f"head.{rest}" if is_head else "adapter." + name.replace("base_model.model.bert.", "base_model.model.")


# --- data -------------------------------------------------------------------------------------------------------------


def make_setting(folder: Path, data: str, *, quick: bool, epochs: int = 1) -> Setting:
    """Writes every client's data once, for both sides.

    Raises:
        FileNotFoundError: there is no such data set on this machine.
    """
    from cloister.cli._quickstart import write_quickstart

    folder.mkdir(parents=True, exist_ok=True)
    job = load_job(write_quickstart(folder / "quickstart"))  # also for its backbone
    if data == "quickstart":
        labels, parts = job.task.labels, _quickstart_parts(job, quick=quick)
    else:
        labels, parts = _shared_parts(data, quick=quick)
    n_train, every_test = {}, []
    for name, train, test in parts:
        write_rows(folder / f"{name}-train.jsonl", train)
        write_rows(folder / f"{name}-test.jsonl", test)
        n_train[name] = len(train)
        every_test += test
    write_rows(folder / "test.jsonl", every_test)
    return Setting(folder, labels, job.model.path, n_train, epochs)


def _quickstart_parts(job: Job, *, quick: bool) -> Iterator[tuple[str, Rows, Rows]]:
    for client in job.clients:
        train, test = (rows_of(job, client, client.datasets[split]) for split in ("train", "test"))
        n_train, n_test = (n // N_CLIENTS if quick else None for n in QUICK_SIZES)
        yield client.name, train[:n_train], test[:n_test]


def _shared_parts(data: str, *, quick: bool) -> tuple[tuple[str, ...], Iterator[tuple[str, Rows, Rows]]]:
    """Three clients out of the data's five, whose labels are spread unevenly (Dirichlet); tests are dealt out."""
    shared = shared_dir()
    folder = None if shared is None else shared / "data/datasets" / data
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f"no data set {data}: CLOISTER_SHARED names the folder of data")
    n_train, n_test = QUICK_SIZES if quick else SIZES[data]
    train, test = sample_rows(folder / "train.jsonl", n_train), sample_rows(folder / "test.jsonl", n_test)
    labels = tuple(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["labels"])

    def parts() -> Iterator[tuple[str, Rows, Rows]]:
        for i in range(N_CLIENTS):
            own = [row for row in train if row["clients"]["dirichlet"] % N_CLIENTS == i]
            yield f"client-{i}", _plain(own), _plain(test[i::N_CLIENTS])

    return labels, parts()


def _plain(rows: Rows) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": row["label"]} for row in rows]


# --- one run of ours --------------------------------------------------------------------------------------------------


class AcceleratorWatch:
    """CPU seconds of the accelerators while the job trains, looked at a few times a second; `on_tick` of a run."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}

    def __call__(self, launch: Launch) -> None:
        if launch.phase != "train/begin":
            return
        pids = [pids for name, pids in launch.pids().items() if name.startswith("accelerator/")]
        for pid in chain.from_iterable(pids):
            self._last[pid] = cpu_s_of(pid)
            self._first.setdefault(pid, self._last[pid])

    @property
    def cpu_s(self) -> float:
        return sum(self._last.values()) - sum(self._first.values())


def run_ours(job: Job, folder: Path) -> dict[str, Any]:
    """One whole run, from the call to its report; the take-down is in it."""
    watch, began = AcceleratorWatch(), time.perf_counter()
    import cloister

    result = cloister.run(job, runs_dir=folder / "runs", on_tick=watch).result
    wall_s = time.perf_counter() - began
    told = [facts for done in result["rounds"] for facts in done["per_client"].values()]
    n_steps = sum(facts["n_steps"] for facts in told)
    pad = result["pad"]  # of the whole run, its evaluation included
    moved = sum(sum(bytes_of.values()) for bytes_of in pad["accelerator_bytes"].values())
    return {
        "metric": result["metric"]["value"],
        "loss": result["metric"]["loss"],
        "wall_s": wall_s,
        "n_steps": n_steps,
        "step_s": sum(facts["wall_s"] for facts in told) / n_steps,
        "enclave_cpu_s": sum(facts["cpu_s"] for facts in told) / n_steps,
        "accelerator_cpu_s": watch.cpu_s / n_steps,
        "round_bytes": result["bytes"]["relay"] / N_ROUNDS,
        "accelerator_bytes": moved / n_steps,
        "pad_elements": sum(pad["elements"].values()) / n_steps,
        "phases_s": result["phases_s"],
        "restarts": result["restarts"],
    }
