"""One method with one seed, trained and asked: what a process of `compare` does."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.config import Job
from cloister.errors import FederationError

from ._compare_data import Question, TokenFiles, by_client, held_out, write_tokens
from ._compare_jobs import METHODS, n_steps
from ._events import EventFile
from ._predict import MAX_NEW_TOKENS, predict_all
from ._result import versions
from ._run import run

if TYPE_CHECKING:
    from cloister.federation import InsecurePeerJob

    from ._launch import Programs

RESULT_VERSION = 1


@dataclass(frozen=True)
class Order:
    """What is to be trained.

    Attributes:
        method, seed: of the comparison.
        job: the method's own, from `derive_job`.
        generate: how many held-out prompts to complete (causal-lm).
    """

    method: str
    seed: int
    job: Job
    generate: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON. *Secret* where the store's options hold credentials."""
        job = self.job.model_dump(mode="json")
        return {"method": self.method, "seed": self.seed, "job": job, "generate": self.generate}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Order:
        """What `as_dict` gave."""
        return cls(**{**given, "job": Job.model_validate_json(json.dumps(given["job"]))})


def carry_out(order: Order, folder: Path, events: EventFile, *, programs: Programs | None = None) -> dict[str, Any]:
    """Trains, then asks the tuned model every held-out question. Returns what `result.json` of the folder holds.

    Raises:
        CloisterError: as `run`; or a client was left out, so that the figures would not be comparable.
    """
    began = time.monotonic()
    if METHODS[order.method].is_protected:
        found = _ours(order, folder, events, programs)
    else:
        found = _plain(order, folder, events, began)
    found["n_steps"] = n_steps(order.job, order.method, found["n_train"])
    return {
        "version": RESULT_VERSION,
        "method": order.method,
        "seed": order.seed,
        "task": order.job.task.name,
        **found,
        "whole_s": round(time.monotonic() - began, 3),
        "versions": versions(),
    }


# --- ours -------------------------------------------------------------------------------------------------------------


def _ours(order: Order, folder: Path, events: EventFile, programs: Programs | None) -> dict[str, Any]:
    job = order.job
    done = run(job, runs_dir=folder / "runs", on_event=events.append, programs=programs)
    result = done.result
    if result["left_out"]:
        names = ", ".join(result["left_out"])
        raise FederationError(f"{names} did not deliver in time, and was left out", hint="give federation.timeout_s")
    questions = held_out(job) if job.task.labels else held_out(job, order.generate)
    asked = by_client(questions)
    events.emit("phase", phase="ask", status="begin")
    texts = {client: [question.asked for question in own] for client, own in asked.items()}
    answers = predict_all(done.run_dir, texts, programs=programs) if texts else {}
    if job.task.labels:
        index = {label: i for i, label in enumerate(job.task.labels)}
        told = [index[answer["label"]] for client in asked for answer in answers[client]]
    else:
        told = [answer["completion"] for client in asked for answer in answers[client]]
    crossed = dict(result["bytes"])
    return {
        "metric": result["metric"],
        **_examples(job, [question for own in asked.values() for question in own], told),
        "wall_s": result["wall_s"],
        "wire_bytes": crossed.get("relay", 0) + crossed.get("store", 0),
        "accelerator_bytes": crossed.get("accelerator"),
        "enclave_peak_bytes": _enclave_peak(result),
        "n_trained": result.get("n_trainable") or _n_trained_in_enclaves(job),
        "n_train": {client: counts["train"] for client, counts in result["n_examples"].items()},
        "run_dir": str(done.run_dir.relative_to(folder.resolve())),
        "simulated": result["simulated"],
    }


def _enclave_peak(result: Mapping[str, Any]) -> int:
    """Of the largest enclave: the server's, and in Method 1 the clients' too."""
    prefixes = ("server", "client/") if result["method"] == "enclave" else ("server",)
    return max((n for name, n in result["peak_rss_bytes"].items() if name.startswith(prefixes)), default=0)


def _n_trained_in_enclaves(job: Job) -> int:
    """Of a client's adapter and head in Method 1, counted on a model of its own."""
    from cloister.adapters import adapter_spec, attach_adapter
    from cloister.slicing import inspect_backbone, load_whole

    model = load_whole(inspect_backbone(job.model.path), task=job.task.name, n_labels=len(job.task.labels) or None)
    return adapter_spec(attach_adapter(model, job.adapter_spec(), seed=0)).n_numbers


def _examples(job: Job, questions: list[Question], told: list[Any]) -> dict[str, Any]:
    """Every question beside its answer. *Secret*: labels and texts are their clients'."""
    if not questions:
        return {}
    named = {"ids": [q.id for q in questions], "clients": [q.client for q in questions]}
    if job.task.labels:
        return {"examples": {**named, "labels": [q.label for q in questions], "predicted": told}}
    return {"completions": {**named, "references": [q.reference for q in questions], "completions": told}}


# --- the unprotected peers --------------------------------------------------------------------------------------------


def _plain(order: Order, folder: Path, events: EventFile, started: float) -> dict[str, Any]:
    from cloister.federation import run_insecure_peer, train_insecure_central

    job, names = order.job, list(order.job.client_names)
    events.emit("run", run_id=order.name, job=job.name, method=order.method, clients=names, simulated=False)
    events.emit("phase", phase="prepare", status="begin")
    work = folder / "plain"
    files = write_tokens(job, work)
    peer = insecure_peer_job(job, files, initial=_first_adapter(job, work))
    events.emit("phase", phase="train", status="begin")
    began = time.perf_counter()

    def tell(step: int, steps: int, loss: float | None = None) -> None:
        seen = peer.epochs * sum(files.n_train.values()) * step / steps / max(time.perf_counter() - began, 1e-9)
        told = {} if loss is None else {"loss": round(loss, 5)}
        events.emit("step", step=step, n_steps=steps, model="federated", examples_per_s=round(seen, 1), **told)

    if METHODS[order.method].has_rounds:
        rounds = peer.rounds or peer.epochs
        found = run_insecure_peer(peer, keep=work, on_round=lambda n: tell(n, rounds))
        found["wire_bytes"] = found["payload_bytes"]
    else:
        found = train_insecure_central(peer, work, on_step=tell)
        found |= {"wall_s": time.monotonic() - started, "wire_bytes": files.text_bytes}
    events.emit("phase", phase="ask", status="begin")
    asked = _asked_plain(order, peer, files, work)
    shutil.rmtree(work)  # copies of everybody's data
    return {
        "metric": _metric(job, found),
        **asked,
        "wall_s": round(found["wall_s"], 3),
        "wire_bytes": found["wire_bytes"],
        "accelerator_bytes": None,
        "enclave_peak_bytes": None,
        "n_trained": found["n_trained"],
        "n_train": dict(files.n_train),
        "run_dir": None,
        "simulated": False,
    }


def insecure_peer_job(job: Job, files: TokenFiles, *, initial: Path | None) -> InsecurePeerJob:
    """The unprotected peers' job out of a derived one. Each client's process has its share of the processors."""
    from cloister.federation import InsecurePeerJob
    from cloister.slicing import inspect_backbone, local_folder

    info = inspect_backbone(job.model.path)
    training, adapter = job.training, job.adapter
    rounds = job.method.rounds if job.method.name == "enclave" else 1
    return InsecurePeerJob(
        model=local_folder(info).resolve(),
        train=tuple(files.train.values()),
        test=files.every_test,
        n_labels=len(job.task.labels),
        max_length=files.max_length,
        r=adapter.r,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        targets=adapter.targets if isinstance(adapter.targets, str) else ",".join(adapter.targets),
        lr=training.lr,
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        warmup_ratio=training.warmup_ratio,
        max_grad_norm=training.max_grad_norm,
        batch_size=training.batch_size * training.grad_accumulation,
        epochs=rounds * training.epochs,
        rounds=rounds,
        seed=training.seed,
        num_threads=max(1, (os.cpu_count() or 1) // len(job.clients)) if job.method.name == "enclave" else 0,
        backbone_dropout=False,  # ours have none: a frozen block is one fixed function
        initial=initial,
        task=job.task.name,
        pooling=job.task_spec(is_encoder=info.is_encoder).pooling,
    )


def _first_adapter(job: Job, folder: Path) -> Path:
    """The adapter and head that Method 1's clients draw from the same seed, by the peers' names."""
    import torch

    from cloister.adapters import adapter_state, attach_adapter
    from cloister.slicing import inspect_backbone, load_whole

    model = load_whole(inspect_backbone(job.model.path), task=job.task.name, n_labels=len(job.task.labels) or None)
    prefix = f"{model.base_model_prefix}." if job.task.labels else ""
    state = adapter_state(attach_adapter(model, job.lora_spec(), seed=job.training.seed))
    found = {peer_name(name, prefix): torch.tensor(array) for name, array in state.tensors.items()}
    if job.task.labels:
        found.setdefault("head.bias", torch.zeros(len(job.task.labels)))  # decoders' own heads have none
    path = folder / "first.pt"
    torch.save(found, path)
    return path


def peer_name(name: str, prefix: str) -> str:
    """A tensor of our adapter state as the peers call it.

    Args:
        name: of ours, such as `base_model.model.bert.encoder.layer.0.output.dense.lora_A.weight`.
        prefix: under which ours has the bare backbone, such as `bert.`, which is all that a peer wraps where it has a
            head of its own; empty where both wrap the same model.
    """
    for head in (".classifier.", ".score."):
        _, is_head, rest = name.partition(head)
        if is_head:
            return f"head.{rest}"
    return "adapter." + name.replace(f"base_model.model.{prefix}", "base_model.model.", 1)


def _metric(job: Job, found: Mapping[str, Any]) -> dict[str, Any]:
    if job.task.labels:
        return {"name": "accuracy", "value": found["metric"], "loss": found["loss"]}
    value = math.exp(min(found["loss"], 700.0))
    return {"name": "perplexity", "value": value, "loss": found["loss"], "extra": {"token_accuracy": found["metric"]}}


def _asked_plain(order: Order, peer: InsecurePeerJob, files: TokenFiles, work: Path) -> dict[str, Any]:
    from cloister.federation import ask_insecure_model

    job = order.job
    if job.task.labels:
        told: list[Any] = ask_insecure_model(peer, work, test=files.every_test)
        return _examples(job, held_out(job), told)
    questions = held_out(job, order.generate)
    if not questions:
        return {}
    from cloister.slicing import inspect_backbone, load_tokenizer
    from cloister.train import question_features

    info = inspect_backbone(job.model.path)
    tokenizer: Any = load_tokenizer(info)
    features = question_features(
        [q.asked for q in questions], tokenizer, job.task_spec(is_encoder=False), model_max_length=info.max_length
    )
    prompts = [feature.hidden.tolist() for feature in features]
    made = ask_insecure_model(peer, work, prompts=prompts, end=tokenizer.eos_token_id, limit=MAX_NEW_TOKENS)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
    return _examples(job, questions, texts)
