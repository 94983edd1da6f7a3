"""Keys of the far side's training: precision, early stopping; and data that a check refuses by client and file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloister.config import check_job, job_to_toml, load_job, parse_job
from cloister.errors import ConfigError, DataError
from cloister.testing import write_tiny_job

RAW: dict[str, Any] = {
    "name": "tiny",
    "task": {"name": "sequence-classification", "labels": ["no", "yes"]},
    "model": {"path": "/models/minilm"},
    "clients": [{"name": "b", "train": "b.jsonl"}, {"name": "a", "train": "a.jsonl", "test": "t.jsonl"}],
}


def job(**training: Any):
    return parse_job({**RAW, "training": training}, base="/base")


def keys(**tables: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_job({**RAW, **tables}, base="/base")
    return {problem.key: problem.cause for problem in caught.value.problems}


def test_defaults_and_what_training_gets():
    spec = job().train_spec()
    assert (spec.precision, spec.patience, spec.held_out) == ("fp32", None, 0.1)
    spec = job(precision="auto", patience=3, held_out=0.25).train_spec()
    assert (spec.precision, spec.patience, spec.held_out) == ("auto", 3, 0.25)


@pytest.mark.parametrize(
    ("training", "key", "says"),
    [
        ({"precision": "fp16"}, "training.precision", "'bf16'"),
        ({"patience": 0}, "training.patience", "not 0"),
        ({"patience": 1.5}, "training.patience", "whole number"),
        ({"patience": 1, "held_out": 0}, "training.held_out", "greater"),
        ({"patience": 1, "held_out": 0.6}, "training.held_out", "less"),
        ({"held_out": 0.2}, "training.held_out", "does nothing without training.patience"),
    ],
)
def test_one_mistake_gives_one_problem_at_its_key(training: dict[str, Any], key: str, says: str):
    found = keys(training=training)
    assert set(found) == {key} and says in found[key]


@pytest.mark.parametrize("training", [{"precision": "bf16"}, {"patience": 2}, {"held_out": 0.1}])
def test_they_belong_to_the_split(training: dict[str, Any]):
    [key] = training
    assert keys(method={"name": "enclave"}, training=training) == {
        f"training.{key}": 'belongs to the method "split", and this job\'s is "enclave"'
    }


@pytest.mark.parametrize(
    "training", [{}, {"precision": "auto"}, {"patience": 2}, {"patience": 2, "held_out": 0.3}, {"precision": "bf16"}]
)
def test_they_survive_toml_and_are_agreed_on(training: dict[str, Any], tmp_path: Path):
    one = parse_job({**RAW, "training": training}, base=tmp_path)
    for defaults in (True, False):
        (tmp_path / "job.toml").write_text(job_to_toml(one, defaults=defaults))
        assert load_job(tmp_path / "job.toml") == one
    assert (one.sha384 == job().sha384) == (not training)


# --- data -------------------------------------------------------------------------------------------------------------


def _empty(path: Path) -> None:
    path.write_text("")


def _a_class_of_its_own(path: Path) -> None:
    path.write_text(json.dumps({"text": "sea", "label": "violet"}) + "\n")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("spoil", "says"), [(_empty, "there is no example in it"), (_a_class_of_its_own, "'violet'")])
def test_a_split_that_cannot_be_used_is_refused_with_client_and_file(tmp_path: Path, split: str, spoil: Any, says: str):
    path = write_tiny_job(tmp_path)
    spoil(tmp_path / f"beta-{split}.jsonl")
    with pytest.raises(DataError) as caught:
        check_job(load_job(path))
    assert caught.value.cause.startswith(f"{split} data of client beta: ")
    assert f"beta-{split}.jsonl" in caught.value.cause and says in caught.value.cause
    assert caught.value.path == str(tmp_path / f"beta-{split}.jsonl") and caught.value.hint


def test_a_filter_that_leaves_nothing_is_refused_with_client_and_file(tmp_path: Path):
    path = write_tiny_job(tmp_path)
    text = path.read_text().replace(
        'test = "beta-test.jsonl"', 'test = { path = "beta-test.jsonl", where = { label = "none" } }'
    )
    path.write_text(text)
    with pytest.raises(DataError, match=r"test data of client beta: .*beta-test.jsonl: no row is left where label"):
        check_job(load_job(path))


def test_a_class_that_one_client_lacks_is_no_problem(tmp_path: Path):
    path = write_tiny_job(tmp_path)
    rows = (tmp_path / "beta-train.jsonl").read_text().splitlines()
    (tmp_path / "beta-train.jsonl").write_text("\n".join(row for row in rows if "blue" not in row) + "\n")
    check_job(load_job(path))
