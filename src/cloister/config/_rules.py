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
        *_keys_of_the_other_method(raw),
        *_keys_of_the_other_adapter(raw),
        *_spf(raw),
        *_keys_of_clients(raw),
        *_early_stopping(raw),
        *_dp_sgd(raw),
        *_aggregation(raw),
    ]


_OF_METHOD = {
    "split": (
        "model.cut_layer",
        "method.boundary",
        "method.near_batch_size",
        "training.checkpoint_every_steps",
        "training.precision",
        "training.patience",
        "training.held_out",
        "evaluation.baselines",
        "store.url",
        "store.shard_max_bytes",
        "store.options",
    ),
    "enclave": (
        "method.rounds",
        "method.ring",
        "method.pad",
        "method.bucket",
        "method.pool_bytes",
        "adapter.freeze_a",
        "training.privacy",
    ),
}
_OF_ADAPTER = {
    "lora": ("r", "alpha", "dropout", "targets", "use_rslora", "freeze_a"),
    "prefix": ("n_tokens", "projection", "hidden_size"),
    "spf": ("heads", "neurons", "criterion", "criterion_examples", "r", "alpha", "dropout", "use_rslora"),
}
_LOOKS_AT_NO_EXAMPLES = ("l1", "random")


_OF_RULE = {
    "fedprox": ("proximal_mu",),
    "fedadam": ("server_lr", "beta_1", "beta_2", "tau"),
    "trimmed-mean": ("trim",),
}


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


def _method(raw: Mapping[str, Any]) -> object:
    return _table(raw, "method").get("name", "split")


def _keys_of_the_other_method(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """A key without effect would let somebody believe in it."""
    method = _method(raw)
    for owner, keys in _OF_METHOD.items():
        if method not in _OF_METHOD or owner == method:
            continue
        for key in keys:
            section, _, name = key.partition(".")
            if name in _table(raw, section):
                yield Problem(key, f'belongs to the method "{owner}", and this job\'s is "{method}"', "remove it")
    if method == "split":
        if "aggregation" in raw:
            yield Problem("aggregation", 'belongs to the method "enclave"', "remove the section")
        if _table(raw, "adapter").get("name") == "prefix":
            yield Problem("adapter.name", 'a prefix needs the method "enclave"', 'use "lora"')
    elif method == "enclave":
        if _table(raw, "release").get("what") == "weights":
            yield Problem("release.what", 'belongs to the method "split"', 'use "adapter"')
        if _table(raw, "adapter").get("name") == "spf":
            yield Problem("adapter.name", 'SPF needs the method "split"', 'use "lora"')


def _keys_of_the_other_adapter(raw: Mapping[str, Any]) -> Iterator[Problem]:
    adapter = _table(raw, "adapter")
    kind = adapter.get("name", "lora")
    if kind not in _OF_ADAPTER:
        return
    for key, owners in _keys_of_others(_OF_ADAPTER, kind).items():
        if key in adapter:
            named = " and ".join(f'"{owner}"' for owner in owners)
            yield Problem(f"adapter.{key}", f"belongs to the adapter {named}", "remove it")


def _keys_of_others(keys_of: Mapping[str, tuple[str, ...]], kind: str) -> dict[str, list[str]]:
    """The keys that this kind does not have, and whose they are."""
    found: dict[str, list[str]] = {}
    for owner, keys in keys_of.items():
        for key in keys:
            if key not in keys_of.get(kind, ()):
                found.setdefault(key, []).append(owner)
    return found


def _spf(raw: Mapping[str, Any]) -> Iterator[Problem]:
    adapter = _table(raw, "adapter")
    if adapter.get("name") != "spf":
        return
    criterion = adapter.get("criterion", "l1")
    if criterion in _LOOKS_AT_NO_EXAMPLES and "criterion_examples" in adapter:
        cause = f'the criterion "{criterion}" looks at no examples'
        yield Problem("adapter.criterion_examples", cause, 'remove it, or use "gradient" or "fisher"')
    if adapter.get("heads") == adapter.get("neurons") == 0:
        yield Problem("adapter.heads", "heads and neurons are both 0: nothing is selected", "raise one of them")


def _keys_of_clients(raw: Mapping[str, Any]) -> Iterator[Problem]:
    key, owner = ("accelerator", "enclave") if _method(raw) == "split" else ("weight", "split")
    for i, client in enumerate(_clients(raw)):
        if key in client:
            yield Problem(f"clients[{i}].{key}", f'belongs to the method "{owner}"', "remove it")


def _early_stopping(raw: Mapping[str, Any]) -> Iterator[Problem]:
    training = _table(raw, "training")
    if "held_out" in training and "patience" not in training and _method(raw) == "split":
        yield Problem("training.held_out", "does nothing without training.patience", "set patience, or remove it")


_NOT_WITH_DP_SGD = {
    "max_grad_norm": "DP-SGD clips each example's gradient, to training.privacy.clip_norm",
    "grad_accumulation": "DP-SGD takes each batch whole, of training.batch_size examples on average",
}


def _dp_sgd(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """What `[training.privacy]` leaves without effect, or cannot bound."""
    training = _table(raw, "training")
    if training.get("privacy") is None:
        return
    for key, why in _NOT_WITH_DP_SGD.items():
        if key in training:
            yield Problem(f"training.{key}", why, "remove it")
    if _table(raw, "aggregation").get("rule") == "fedprox":
        yield Problem("training.privacy", "fedprox adds to every gradient what DP-SGD has no place for", 'use "fedavg"')


def _aggregation(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """The rules of `AggregationSpec` that tie keys together."""
    found = _table(raw, "aggregation")
    rule, exact, private = found.get("rule", "fedavg"), found.get("exact_lora") is True, "privacy" in found
    if rule in ("fedadam", "trimmed-mean") and exact:
        yield Problem("aggregation.exact_lora", f"{rule} works on A and B apart", "use fedavg or fedprox")
    if exact and (_table(raw, "adapter").get("name") == "prefix" or _table(raw, "adapter").get("freeze_a") is True):
        yield Problem("aggregation.exact_lora", "needs LoRA that trains both A and B")
    if private and (exact or rule == "trimmed-mean"):
        yield Problem("aggregation.privacy", "one client's share of products or of order statistics is not bounded")
    if (private or rule == "trimmed-mean") and found.get("weighting", "examples") != "uniform":
        yield Problem("aggregation.weighting", "must not follow the numbers of examples here", 'set "uniform"')
    yield from _keys_of_the_other_rule(found, rule)
    n, trim = len(_clients(raw)), found.get("trim", 0.2)
    if rule == "trimmed-mean" and n and isinstance(trim, float) and int(trim * n) == 0:
        yield Problem("aggregation.trim", f"drops none of {n} clients", "it takes more clients, or a larger share")


def _keys_of_the_other_rule(found: Mapping[str, Any], rule: object) -> Iterator[Problem]:
    for owner, keys in _OF_RULE.items():
        for key in keys:
            if owner != rule and key in found:
                yield Problem(f"aggregation.{key}", f'belongs to the rule "{owner}"', "remove it")
    if rule == "fedprox" and not found.get("proximal_mu"):
        yield Problem("aggregation.proximal_mu", "fedprox without it is fedavg", "set it, for example to 0.01")


def drop_keys_of_others(raw: dict[str, Any]) -> None:
    """Take out of a dumped job what its method, adapter and rule do not have; there they are defaults."""
    method, adapter, aggregation = raw["method"]["name"], raw["adapter"], raw["aggregation"]
    for owner, keys in _OF_METHOD.items():
        for section, _, name in (key.partition(".") for key in keys if owner != method):
            raw.get(section, {}).pop(name, None)
    for given, kind, owners in ((adapter, adapter["name"], _OF_ADAPTER), (aggregation, aggregation["rule"], _OF_RULE)):
        for key in _keys_of_others(owners, kind):
            given.pop(key, None)
    if adapter.get("criterion") in _LOOKS_AT_NO_EXAMPLES:
        adapter.pop("criterion_examples", None)
    if "patience" not in raw["training"]:
        raw["training"].pop("held_out", None)
    for key in _NOT_WITH_DP_SGD if "privacy" in raw["training"] else ():
        raw["training"].pop(key, None)
    if method == "split":
        del raw["aggregation"]
    for client in raw["clients"]:
        client.pop("accelerator" if method == "split" else "weight", None)
