"""A whole run over real processes: text of two institutions to metrics and a report, then questions to the model."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloister import predict, run
from cloister.api import Programs
from cloister.testing import FakeRelay, write_tiny_job

FAKE = Programs(relay=FakeRelay)
RECIPES = Path(__file__).parents[2] / "recipes"


def test_run_report_and_predict(tmp_path: Path):
    events: list[dict] = []
    result = run(write_tiny_job(tmp_path), runs_dir=tmp_path / "runs", on_event=events.append, programs=FAKE)

    assert 0.0 <= result.metric <= 1.0
    assert set(result.result["metric"]["per_client"]) == {"alpha", "beta"}
    assert result.result["n_examples"]["alpha"] == {
        "train": 24,
        "test": 9,
        "tokens": result.result["n_examples"]["alpha"]["tokens"],
    }
    assert result.result["simulated"] is True
    assert result.report.is_file() and b"SIMULATED" in result.report.read_bytes()
    assert (tmp_path / "runs" / "latest").resolve() == result.run_dir

    decisions = [e for e in events if e["event"] == "evidence"]
    assert {e["client"] for e in decisions} == {"alpha", "beta"}
    assert all(e["accepted"] and e["reasons"] for e in decisions)
    phases = [(e["phase"], e["status"]) for e in events if e["event"] == "phase"]
    assert phases.index(("prepare", "end")) < phases.index(("train", "begin")) < phases.index(("finish", "end"))

    _check_private_files(result.run_dir)
    _check_kept_evidence(result.run_dir)
    began, heard = time.time(), []
    answers = predict(result.run_dir, "beta", ["the old rose", "cold sea"], on_event=heard.append, programs=FAKE)
    assert [set(a["probabilities"]) for a in answers] == [{"red", "green", "blue"}] * 2
    assert heard and all(event["t"] >= began - 0.001 for event in heard)  # the run's own events are not told again
    assert all(abs(sum(a["probabilities"].values()) - 1) < 1e-5 for a in answers)


def _check_kept_evidence(run_dir: Path) -> None:
    """What a client kept can be judged again, offline, by the same policy."""
    kept = run_dir / "clients" / "alpha"
    argv = ["verify", str(kept / "server.evidence"), "--policy", str(run_dir / "policy.toml")]
    argv += ["--report-data", (kept / "server.report-data").read_text()]
    done = subprocess.run([sys.executable, "-m", "cloister.cli", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ACCEPTED" in done.stdout and "SIMULATED" in done.stdout
    argv[-1] = "00" * 64
    done = subprocess.run([sys.executable, "-m", "cloister.cli", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 53


def _check_private_files(run_dir: Path) -> None:
    for name in ("clients/alpha/node.key.pem", "job.json", "result.json"):
        assert stat.S_IMODE((run_dir / name).stat().st_mode) == 0o600
    assert json.loads((run_dir / "result.json").read_text())["version"] == 1


def test_the_recipe_of_a_hub_model(tmp_path: Path):
    """As it stands, on a folder of the same layout as the hub's model, and data of the same names."""
    write_tiny_job(tmp_path, clients=("hospital-a", "hospital-b"), task="causal-lm", family="qwen2")
    recipe = (RECIPES / "hub-model" / "job.toml").read_text()
    tiny = {'"Qwen/Qwen2.5-0.5B"': json.dumps(str(tmp_path / "model")), "cut_layer = 12": "cut_layer = 2",
            "max_length = 512": "max_length = 32", "lr = 2e-4": "lr = 1e-2"}  # fmt: skip
    for old, new in tiny.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (tmp_path / "job.toml").write_text(recipe)
    result = run(tmp_path / "job.toml", runs_dir=tmp_path / "runs", programs=FAKE)
    assert result.result["metric"]["name"] == "perplexity" and result.result["adapter"] == "spf"
    assert result.metric < result.result["before"]["value"]
    answer = predict(result.run_dir, "hospital-b", ["the old rose 0r1"], max_new_tokens=3, programs=FAKE)
    assert 0 <= answer[0]["n_tokens"] <= 3


def test_resume_finishes_what_a_kill_interrupted(tmp_path: Path):
    whole = run(write_tiny_job(tmp_path, clients=("alpha",)), runs_dir=tmp_path / "whole", programs=FAKE)

    class Interrupt(Exception):
        pass

    seen: list[str] = []

    def interrupt(event: dict) -> None:
        # By the event, which always comes: a tick may miss a training this short.
        if event["event"] == "phase" and event["phase"] == "train" and not seen:
            seen.append(event["status"])
            raise Interrupt

    with pytest.raises(Interrupt):
        run(tmp_path / "job.toml", runs_dir=tmp_path / "cut", programs=FAKE, on_event=interrupt)
    assert seen == ["begin"]
    resumed = run(resume=tmp_path / "cut" / "latest", programs=FAKE)
    assert resumed.metric == whole.metric
    assert resumed.result["losses"] == whole.result["losses"]
    assert resumed.result["n_examples"] == whole.result["n_examples"]
