"""`cloister compare` over real processes: one method in the clear and one of ours, asked the same questions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.testing import write_tiny_job

pytest.importorskip("scipy", reason="the extra evaluate is not installed")


@pytest.mark.slow
def test_two_methods_on_the_same_examples(tmp_path: Path):
    job = write_tiny_job(tmp_path, clients=("alpha",), n_test=18, training="epochs = 6\nbatch_size = 8\nlr = 0.02")
    argv = [sys.executable, "-m", "cloister.cli", "compare", str(job), "--out", str(tmp_path / "out"), "--plain",
            "--only", "method2-lora,central", "--seeds", "1"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "tiny"
    table = json.loads((folder / "compare.json").read_text())
    central, ours = table["rows"]
    assert [row["status"] for row in (central, ours)] == ["done", "done"] and table["reference"] == "central"
    assert (central["n_steps"], ours["n_steps"]) == (18, 18)

    results = [json.loads((folder / f"{name}-0" / "result.json").read_text()) for name in ("central", "method2-lora")]
    assert results[0]["examples"]["ids"] == results[1]["examples"]["ids"]
    assert results[0]["examples"]["labels"] == results[1]["examples"]["labels"]
    for found, row in zip(results, (central, ours), strict=True):
        # Asked one by one, the tuned model answers what its own evaluation counted.
        assert row["figure"]["value"] == pytest.approx(found["metric"]["value"], abs=1.01 / 18)
        assert row["figure"]["value"] > 0.4 and row["n_trained"] > 0 and row["seconds"] > 0
    assert ours["enclave_peak_bytes"] > 10**8 and ours["wire_bytes"] > 0 and ours["simulated"]
    assert central["enclave_peak_bytes"] is None and central["n_trained"] > ours["n_trained"]
    assert ours["pair"]["n"] == 18 and table["notes"]
    assert "SIMULATED" in (folder / "compare.html").read_text()
    assert (folder / "method2-lora-0" / results[1]["run_dir"] / "report.html").is_file()
    assert not (folder / "central-0" / "plain").exists(), "copies of everybody's data were left"
    assert "[2 of 2] method2-lora, seed 0: accuracy" in done.stderr and "method2-lora" in done.stdout
