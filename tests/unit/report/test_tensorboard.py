"""TensorBoard reads back what the events said, and torch is not needed for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cloister.report import write_tensorboard

EVENTS = [json.loads(line) for line in (Path(__file__).parent / "sample/events.jsonl").read_text().splitlines()]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for event in LegacyEventFileLoader(str(folder / "events.out.tfevents.cloister")).Load():
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_scalars_by_step_for_every_model(tmp_path: Path):
    folder = write_tensorboard(tmp_path, EVENTS)
    assert folder == tmp_path / "tensorboard"
    federated = read(folder / "federated")
    assert [step for step, _ in federated["train/loss"]] == list(range(1, 139))
    assert federated["eval/accuracy"][0][0] == 138
    assert abs(federated["eval/accuracy"][0][1] - 0.786) < 1e-6
    assert "eval/accuracy/hospital-lake" in federated
    assert read(folder / "alone-hospital-lake")["train/lr"]
    assert read(folder / "majority")["eval/accuracy"][0][0] == 0


def test_writing_again_replaces(tmp_path: Path):
    write_tensorboard(tmp_path, EVENTS)
    write_tensorboard(tmp_path, EVENTS)
    assert len(read(tmp_path / "tensorboard/federated")["train/loss"]) == 138


def test_a_run_that_tells_no_metrics_writes_what_it_tells(tmp_path: Path):
    quiet = [{"t": 1.0, "event": "step", "step": 1, "n_steps": 2, "epoch": 0, "examples_per_s": 5.0}]
    assert set(read(write_tensorboard(tmp_path, quiet) / "federated")) == {"train/examples_per_s"}
    write_tensorboard(tmp_path, [])


def test_metrics_on_held_out_training_examples_have_curves_of_their_own(tmp_path: Path):
    events = [
        {"t": 1.0, "event": "step", "step": 4, "n_steps": 8, "loss": 1.0},
        {
            "t": 1.1,
            "event": "metric",
            "name": "accuracy",
            "value": 0.5,
            "per_client": {"a": 0.5},
            "when": "epoch",
            "epoch": 1,
        },
        {"t": 1.2, "event": "metric", "name": "accuracy", "value": 0.25, "per_client": {}, "when": "after"},
    ]
    found = read(write_tensorboard(tmp_path, events) / "federated")
    assert (found["held-out/accuracy"], found["eval/accuracy"]) == ([(4, 0.5)], [(4, 0.25)])
    assert found["held-out/accuracy/a"] == [(4, 0.5)]


def test_no_torch_is_imported(tmp_path: Path):
    code = (
        "import sys, pathlib; from cloister.report import write_tensorboard, render_report;"
        f"write_tensorboard(pathlib.Path({str(tmp_path)!r}), [dict(t=1.0, event='step', step=1, n_steps=1, loss=1.0)]);"
        "render_report({'job': 'x', 'run_id': 'y'}, []);"
        "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", code], check=True, timeout=120)
