"""Checks of a job against this machine: the one problem as its own class, several as one list."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cloister.config import Job, check_job, parse_job
from cloister.errors import CloisterError, ConfigError, DataError, ModelError
from cloister.testing import write_tiny_job


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    found = write_tiny_job(tmp_path_factory.mktemp("job"))
    if isinstance(found, Job):
        return found.model_dump(mode="json", exclude_none=True), Path("/")
    return tomllib.loads(Path(found).read_text()), Path(found).parent


def refused(good: tuple[dict, Path], **tables: object) -> CloisterError:
    raw, base = good
    with pytest.raises(CloisterError) as caught:
        check_job(parse_job({**raw, **tables}, base=base))
    return caught.value


def test_a_good_job_passes(good):
    raw, base = good
    check_job(parse_job(raw, base=base))


def test_a_cut_outside_the_layers(good):
    error = refused(good, model={**good[0]["model"], "cut_layer": 99})
    assert isinstance(error, ModelError) and "99" in error.cause


def test_a_model_folder_that_is_not_there(good):
    error = refused(good, model={"path": "./no-such-model"})
    assert isinstance(error, ModelError) and "no-such-model" in error.cause and error.exit_code == 4


def test_a_data_file_that_is_not_there(good):
    first, *rest = good[0]["clients"]
    error = refused(good, clients=[{**first, "train": "no-such.jsonl"}, *rest])
    assert isinstance(error, DataError) and "no-such.jsonl" in error.cause and error.hint


def test_a_column_that_is_not_there(good):
    first, *rest = good[0]["clients"]
    error = refused(good, clients=[{**first, "test": first["train"], "columns": {"text": "txet"}}, *rest])
    assert "txet" in error.cause


def test_several_problems_come_together(good):
    first, *rest = good[0]["clients"]
    error = refused(
        good,
        model={"path": "./no-such-model"},
        clients=[{**first, "train": "no-such.jsonl", "node_key": "no-key.pem"}, *rest],
        policy={"file": "no-policy.toml"},
    )
    assert isinstance(error, ConfigError)
    assert {problem.key for problem in error.problems} == {
        "model", "clients[0].train", "clients[0].node_key", "policy.file",
    }  # fmt: skip


def test_a_length_over_the_models_limit(good):
    error = refused(good, task={**good[0]["task"], "max_length": 100_000})
    assert isinstance(error, ConfigError) and "100000" in error.cause
