"""What `compare` trains: the methods, and each one's job out of the one that was given.

Every method sees each training example equally often, in batches of the same size, at the same rates: a job of E epochs
is E epochs at once for the centralised method and Method 2, and R rounds of E / R local epochs for those with rounds
(docs/compare.md section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloister.config import Job, rewrite_job
from cloister.errors import ConfigError, Problem


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: what `--only` takes.
        label: for people.
        runs_as: the method of its job, "split" or "enclave"; the unprotected peers have its epochs and rounds.
        adapter: of its job.
        is_protected: whether cloister runs it. What is not runs in the clear.
    """

    name: str
    label: str
    runs_as: str
    adapter: str
    is_protected: bool = True

    @property
    def has_rounds(self) -> bool:
        """Whether clients train by themselves, in rounds."""
        return self.runs_as == "enclave"


REFERENCE = "fedavg"
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("central", "LoRA, all data in one place", "split", "lora", is_protected=False),
        Method(REFERENCE, "FedAvg LoRA on plain Flower", "enclave", "lora", is_protected=False),
        Method("method1-lora", "Method 1, LoRA in enclaves", "enclave", "lora"),
        Method("method1-prefix", "Method 1, P-tuning v2 in enclaves", "enclave", "prefix"),
        Method("method2-lora", "Method 2, LoRA", "split", "lora"),
        Method("method2-spf", "Method 2, SPF + LoRA", "split", "spf"),
    )
}


def chosen_methods(names: Iterable[str] | None) -> tuple[str, ...]:
    """The methods of these names in the table's order; all of them for None.

    Raises:
        ConfigError: no name, or one that no method has.
    """
    if names is None:
        return tuple(METHODS)
    wanted = list(names)
    known = f"known: {', '.join(METHODS)}"
    for name in wanted:
        if name not in METHODS:
            raise ConfigError(f"no method is called {name!r}", hint=known)
    if not wanted:
        raise ConfigError("no method was chosen", hint=known)
    return tuple(name for name in METHODS if name in wanted)


def check_comparable(job: Job) -> None:
    """Refuse what not every method can do alike: the figures would differ for another reason than the method.

    Raises:
        ConfigError: with every problem and its key.
    """
    problems: list[Problem] = []
    if job.enclave.backend != "simulated" or job.policy.file is not None:
        key = "policy.file" if job.policy.file is not None else "enclave.backend"
        cause = "a comparison runs several jobs, and reference values are of one: it uses the simulated backend"
        problems.append(Problem(key, cause, "remove it for the comparison"))
    for key in ("max_steps", "patience"):
        if getattr(job.training, key, None) is not None:
            cause = "would let some methods train on more examples than others"
            problems.append(Problem(f"training.{key}", cause, "set epochs instead"))
    for i, client in enumerate(job.clients):
        if client.weight != 1.0:
            problems.append(Problem(f"clients[{i}].weight", "is known to Method 2 only", "remove it"))
    if not any(client.test for client in job.clients):
        cause = "no client has held-out data, so there is nothing to compare on"
        problems.append(Problem("clients", cause, 'give at least one of them a "test" path'))
    if problems:
        raise ConfigError(problems, hint=problems[0].hint if len(problems) == 1 else "")


def epochs_and_rounds(job: Job) -> tuple[int, int]:
    """How often a whole training sees each example, and in how many rounds the methods with rounds do it.

    A job of Method 1 says both: its rounds, and its local epochs in each. One of Method 2 has a round for each epoch.
    """
    if job.method.name == "enclave":
        return job.method.rounds * job.training.epochs, job.method.rounds
    return job.training.epochs, job.training.epochs


def derive_job(job: Job, name: str, seed: int, *, lr: float | None = None) -> Job:
    """The job of one method: method, adapter, rounds and seed rewritten; task, model, data and training shared.

    Args:
        job: the one that was given.
        name: of the method. The unprotected peers' is what they take epochs, rates and adapter from.
        seed: of everything random in it.
        lr: in place of the job's.

    Raises:
        ConfigError: the method cannot be given such a job.
    """
    method = METHODS[name]
    epochs, rounds = epochs_and_rounds(job)
    training: dict[str, Any] = {"seed": seed, "epochs": epochs // rounds if method.has_rounds else epochs}
    changes: dict[str, dict[str, Any]] = {
        "method": {"name": method.runs_as},
        "adapter": {"name": method.adapter},
        "training": training if lr is None else training | {"lr": lr},
        "release": {"what": "none"},
        "federation": {"min_clients": None},  # a run that leaves somebody out is not comparable
    }
    if method.has_rounds:
        changes["method"]["rounds"] = rounds
        if method.adapter != "lora":
            changes["aggregation"] = {"exact_lora": False}
    else:
        changes["evaluation"] = {"baselines": []}
    if not method.is_protected:
        changes["adapter"]["freeze_a"] = False
    return rewrite_job(job, changes)


def unavailable(job: Job, name: str) -> str:
    """Why this method cannot run this job at all; empty where it can, as far as the configuration tells."""
    from cloister.slicing import inspect_backbone

    if METHODS[name].adapter != "prefix" or job.task.max_length is None:
        return ""
    n_tokens, limit = derive_job(job, name, 0).adapter.n_tokens, inspect_backbone(job.model.path).max_length
    if job.task.max_length + n_tokens <= limit:
        return ""
    return f"a prefix of {n_tokens} tokens and texts of {job.task.max_length} do not fit the model's {limit} positions"


def n_steps(job: Job, name: str, n_train: Mapping[str, int]) -> int:
    """Optimiser steps of a whole run, all clients together: of a derived job, on so many examples of each client."""
    size = job.training.batch_size * job.training.grad_accumulation
    if METHODS[name].has_rounds:
        return job.method.rounds * job.training.epochs * sum(math.ceil(n / size) for n in n_train.values())
    return job.training.epochs * math.ceil(sum(n_train.values()) / size)
