"""Checks of a job against this machine: the one problem as its own class, several as one list."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from cloister.config import Job, check_job, parse_job
from cloister.errors import AdapterError, CloisterError, ConfigError, DataError, ModelError, Problem
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


def test_an_spf_share_that_selects_nothing(good):
    error = refused(good, adapter={"name": "spf", "neurons": 0.001})
    assert isinstance(error, AdapterError) and error.exit_code == 13
    assert "adapter.neurons = 0.001 selects none" in error.cause and "least share" in error.hint
    raw, base = good
    check_job(parse_job({**raw, "adapter": {"name": "spf"}}, base=base))


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


# --- accelerators -----------------------------------------------------------------------------------------------------


def with_accelerators(good, *addresses: str) -> dict[str, object]:
    """Tables of a job of Method 1 whose first clients have these."""
    raw = {key: value for key, value in good[0].items() if key not in ("evaluation", "store")}
    raw["training"] = {key: value for key, value in raw["training"].items() if key != "checkpoint_every_steps"}
    clients = [dict(client) for client in raw["clients"]]
    for client, address in zip(clients, addresses, strict=False):
        client["accelerator"] = address
    return {**raw, "method": {"name": "enclave"}, "clients": clients}


def refused_accelerators(good, *addresses: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        check_job(parse_job(with_accelerators(good, *addresses), base=good[1]))
    return caught.value.problems


@pytest.mark.parametrize(
    ("address", "cause"),
    [
        ("udp://host:1", "no address"),
        ("tcp://host", "no address"),
        ("tcp://host:70000", "no address"),
        ("unix:" + "/x" * 80, "no address"),
        ("tcp://host:0", "no port"),
        ("unix:/no-such-folder/a", "no folder /no-such-folder"),
    ],
    ids=["another scheme", "without a port", "a port too high", "a path too long", "port 0", "no folder"],
)
def test_an_accelerators_address_is_refused_with_client_and_key(good, address: str, cause: str):
    [problem] = refused_accelerators(good, address)
    assert problem.key == "clients[0].accelerator" and "of client alpha" in problem.cause and cause in problem.cause
    assert "tcp://host:port" in problem.hint


def test_two_clients_cannot_have_one_accelerator(good):
    [problem] = refused_accelerators(good, "tcp://host:1", "tcp://host:1")
    assert problem.key == "clients[1].accelerator" and "alpha" in problem.cause and "beta" in problem.cause


def test_every_accelerator_with_its_own_key(good):
    keys = [problem.key for problem in refused_accelerators(good, "tcp://host", "unix:")]
    assert keys == ["clients[0].accelerator", "clients[1].accelerator"]


def test_good_accelerators_pass(good, tmp_path: Path):
    check_job(parse_job(with_accelerators(good, f"unix:{tmp_path}/a", "tcp://[::1]:7000"), base=good[1]))


# --- privacy ----------------------------------------------------------------------------------------------------------

PRIVACY = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}


@pytest.mark.parametrize("section", ["training", "aggregation"])
@pytest.mark.parametrize("missing", ["opacus", "opendp"])
def test_privacy_without_its_extra(good, section: str, missing: str, monkeypatch: pytest.MonkeyPatch):
    tables = with_accelerators(good)
    more = {"privacy": PRIVACY} | ({"weighting": "uniform"} if section == "aggregation" else {})
    tables[section] = {**tables.get(section, {}), **more}  # type: ignore[dict-item]
    job = parse_job(tables, base=good[1])
    check_job(job)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=missing) as caught:
        check_job(job)
    assert "cloister[dp]" in caught.value.hint
