"""Each method's job out of the one that was given: what is shared, what is rewritten, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.api._compare_jobs import (
    METHODS,
    check_comparable,
    chosen_methods,
    derive_job,
    epochs_and_rounds,
    n_steps,
    unavailable,
)
from cloister.config import Job, load_job
from cloister.errors import ConfigError
from cloister.testing import write_tiny_job

SPLIT = """[method]
boundary = "fp32"
[adapter]
r = 4
alpha = 12
targets = ["query", "value"]
[evaluation]
baselines = ["majority", "linear-head"]
[store]
shard_max_bytes = 100000
[federation]
min_clients = 1
timeout_s = 77
[release]
what = "weights"
"""
ENCLAVE = """[method]
name = "enclave"
rounds = 2
ring = "fast"
bucket = 32
[adapter]
freeze_a = true
[aggregation]
max_norm = 7.0
[release]
what = "adapter"
"""
TRAINING = "epochs = {epochs}\nbatch_size = 8\nlr = 0.02\nseed = 9"


@pytest.fixture
def split(tmp_path: Path) -> Job:
    return load_job(write_tiny_job(tmp_path, sections=SPLIT, training=TRAINING.format(epochs=3)))


@pytest.fixture
def enclave(tmp_path: Path) -> Job:
    return load_job(write_tiny_job(tmp_path, sections=ENCLAVE, training=TRAINING.format(epochs=5)))


@pytest.fixture(params=["split", "enclave"])
def given(request: pytest.FixtureRequest) -> Job:
    return request.getfixturevalue(request.param)


def total_epochs(job: Job) -> int:
    return job.training.epochs * (job.method.rounds if job.method.name == "enclave" else 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_shares_task_model_data_and_training(given: Job, name: str):
    job = derive_job(given, name, 4)
    method = METHODS[name]
    assert (job.method.name, job.adapter.name) == (method.runs_as, method.adapter)
    assert job.training.seed == 4 and job.training.lr == 0.02 and job.training.batch_size == 8
    assert (job.task, job.model.path, job.name) == (given.task, given.model.path, given.name)
    assert [(c.name, c.train, c.test) for c in job.clients] == [(c.name, c.train, c.test) for c in given.clients]
    assert job.release.what == "none" and job.federation.min_clients is None
    assert total_epochs(job) == epochs_and_rounds(given)[0]
    if job.method.name == "split":
        assert job.evaluation.baselines == ()


def test_epochs_and_rounds(split: Job, enclave: Job):
    assert epochs_and_rounds(split) == (3, 3) and epochs_and_rounds(enclave) == (10, 2)
    assert [derive_job(enclave, name, 0).training.epochs for name in ("central", "fedavg")] == [10, 5]
    assert [derive_job(split, name, 0).training.epochs for name in ("central", "method1-lora")] == [3, 1]
    assert derive_job(split, "fedavg", 0).method.rounds == 3


def test_keys_of_the_own_method_are_kept_and_of_others_dropped(split: Job, enclave: Job):
    job = derive_job(split, "method2-lora", 0)
    assert (job.method.boundary, job.store.shard_max_bytes) == ("fp32", 100_000)
    assert (job.adapter.r, job.adapter.targets) == (4, ("query", "value"))
    job = derive_job(split, "method1-lora", 0)
    assert (job.method.boundary, job.store.shard_max_bytes) == ("int8", 64 * 2**20)
    assert (job.adapter.r, job.adapter.alpha, job.federation.timeout_s) == (4, 12, 77)
    job = derive_job(split, "method1-prefix", 0)
    assert job.adapter.n_tokens == 16 and job.adapter.targets == "all-linear"
    job = derive_job(enclave, "method1-lora", 0)
    assert (job.method.ring, job.method.bucket, job.adapter.freeze_a) == ("fast", 32, True)
    assert job.aggregation.max_norm == 7.0
    assert derive_job(enclave, "fedavg", 0).adapter.freeze_a is False
    assert derive_job(enclave, "method2-lora", 0).aggregation.max_norm == 1000.0


def test_spf_keeps_the_rank_and_its_own_keys(split: Job):
    job = derive_job(split, "method2-spf", 0)
    assert (job.adapter.name, job.adapter.r, job.adapter.alpha) == ("spf", 4, 12)
    given = split.model_copy(update={"adapter": job.adapter.model_copy(update={"heads": 0.25})})
    assert derive_job(given, "method2-spf", 0).adapter.heads == 0.25
    assert derive_job(given, "method2-lora", 0).adapter.name == "lora"


def test_exact_lora_is_for_lora_alone(enclave: Job):
    given = enclave.model_copy(
        update={
            "aggregation": enclave.aggregation.model_copy(update={"exact_lora": True}),
            "adapter": enclave.adapter.model_copy(update={"freeze_a": False}),
        }
    )
    assert derive_job(given, "method1-lora", 0).aggregation.exact_lora
    assert not derive_job(given, "method1-prefix", 0).aggregation.exact_lora


def test_a_rate_of_a_methods_own(split: Job):
    assert derive_job(split, "method1-prefix", 0, lr=0.5).training.lr == 0.5


def test_steps(split: Job):
    n_train = {"alpha": 20, "beta": 17}  # batches of 8: 37 examples are 5 steps, 20 and 17 are 3 and 3
    assert n_steps(derive_job(split, "central", 0), "central", n_train) == 15
    assert n_steps(derive_job(split, "fedavg", 0), "fedavg", n_train) == 18
    double = split.model_copy(update={"training": split.training.model_copy(update={"grad_accumulation": 2})})
    assert n_steps(derive_job(double, "central", 0), "central", n_train) == 9


def test_a_prefix_that_the_positions_do_not_hold_is_no_method(tmp_path: Path):
    job = load_job(write_tiny_job(tmp_path))
    assert unavailable(job, "method1-prefix") == ""
    long = job.model_copy(update={"task": job.task.model_copy(update={"max_length": 500})})
    assert unavailable(long, "method1-prefix") == (
        "a prefix of 16 tokens and texts of 500 do not fit the model's 512 positions"
    )
    assert unavailable(long, "method1-lora") == ""


def test_methods_are_chosen_in_the_tables_order():
    assert chosen_methods(None) == tuple(METHODS)
    assert chosen_methods(["method2-lora", "central"]) == ("central", "method2-lora")


@pytest.mark.parametrize(("names", "said"), [(["lora"], "no method is called 'lora'"), ([], "no method was chosen")])
def test_an_unknown_method_is_refused(names: list[str], said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        chosen_methods(names)
    assert "method2-spf" in caught.value.hint


def changed(job: Job, section: str, **keys: object) -> Job:
    return job.model_copy(update={section: getattr(job, section).model_copy(update=keys)})


def _weighted(job: Job) -> Job:
    first, *others = job.clients
    return job.model_copy(update={"clients": (first.model_copy(update={"weight": 2.0}), *others)})


def _without_tests(job: Job) -> Job:
    return job.model_copy(update={"clients": tuple(c.model_copy(update={"test": None}) for c in job.clients)})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda job: changed(job, "training", max_steps=3), "training.max_steps"),
        (lambda job: changed(job, "training", patience=2), "training.patience"),
        (lambda job: changed(job, "policy", file="p.toml"), "policy.file"),
        (lambda job: changed(job, "enclave", backend="tdx"), "enclave.backend"),
        (_weighted, "clients[0].weight"),
        (_without_tests, "clients"),
    ],
    ids=["max_steps", "patience", "policy", "backend", "weight", "no-test"],
)
def test_what_cannot_be_compared_is_refused(split: Job, change, key: str):
    check_comparable(split)
    with pytest.raises(ConfigError) as caught:
        check_comparable(change(split))
    assert [problem.key for problem in caught.value.problems] == [key]
    assert caught.value.problems[0].hint
