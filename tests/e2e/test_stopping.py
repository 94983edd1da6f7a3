"""Ctrl-C, a killed launcher, several runs at once: nothing is left running, and what was done is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cloister.testing import write_tiny_job

LONG = "epochs = 400\nbatch_size = 4\ncheckpoint_every_steps = 10"


def _start(job: Path, runs: Path) -> subprocess.Popen[str]:
    # As from a terminal: whoever runs the tests in the background has them ignore Ctrl-C, and children inherit that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from cloister.cli import main; sys.exit(main())"
    )
    argv = [sys.executable, "-c", code, "run", str(job), "--runs-dir", str(runs), "--json"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(process: subprocess.Popen[str], event: str, n: int = 1) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        n -= json.loads(line).get("event") == event
        if n <= 0:
            return
    raise AssertionError(f"ended before {event}: {process.stderr.read() if process.stderr else ''}")


def _family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _gone(family: list[psutil.Process], within_s: float = 10.0) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(family, timeout=within_s)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.xdist_group("stopping")
def test_ctrl_c_stops_everything_and_the_run_can_be_resumed(tmp_path: Path):
    job = write_tiny_job(tmp_path, clients=("alpha",), training=LONG)
    process = _start(job, tmp_path / "runs")
    _wait_for(process, "step", n=30)
    family = _family(process.pid)
    assert len(family) >= 6
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume" in said and "Traceback" not in said
    assert _gone(family) == []
    folder = tmp_path / "runs" / "latest"
    assert (folder / "server" / "checkpoint.sealed").is_file() and not (folder / "result.json").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("stopping")
def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path):
    process = _start(write_tiny_job(tmp_path, clients=("alpha",), training=LONG), tmp_path / "runs")
    _wait_for(process, "step")
    family = _family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert _gone(family) == []


@pytest.mark.slow
@pytest.mark.xdist_group("stopping")
def test_two_runs_at_once_on_one_machine(tmp_path: Path):
    def one(name: str) -> int:
        job = write_tiny_job(tmp_path / name, clients=("alpha",), training="epochs = 1\nbatch_size = 8")
        process = _start(job, tmp_path / "runs")
        process.communicate(timeout=240)
        return process.returncode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, ["one", "two"])) == [0, 0]
    results = list((tmp_path / "runs").glob("2*/result.json"))
    assert len(results) == 2
