"""Rules that tie several keys of a job together.

They work on the raw TOML tables, so that they can be reported together with the type errors of the same file: a rule
looks only at what has the right shape and stays silent where pydantic will already complain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cloister.errors import Problem


def rule_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """Every broken cross-rule of a raw job table."""
    return [
        *_client_names(raw),
        *_min_clients(raw),
        *_held_out(raw),
        *_labels(raw),
        *_baselines(raw),
        *_model_path(raw),
    ]


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = raw.get(key)
    return found if isinstance(found, Mapping) else {}


def _clients(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = raw.get("clients")
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    return [client if isinstance(client, Mapping) else {} for client in found]


def _client_names(raw: Mapping[str, Any]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for i, client in enumerate(_clients(raw)):
        name = client.get("name")
        if not isinstance(name, str):
            continue
        if name in first:
            yield Problem(
                f"clients[{i}].name",
                f"two clients have the name {name!r} (the other is clients[{first[name]}])",
                "give every client a name of its own",
            )
        first.setdefault(name, i)


def _min_clients(raw: Mapping[str, Any]) -> Iterator[Problem]:
    wanted = _table(raw, "federation").get("min_clients")
    n = len(_clients(raw))
    if isinstance(wanted, int) and n and wanted > n:
        yield Problem("federation.min_clients", f"{wanted} clients are asked for, and the job has {n}")


def _held_out(raw: Mapping[str, Any]) -> Iterator[Problem]:
    clients = _clients(raw)
    if clients and not any("test" in client for client in clients):
        yield Problem("clients", "no client has held-out data", 'give at least one of them a "test" path')


def _labels(raw: Mapping[str, Any]) -> Iterator[Problem]:
    task = _table(raw, "task")
    name, labels = task.get("name"), task.get("labels")
    if name == "sequence-classification":
        if labels is None or labels == []:
            yield Problem("task.labels", "missing", 'name the classes in order, for example labels = ["no", "yes"]')
        elif isinstance(labels, list):
            strings = [label for label in labels if isinstance(label, str)]
            if len(labels) == 1:
                yield Problem("task.labels", "has one class; a classifier needs two or more")
            for label in sorted({label for label in strings if strings.count(label) > 1}):
                yield Problem("task.labels", f"the class {label!r} is listed twice")
    elif name == "causal-lm":
        for key in ("labels", "pooling"):
            if task.get(key):
                yield Problem(f"task.{key}", "belongs to sequence-classification only", "remove it for causal-lm")


def _baselines(raw: Mapping[str, Any]) -> Iterator[Problem]:
    baselines = _table(raw, "evaluation").get("baselines")
    if _table(raw, "task").get("name") != "causal-lm" or not isinstance(baselines, list):
        return
    for i, baseline in enumerate(baselines):
        if baseline in ("majority", "linear-head"):
            yield Problem(f"evaluation.baselines[{i}]", f"{baseline!r} exists for sequence-classification only")


def _model_path(raw: Mapping[str, Any]) -> Iterator[Problem]:
    path = _table(raw, "model").get("path")
    if isinstance(path, str) and path != path.strip():
        yield Problem("model.path", "begins or ends with a space")
