"""What a job is to its parties: the shared part and its hash, and the specs it turns into."""

from __future__ import annotations

import json

from cloister.config import Job, parse_job

RAW = {
    "name": "tiny",
    "task": {"name": "sequence-classification", "labels": ["no", "yes"]},
    "model": {"path": "/models/minilm"},
    "clients": [{"name": "b", "train": "b.jsonl", "weight": 2.0}, {"name": "a", "train": "a.jsonl", "test": "t.jsonl"}],
}


def job(**tables: object) -> Job:
    return parse_job({**RAW, **tables}, base="/base")


def test_the_hash_ignores_what_is_one_partys_own():
    same = [
        job(),
        parse_job(RAW, base="/elsewhere"),
        job(model={"path": "/other/place/minilm"}),
        job(policy={"file": "p.toml"}),
        job(store={"url": "/mnt/shards", "options": {"key": "secret"}}),
        job(federation={"port": 4000}),
        job(enclave={"memory_budget_bytes": 2**30}),
        job(clients=[{**RAW["clients"][1], "node_key": "k.pem", "columns": {"text": "t"}}, RAW["clients"][0]]),
    ]
    assert {one.sha384 for one in same} == {job().sha384}
    assert len(job().sha384) == 48


def test_the_hash_covers_what_is_agreed():
    other = [
        job(name="other"),
        job(task={"name": "sequence-classification", "labels": ["yes", "no"]}),
        job(model={"path": "/models/else"}),
        job(model={"path": "/models/minilm", "cut_layer": 1}),
        job(method={"boundary": "fp32"}),
        job(adapter={"r": 4}),
        job(training={"seed": 1}),
        job(release={"what": "adapter"}),
        job(release={"live_metrics": False}),
        job(clients=[{**RAW["clients"][0], "weight": 1.0}, RAW["clients"][1]]),
        job(clients=RAW["clients"][1:]),
    ]
    assert len({job().sha384, *(one.sha384 for one in other)}) == 1 + len(other)


def test_the_shared_part_names_no_path_of_a_client():
    shared = json.loads(job().canonical_bytes())
    assert shared["clients"] == [{"name": "a", "weight": 1.0}, {"name": "b", "weight": 2.0}]
    assert b".jsonl" not in job().canonical_bytes()
    assert shared["model"]["path"] == "minilm"


def test_specs_carry_every_key_of_their_tables():
    one = job(
        adapter={"r": 4, "alpha": 8, "targets": ["query"], "use_rslora": True},
        training={"epochs": 2, "lr": 0.01, "max_steps": 7, "seed": 3},
        task={"name": "sequence-classification", "labels": ["no", "yes"], "max_length": 32, "on_too_long": "truncate"},
    )
    lora, train, task = one.lora_spec(), one.train_spec(), one.task_spec(is_encoder=True)
    assert (lora.r, lora.alpha, lora.targets, lora.use_rslora) == (4, 8, ("query",), True)
    assert (train.epochs, train.lr, train.max_steps, train.seed) == (2, 0.01, 7, 3)
    assert train.client_weights == (("b", 2.0), ("a", 1.0))
    assert (task.labels, task.pooling, task.max_length, task.on_too_long) == (("no", "yes"), "mean", 32, "truncate")
    assert one.task_spec(is_encoder=False).pooling == "last"


def test_equal_weights_are_no_weights():
    clients = [{**client, "weight": 1.0} for client in RAW["clients"]]
    assert job(clients=clients).train_spec().client_weights is None


def test_min_clients_defaults_to_all():
    assert job().min_clients == 2
    assert job(federation={"min_clients": 1}).min_clients == 1
