"""A job with other keys in it: what stays, what goes with the method or adapter, and that rules still hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.config import Job, load_job, rewrite_job
from cloister.errors import ConfigError
from cloister.testing import write_tiny_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    sections = (
        '[method]\nboundary = "fp32"\n[adapter]\nr = 4\n[store]\nurl = "memory://x"\noptions = { key = "secret" }\n'
    )
    return load_job(write_tiny_job(tmp_path, sections=sections))


def test_without_changes_it_is_the_same(job: Job):
    assert rewrite_job(job, {}) == job


def test_another_method_takes_its_own_defaults(job: Job):
    found = rewrite_job(job, {"method": {"name": "enclave", "rounds": 7}})
    assert (found.method.name, found.method.rounds, found.method.boundary) == ("enclave", 7, "int8")
    assert found.adapter.r == 4 and found.store.url is None and not found.store.options
    assert rewrite_job(found, {"method": {"name": "split"}}).training.lr == job.training.lr


def test_a_key_set_to_none_is_left_out(job: Job):
    some = rewrite_job(job, {"training": {"max_steps": 5}})
    assert some.training.max_steps == 5
    assert rewrite_job(some, {"training": {"max_steps": None}}).training.max_steps is None


def test_paths_stay_as_they_are(job: Job):
    assert rewrite_job(job, {"training": {"seed": 3}}).clients == job.clients


def test_wrong_keys_are_refused_with_their_path(job: Job):
    with pytest.raises(ConfigError) as caught:
        rewrite_job(job, {"training": {"epochs": 0, "speed": 1}, "adapter": {"name": "prefix"}})
    assert {problem.key for problem in caught.value.problems} == {"training.epochs", "training.speed", "adapter.name"}
