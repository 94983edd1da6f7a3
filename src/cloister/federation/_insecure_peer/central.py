"""The unprotected centralised peer: all clients' data in one process, plain LoRA over the whole model. In the clear."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cloister.federation._insecure_peer import task
from cloister.federation._insecure_peer.job import STATE_FILE, InsecurePeerJob

OnStep = Callable[[int, int, float], None]


def train_insecure_central(job: InsecurePeerJob, keep: Path, *, on_step: OnStep | None = None) -> dict[str, Any]:
    """Trains on every client's file together, in this process, and leaves the final state in `keep`.

    Returns:
        metric, loss: of the common test set, as `run_insecure_peer` has them. train_s: of the training loop.
        n_trained: trainable parameters.
    """
    config = job.config(keep) | {"local-epochs": job.epochs}
    device = task.start(config)
    model = task.PlainModel(config)
    if job.initial is not None:
        task.set_state(model, torch.load(job.initial))
    began = time.perf_counter()
    task.train(model, task.load_data(job.train, config, seed=job.seed), config, device, on_step=on_step)
    train_s = time.perf_counter() - began
    loss, right = task.test(model, task.load_data(job.test, config), device)
    torch.save(task.get_state(model), keep / STATE_FILE)
    return {
        "metric": right,
        "loss": loss,
        "train_s": train_s,
        "n_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def ask_insecure_model(
    job: InsecurePeerJob,
    keep: Path,
    *,
    test: Path | None = None,
    prompts: list[list[int]] | None = None,
    end: int | None = None,
    limit: int = 64,
) -> list[Any]:
    """What the final state in `keep` answers: the class of each row of `test`, or each prompt's new tokens.

    Args:
        job, keep: as the model was trained.
        test: JSON lines, as the job's.
        prompts: token ids.
        end: the token that ends a completion; None where there is none.
        limit: most new tokens.
    """
    config = job.config(keep)
    device = task.start(config)
    model = task.PlainModel(config)
    task.set_state(model, torch.load(keep / STATE_FILE))
    if test is not None:
        return task.predict(model, task.load_data(test, config), device)
    options: dict[str, Any] = {"end": end, "limit": limit, "max_length": job.max_length, "device": device}
    return [task.complete(model, ids, **options) for ids in prompts or []]
