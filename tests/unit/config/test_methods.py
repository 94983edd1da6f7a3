"""Keys that belong to the other method, adapter or rule are refused: one without effect would be believed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloister.adapters import LoraSpec, PrefixSpec, SpfSpec
from cloister.config import Job, job_to_toml, load_job, parse_job
from cloister.errors import ConfigError
from cloister.train import DpSgdSpec

RAW: dict[str, Any] = {
    "name": "tiny",
    "task": {"name": "sequence-classification", "labels": ["no", "yes"]},
    "model": {"path": "/models/minilm"},
    "clients": [{"name": "b", "train": "b.jsonl"}, {"name": "a", "train": "a.jsonl", "test": "t.jsonl"}],
}
ENCLAVE = {"name": "enclave"}
PRIVACY = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}


def job(**tables: Any) -> Job:
    return parse_job({**RAW, **tables}, base="/base")


def keys(**tables: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        job(**tables)
    return {problem.key: problem.cause for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "cut_layer", 1),
        ("method", "boundary", "fp32"),
        ("method", "near_batch_size", 4),
        ("training", "checkpoint_every_steps", 5),
        ("evaluation", "baselines", ["alone"]),
        ("store", "url", "s3://bucket"),
        ("store", "shard_max_bytes", 1 << 20),
        ("store", "options", {}),
    ],
)
def test_a_key_of_the_split(section: str, key: str, value: Any):
    tables: dict[str, Any] = {"method": ENCLAVE}
    tables[section] = {**RAW.get(section, {}), **tables.get(section, {}), key: value}
    assert keys(**tables) == {f"{section}.{key}": 'belongs to the method "split", and this job\'s is "enclave"'}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("method", "rounds", 2),
        ("method", "ring", "fast"),
        ("method", "pad", "lattice"),
        ("method", "bucket", 8),
        ("method", "pool_bytes", 0),
        ("adapter", "freeze_a", True),
        ("training", "privacy", PRIVACY),
    ],
)
def test_a_key_of_the_enclaves(section: str, key: str, value: Any):
    assert keys(**{section: {key: value}}) == {
        f"{section}.{key}": 'belongs to the method "enclave", and this job\'s is "split"'
    }


def test_sections_and_choices_of_the_other_method():
    assert set(keys(aggregation={})) == {"aggregation"}
    assert set(keys(adapter={"name": "prefix"})) == {"adapter.name"}
    assert set(keys(method=ENCLAVE, release={"what": "weights"})) == {"release.what"}
    clients = [{**RAW["clients"][1], "accelerator": "unix:/a", "weight": 2.0}]
    assert set(keys(clients=clients)) == {"clients[0].accelerator"}
    assert set(keys(clients=clients, method=ENCLAVE)) == {"clients[0].weight"}


def test_an_unknown_method_or_adapter_is_one_problem():
    assert set(keys(method={"name": "both", "rounds": 1})) == {"method.name"}
    assert set(keys(method=ENCLAVE, adapter={"name": "ia3", "r": 1})) == {"adapter.name"}


@pytest.mark.parametrize("key", ["r", "alpha", "dropout", "targets", "use_rslora", "freeze_a"])
def test_a_key_of_lora_beside_a_prefix(key: str):
    value = {"r": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q"], "use_rslora": True, "freeze_a": True}[key]
    assert set(keys(method=ENCLAVE, adapter={"name": "prefix", key: value})) == {f"adapter.{key}"}


@pytest.mark.parametrize(("key", "value"), [("n_tokens", 4), ("projection", True), ("hidden_size", 8)])
def test_a_key_of_a_prefix_beside_lora(key: str, value: Any):
    assert set(keys(method=ENCLAVE, adapter={key: value})) == {f"adapter.{key}"}


SPF_KEYS = {"heads": 0.25, "neurons": 0.1, "criterion": "fisher", "criterion_examples": 8}


@pytest.mark.parametrize("key", SPF_KEYS)
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_a_key_of_spf_beside_another_adapter(key: str, adapter: str):
    assert set(keys(method=ENCLAVE, adapter={"name": adapter, key: SPF_KEYS[key]})) == {f"adapter.{key}"}


@pytest.mark.parametrize(("key", "value"), [("n_tokens", 4), ("targets", ["q"])])
def test_a_key_of_another_adapter_beside_spf(key: str, value: Any):
    assert set(keys(adapter={"name": "spf", key: value})) == {f"adapter.{key}"}


def test_whose_a_key_is_names_all_that_have_it():
    found = keys(method=ENCLAVE, adapter={"name": "prefix", "r": 4})
    assert found == {"adapter.r": 'belongs to the adapter "lora" and "spf"'}


def test_spf_is_of_the_split():
    assert keys(method=ENCLAVE, adapter={"name": "spf"}) == {"adapter.name": 'SPF needs the method "split"'}


@pytest.mark.parametrize(
    ("adapter", "key"),
    [
        ({"heads": 0, "neurons": 0}, "heads"),
        ({"criterion_examples": 8}, "criterion_examples"),
        ({"criterion": "random", "criterion_examples": 8}, "criterion_examples"),
        ({"heads": 1.5}, "heads"),
        ({"neurons": -0.5}, "neurons"),
        ({"criterion": "magnitude"}, "criterion"),
        ({"criterion": "fisher", "criterion_examples": 0}, "criterion_examples"),
    ],
)
def test_rules_of_spf(adapter: dict[str, Any], key: str):
    assert set(keys(adapter={"name": "spf", **adapter})) == {f"adapter.{key}"}


def test_spf_as_adapters_take_it():
    assert job(adapter={"name": "spf"}).far_adapter_spec() == SpfSpec()
    given = {**SPF_KEYS, "r": 4, "alpha": 2.0, "dropout": 0.1, "use_rslora": True}
    assert job(adapter={"name": "spf", **given}).far_adapter_spec() == SpfSpec(**given)
    assert job(adapter={"r": 4}).far_adapter_spec() == LoraSpec(r=4)


@pytest.mark.parametrize(
    ("aggregation", "key"),
    [
        ({"proximal_mu": 0.1}, "proximal_mu"),
        ({"rule": "fedprox"}, "proximal_mu"),
        ({"rule": "fedprox", "proximal_mu": 0.1, "trim": 0.3}, "trim"),
        ({"server_lr": 0.1}, "server_lr"),
        ({"rule": "fedadam", "exact_lora": True}, "exact_lora"),
        ({"rule": "trimmed-mean", "trim": 0.45, "weighting": "uniform"}, "trim"),
        ({"rule": "trimmed-mean", "weighting": "uniform"}, "trim"),
        (
            {"exact_lora": True, "weighting": "uniform", "privacy": PRIVACY},
            "privacy",
        ),
        ({"privacy": PRIVACY}, "weighting"),
    ],
)
def test_rules_of_the_aggregation(aggregation: dict[str, Any], key: str):
    assert set(keys(method=ENCLAVE, aggregation=aggregation)) == {f"aggregation.{key}"}


@pytest.mark.parametrize("adapter", [{"name": "prefix"}, {"freeze_a": True}])
def test_exact_lora_needs_both_factors(adapter: dict[str, Any]):
    assert set(keys(method=ENCLAVE, adapter=adapter, aggregation={"exact_lora": True})) == {"aggregation.exact_lora"}


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"training": {"privacy": PRIVACY, "max_grad_norm": 1.0}}, "training.max_grad_norm"),
        ({"training": {"privacy": PRIVACY, "grad_accumulation": 2}}, "training.grad_accumulation"),
        (
            {"training": {"privacy": PRIVACY}, "aggregation": {"rule": "fedprox", "proximal_mu": 0.1}},
            "training.privacy",
        ),
        ({"training": {"privacy": {**PRIVACY, "noise_multiplier": 0.0}}}, "training.privacy.noise_multiplier"),
        ({"training": {"privacy": {**PRIVACY, "delta": 1.0}}}, "training.privacy.delta"),
        ({"training": {"privacy": {**PRIVACY, "clip_norm": 0.0}}}, "training.privacy.clip_norm"),
        ({"training": {"privacy": {**PRIVACY, "epsilon": 1.0}}}, "training.privacy.epsilon"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules_of_dp_sgd(tables: dict[str, Any], key: str):
    assert set(keys(method=ENCLAVE, **tables)) == {key}


def test_dp_sgd_as_train_takes_it():
    found = job(method=ENCLAVE, training={"privacy": {**PRIVACY, "clip_norm": 0.5}})
    assert found.dp_sgd_spec() == DpSgdSpec(noise_multiplier=1.0, max_grad_norm=0.5, delta=1e-5)
    assert found.train_spec() == job(method=ENCLAVE).train_spec()
    assert job(method=ENCLAVE).dp_sgd_spec() is None
    assert found.sha384 != job(method=ENCLAVE).sha384


def test_what_is_right_passes():
    clients = [{"name": name, "train": "t.jsonl", "test": "t.jsonl"} for name in "abcde"]
    for aggregation in (
        {"rule": "fedprox", "proximal_mu": 0.1},
        {"rule": "fedadam", "server_lr": 0.1, "tau": 0.01},
        {"rule": "trimmed-mean", "weighting": "uniform", "trim": 0.2},
        {"exact_lora": True},
    ):
        assert job(method=ENCLAVE, aggregation=aggregation, clients=clients).aggregation.rule
    lora = job(method=ENCLAVE, adapter={"freeze_a": True}).adapter_spec()
    assert isinstance(lora, LoraSpec) and lora.freeze_a
    prefix = job(method=ENCLAVE, adapter={"name": "prefix", "n_tokens": 3}).adapter_spec()
    assert prefix == PrefixSpec(3, projection=False, hidden_size=None)


def test_the_hash_covers_the_method_and_not_the_accelerators():
    clients = [{**client, "accelerator": "unix:/run/a"} for client in RAW["clients"]]
    base = job(method=ENCLAVE)
    assert job(method=ENCLAVE, clients=clients).sha384 == base.sha384
    for change in ({"rounds": 9}, {"ring": "fast"}, {"pad": "lattice"}, {"bucket": 1}):
        assert job(method={**ENCLAVE, **change}).sha384 != base.sha384
    assert job(method=ENCLAVE, aggregation={"max_norm": 2.0}).sha384 != base.sha384


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"method": ENCLAVE},
        {"method": ENCLAVE, "adapter": {"name": "prefix"}},
        {"method": ENCLAVE, "training": {"privacy": PRIVACY}},
        {"method": ENCLAVE, "aggregation": {"rule": "fedadam"}},
        {"method": ENCLAVE, "aggregation": {"rule": "fedprox", "proximal_mu": 0.5}},
    ],
)
def test_a_job_survives_toml(tables: dict[str, Any], tmp_path: Path):
    one = parse_job({**RAW, **tables}, base=tmp_path)
    for defaults in (True, False):
        (tmp_path / "job.toml").write_text(job_to_toml(one, defaults=defaults))
        assert load_job(tmp_path / "job.toml") == one
