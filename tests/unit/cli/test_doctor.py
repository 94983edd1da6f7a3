"""`cloister doctor`: what this machine has, in words and as JSON; always with exit code 0."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cloister.api import _doctor
from cloister.attest import BackendReport, detect_backends
from cloister.cli import main
from cloister.enclave import REQUIRED_LAYERS


@pytest.fixture
def doctor(capsys, monkeypatch, no_network):
    """Without the seconds that Flower's imports take; they have a test of their own."""
    monkeypatch.setattr(_doctor, "_start", lambda name: {"command": name, "starts": True, "why": ""})

    def call(*args: str) -> str:
        assert main(["doctor", *args]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


def test_every_backend_with_what_it_has_and_what_is_missing(doctor):
    out = doctor()
    for backend in detect_backends():
        assert f"  {backend.type.ljust(10)} {'found' if backend.found else 'missing'}\n" in out
        assert all(f"    missing  {line}\n" in out for line in backend.missing)
    assert 'without that key "simulated" (SIMULATED: no TEE)' in out
    assert "available of" in out and "free at" in out and "flower-superlink   starts" in out


def test_json(doctor):
    found = json.loads(doctor("--json"))
    assert {backend["type"] for backend in found["backends"]} >= {"tdx", "snp", "sgx", "vtpm", "simulated"}
    assert found["job_backend"] == "simulated"
    assert {layer["name"] for layer in found["layers"] if layer["required"]} == set(REQUIRED_LAYERS)
    assert {"python", "torch", "flwr", "cryptography", "dcap-qvl"} <= set(found["versions"])
    assert found["memory"]["total"] > found["memory"]["available"] > 0 and all(d["free"] > 0 for d in found["disk"])


def test_a_machine_with_nothing(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(_doctor, "available_layers", lambda: ("no_core",))
    monkeypatch.setattr(_doctor, "detect_backends", lambda: [BackendReport("tdx", True, ("a device",), (), "")])
    monkeypatch.setattr(_doctor, "_version", lambda _: "")
    monkeypatch.setattr(_doctor, "_start", lambda name: {"command": name, "starts": False, "why": "not installed"})
    monkeypatch.setattr(_doctor, "cloister_home", lambda: tmp_path / "not" / "yet")
    out = doctor()
    assert "seccomp        not available  REQUIRED: a run will not start" in out
    assert "landlock       not available\n" in out
    assert "torch          not installed" in out and "DOES NOT START: not installed" in out
    assert "    has      a device\n  a job uses" in out


def test_versions():
    assert _doctor._version("cryptography").startswith("5") and _doctor._version("no-such-package-here") == ""


def test_flower_processes_that_start_and_that_do_not(monkeypatch, tmp_path: Path):
    for name, script in {"good": "exit 0", "bad": "exit 3"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _doctor._start("good") == {"command": "good", "starts": True, "why": ""}
    assert _doctor._start("bad")["why"] == "it failed"
    assert "not installed" in _doctor._start("missing")["why"]

    def too_slow(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("good", 1)

    monkeypatch.setattr(subprocess, "run", too_slow)
    assert _doctor._start("good")["why"] == "TimeoutExpired"


@pytest.mark.slow
def test_flowers_own_processes_start():
    assert [_doctor._start(name)["starts"] for name in _doctor._FLOWER] == [True, True]
