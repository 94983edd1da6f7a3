"""Descriptions of machines: every problem at once, a source for each constant, and back to the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.api.plan_numbers import machine_of

from cloister.api import load_machine, machine_names, save_machine
from cloister.api._machine import constants, machine_to_toml, parse_machine
from cloister.errors import ConfigError, StoreError


def raw() -> dict[str, Any]:
    """A description that is right, as nested tables."""
    import tomllib

    return tomllib.loads(machine_to_toml(machine_of()))


def problems(given: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_machine(given, source="m.toml")
    return {problem.key: problem.cause for problem in caught.value.problems}


@pytest.mark.parametrize("name", ["laptop", "sgx-8-cpu", "snp-64-h100", "tdx-96-h200"])
def test_presets_say_that_they_are_assumptions(name: str):
    machine = load_machine(name)
    assert name in machine_names() and machine.name == name
    assert machine.about.startswith("ASSUMED: ") and not machine.is_measured
    assert all(machine.source(key) for key, _ in constants(machine))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    machine = machine_of(fp32=0.1 + 0.2)
    machine = replace(machine, about='with "quotes", \x7f and ü', name="mine")
    save_machine(machine, tmp_path / "mine.toml")
    assert load_machine(tmp_path / "mine.toml") == machine
    save_machine(machine, tmp_path / "mine.toml")
    with pytest.raises(StoreError):
        save_machine(machine, tmp_path / "no" / "folder.toml")


def test_a_source_is_that_of_the_key_or_of_its_table():
    machine = machine_of()
    assert machine.source("kernels.fast.mask_ns") == "measured: here"
    assert replace(machine, sources={}).source("kernels.fast.mask_ns") == ""


def test_measured_is_only_what_was_measured_in_full():
    machine = machine_of()
    assert machine.is_measured  # the network is taken on trust in any case
    assert not replace(machine, sources={**machine.sources, "kernels.fast.lattice_ns": "design: 2"}).is_measured
    assert replace(machine, sources={**machine.sources, "enclave.memory_bytes": "assumed: all"}).is_measured


def test_every_problem_at_once():
    given = raw()
    given["surprise"] = 1
    given["name"] = ""
    del given["about"]
    given["enclave"] |= {"tee": "tpm", "fp32_gflops": 3, "cores": 0, "memory_bytes": float("inf")}
    del given["enclave"]["fp32_gflop_s"]
    given["accelerator"] |= {"shares_cpu": 1, "attained": 1.5, "int8_top_s": True, "confidential_share": "all"}
    given["link"] = 3
    given["kernels"]["slow"] = {}
    given["kernels"]["fast"] = []
    given["sources"] = {"enclave": "hearsay", "links": "measured: here", "link": "measured", "network_mbit_s": 3}
    found = problems(given)
    assert found["surprise"] == "unknown key" and found["about"] == "missing" and found["name"] == "must be text"
    assert found["enclave.tee"] == "must be one of tdx, snp, sgx, none"
    assert found["enclave.fp32_gflop_s"] == "missing" and found["enclave.fp32_gflops"] == "unknown key"
    assert found["enclave.cores"] == found["enclave.memory_bytes"] == "must be a finite number above 0"
    assert found["accelerator.shares_cpu"] == "must be true or false"
    assert found["accelerator.attained"] == "must be at most 1"
    assert found["accelerator.int8_top_s"] == found["accelerator.confidential_share"] == "must be a number"
    assert found["link"] == "must be a table" and found["link.gb_s"] == "missing"
    assert found["kernels.slow"] == "unknown key" and found["kernels.fast.mask_ns"] == "missing"
    assert found["sources.links"] == "is the source of no key" and found["sources.kernels.fast.mask_ns"] == "missing"
    wrong = "must begin with one of measured, vendor, design, assumed, a colon, and say which"
    assert found["sources.enclave"] == found["sources.link"] == found["sources.network_mbit_s"] == wrong


def test_a_cost_may_be_nothing_and_not_less():
    given = raw()
    given["kernels"]["fast"]["mask_ns"] = 0
    assert parse_machine(given).kernels["fast"].mask_ns == 0
    given["kernels"]["fast"]["mask_ns"] = -1
    assert problems(given) == {"kernels.fast.mask_ns": "must be a finite number from 0"}


def test_hints_name_what_was_meant():
    given = raw()
    given["enclave"]["fp32_gflops"] = 3
    given["kernels"]["zzz"] = {}
    with pytest.raises(ConfigError) as caught:
        parse_machine(given)
    hints = {problem.key: problem.hint for problem in caught.value.problems}
    assert hints["enclave.fp32_gflops"] == "did you mean 'fp32_gflop_s'?"
    assert hints["kernels.zzz"] == "known here: faithful, fast"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "neither a known machine nor a file"),
        (b"= 3", "is not valid TOML"),
        (b"\xff", "is not UTF-8 text"),
        (b"#" * 70_000, "larger than 64 KiB"),
        (b"", "sources"),
    ],
    ids=["missing", "no TOML", "no text", "too large", "empty"],
)
def test_files_that_are_none(content: bytes | None, says: str, tmp_path: Path):
    path = tmp_path / "machine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_machine(path)


def test_a_folder_is_no_description(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_machine(tmp_path)


def test_presets_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_machine("laptop").name == "laptop" and not list(tmp_path.iterdir())
