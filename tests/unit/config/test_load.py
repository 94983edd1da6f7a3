"""A job file becomes a `Job`, or one error that lists everything wrong with it."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.config import Job, job_template, job_to_toml, load_job, parse_job
from cloister.errors import ConfigError, Problem

MINIMAL = {
    "name": "tiny",
    "task": {"name": "sequence-classification", "labels": ["no", "yes"]},
    "model": {"path": "./model"},
    "clients": [
        {"name": "a", "train": "a/train.jsonl", "test": "a/test.jsonl"},
        {"name": "b", "train": "b/train.jsonl"},
    ],
}


def changed(key: str, value: object) -> dict:
    """MINIMAL with one dotted key set; a number in the path is an index, None removes the key."""
    raw = copy.deepcopy(MINIMAL)
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    table = raw
    for part in path:
        table = table[part] if isinstance(part, int) else table.setdefault(part, {})
    if value is None:
        del table[last]
    else:
        table[last] = value
    return raw


def problems_of(raw: dict) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_job(raw, base="/base")
    return caught.value.problems


def test_the_template_is_a_valid_job_whose_comments_are_the_defaults():
    plain = parse_job(tomllib.loads(job_template()), base="/base")
    without_clients = re.sub(r"(?s)\[\[clients\]\].*(?=\[policy\])", "", job_template())
    uncommented = tomllib.loads(re.sub(r"(?m)^# (?=[a-z_]+ = )", "", without_clients))
    for section in ("method", "adapter", "training", "evaluation", "release", "enclave"):
        for key, value in uncommented[section].items():
            if key in ("max_steps", "patience"):  # Not defaults: they have none.
                continue
            default = getattr(getattr(plain, section), key)
            assert default == (tuple(value) if isinstance(value, list) else value), key
    assert plain.client_names == ("hospital-a", "hospital-b")


def test_relative_paths_count_from_the_job_file(tmp_path: Path):
    (tmp_path / "model").mkdir()
    text = job_to_toml(Job.model_validate(changed("model.path", "model")), defaults=False)
    (tmp_path / "job.toml").write_text(text)
    job = load_job(tmp_path / "job.toml")
    assert job.model.path == str(tmp_path / "model")
    assert job.clients[0].train.path == str(tmp_path / "a/train.jsonl")
    assert job.clients[1].test is None


def test_a_hub_name_stays_a_hub_name():
    assert parse_job(changed("model.path", "org/model"), base="/base").model.path == "org/model"


def test_a_store_url_stays_a_url_and_a_store_folder_becomes_absolute():
    assert parse_job(changed("store.url", "s3://bucket/x"), base="/base").store.url == "s3://bucket/x"
    assert parse_job(changed("store.url", "shards"), base="/base").store.url == "/base/shards"


def test_a_model_of_a_package_that_is_not_there_names_the_package():
    [problem] = problems_of(changed("model.path", "package:no_such_package_xyz/model"))
    assert problem.key == "model.path" and "no_such_package_xyz" in problem.cause and "pip install" in problem.hint


def test_every_problem_is_reported_at_once_with_its_key():
    raw = changed("training.lr", "1")
    raw["trainig"] = {}
    raw["clients"][1]["name"] = "a"
    raw["clients"][0]["columns"] = {"txt": "x"}
    raw["federation"] = {"min_clients": 3}
    found = {problem.key: problem for problem in problems_of(raw)}
    assert set(found) == {
        "training.lr", "trainig", "clients[1].name", "clients[0].columns.txt", "federation.min_clients",
    }  # fmt: skip
    assert found["trainig"].hint == "did you mean 'training'?"
    assert found["clients[0].columns.txt"].hint == "did you mean 'text'?"
    assert "'a'" in found["clients[1].name"].cause


@pytest.mark.parametrize(
    ("key", "value", "where", "says"),
    [
        ("name", None, "name", "missing"),
        ("name", "Has Space", "name", "not a name"),
        ("version", 2, "version", "must be 1"),
        ("version", True, "version", "integer 1"),
        ("task.name", "classify", "task.name", "must be"),
        ("task.labels", [], "task.labels", "missing"),
        ("task.labels", ["one"], "task.labels", "two or more"),
        ("task.labels", ["x", "x"], "task.labels", "listed twice"),
        ("task.labels", ["x", 3], "task.labels[1]", "must be text"),
        ("task.labels", "x", "task.labels", "must be a list"),
        ("task.max_length", 1, "task.max_length", "greater"),
        ("model.cut_layer", -1, "model.cut_layer", "greater"),
        ("model.cut_layer", True, "model.cut_layer", "whole number"),
        ("model.path", " m", "model.path", "space"),
        ("method.boundary", "int4", "method.boundary", "'int8'"),
        ("adapter.targets", ["q", 3], "adapter.targets", "all-linear"),
        ("adapter.targets", [], "adapter.targets", "all-linear"),
        ("training.epochs", 0, "training.epochs", "not 0"),
        ("training.epochs", 1.5, "training.epochs", "whole number"),
        ("training.lr", float("nan"), "training.lr", "finite"),
        ("evaluation.baselines", "alone", "evaluation.baselines", "a list"),
        ("clients", [], "clients", "is empty"),
        ("clients", "a", "clients", "a list"),
        ("clients.0.name", "-a", "clients[0].name", "not a name"),
        ("clients.0.name", "a" * 33, "clients[0].name", "not a name"),
        ("clients.0.train", None, "clients[0].train", "missing"),
        ("clients.0.train", {"path": "x", "where": {"a": [[1]]}}, "clients[0].train.where", "'a'"),
        ("clients.0.weight", 0, "clients[0].weight", "greater"),
        ("clients.0.test", None, "clients", "held-out"),
        ("store.options", 3, "store.options", "must be a table"),
        ("store", "s3://x", "store", "must be a table"),
        ("federation.port", 70000, "federation.port", "less"),
        ("enclave.backend", "sev", "enclave.backend", "'simulated'"),
        ("release.what", "everything", "release.what", "'none'"),
    ],
)
def test_one_mistake_gives_one_problem_at_its_key(key: str, value: object, where: str, says: str):
    problems = problems_of(changed(key, value))
    assert [problem.key for problem in problems] == [where], problems
    assert says in problems[0].cause


def test_what_belongs_to_classification_only_is_refused_for_causal_lm():
    raw = changed("task.name", "causal-lm")
    raw["evaluation"] = {"baselines": ["majority", "alone"]}
    assert {problem.key for problem in problems_of(raw)} == {"task.labels", "evaluation.baselines[0]"}


def test_a_file_that_is_no_job_says_what_it_is(tmp_path: Path):
    for name, content, says in [
        ("broken.toml", b"a = [", "not valid TOML"),
        ("latin.toml", b"name = '\xe9'", "not UTF-8"),
        ("large.toml", b"#" * (1 << 20 | 1), "1 MiB"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            load_job(tmp_path / name)
    with pytest.raises(ConfigError, match="no job file") as caught:
        load_job(tmp_path / "missing.toml")
    assert "cloister init" in caught.value.hint
    with pytest.raises(ConfigError, match="folder"):
        load_job(tmp_path)


def test_a_job_survives_toml_and_json(tmp_path: Path):
    raw = changed("adapter.targets", ["query", "value"])
    raw["clients"][0]["train"] = {"path": "x.csv", "where": {"clients.natural": 0, "site": ["a", "b"]}}
    raw["clients"][0]["columns"] = {"text": 'a "quoted" column'}
    job = parse_job(raw, base=tmp_path)
    for defaults in (True, False):
        (tmp_path / "job.toml").write_text(job_to_toml(job, defaults=defaults))
        assert load_job(tmp_path / "job.toml") == job
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_store_credentials_are_in_no_text(tmp_path: Path):
    job = parse_job(changed("store.options", {"secret": "hunter2"}), base=tmp_path)
    assert "hunter2" not in repr(job) and "hunter2" not in job_to_toml(job)
    assert b"hunter2" not in job.canonical_bytes()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = [*Job.model_fields, "unknown"]


@given(st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4))
def test_any_tables_are_a_job_or_a_config_error(tables: dict):
    try:
        parse_job({**MINIMAL, **tables}, base="/base")
    except ConfigError as error:
        assert error.problems and all(problem.cause for problem in error.problems)
