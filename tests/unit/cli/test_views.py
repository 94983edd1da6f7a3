"""What a person or a program reads while a run goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cloister._format import human_bytes, human_metric, human_time, sparkline
from cloister.cli._live import LiveView
from cloister.cli._summary import summary
from cloister.cli._views import JsonView, PlainView, choose_view

SAMPLE = Path(__file__).parents[1] / "report" / "sample"
EVENTS = [json.loads(line) for line in (SAMPLE / "events.jsonl").read_text().splitlines()]
RESULT = json.loads((SAMPLE / "result.json").read_text())


def plain(events: list[dict], every_s: float = 5.0) -> list[str]:
    stream = io.StringIO()
    with PlainView(stream, every_s=every_s) as view:
        for event in events:
            view(event)
    return stream.getvalue().splitlines()


def test_plain_lines_tell_the_run_in_few_words():
    lines = plain(EVENTS)
    text = "\n".join(lines)
    assert len(lines) < 70
    for said in (
        "SIMULATED", "hospital-harbour accepts the server enclave", "ok  MRTD is on the server's allow-list",
        "the same 10 checks", "602/602 examples", "step 138/138", "accuracy 78.6 %: tuned together",
        "accuracy 31.0 %: hospital-harbour alone", "linear head", "majority class",
    ):  # fmt: skip
        assert said in text, said
    assert lines[0].startswith("[ 0:00] ") and lines[-1].startswith("[ 1:")


def test_a_metric_after_an_epoch_is_said_to_be_of_held_out_training_examples():
    event = {
        "t": 1.0,
        "event": "metric",
        "name": "accuracy",
        "value": 0.5,
        "per_client": {},
        "when": "epoch",
        "epoch": 3,
    }
    assert plain([event]) == ["[ 0:00]   accuracy 50.0 %: after epoch 3, on examples held out of training"]


def test_progress_is_limited_but_its_end_is_always_told():
    steps = [
        {"t": i / 10, "event": "step", "step": i, "n_steps": 100, "loss": 1.0, "examples_per_s": 1.0, "epoch": 0}
        for i in range(1, 101)
    ]
    lines = plain(steps)
    assert len(lines) == 3 and "step 1/100" in lines[0] and "step 100/100" in lines[-1]


def test_a_refusal_is_told_in_full_with_its_reasons():
    event = {
        "t": 1.0, "event": "evidence", "client": "a", "accepted": False, "error": "attest.measurement",
        "reasons": ["RTMR3 is of other code"], "claims": {"simulated": True},
    }  # fmt: skip
    lines = plain([event])
    assert "a REFUSES the server enclave (attest.measurement) [SIMULATED]; it sends nothing:" in lines[0]
    assert "no  RTMR3 is of other code" in lines[1]


def test_one_partys_error_names_it():
    event = {
        "t": 1.0,
        "source": "client/a",
        "event": "error",
        "code": "data",
        "cause": "row 3 is empty",
        "hint": "fill it",
    }
    assert plain([event]) == ["[ 0:00] client/a: error: row 3 is empty (fill it)"]


def test_a_run_without_live_metrics_shows_steps_without_loss():
    quiet = [{"t": 1.0, "event": "step", "step": 1, "n_steps": 9, "epoch": 0, "examples_per_s": 5.0}]
    assert "loss" not in plain(quiet)[0]


def test_json_is_every_event_on_a_line():
    stream = io.StringIO()
    with JsonView(stream) as view:
        for event in EVENTS:
            view(event)
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == EVENTS


def test_the_live_view_draws_every_state_and_keeps_what_matters():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with LiveView(console, clock=lambda: view.board.last_t) as view:
        for i, event in enumerate(EVENTS):
            view(event)
            if i % 25 == 0:
                console.print(view._render())
    text = stream.getvalue()
    for said in (
        "✓ handshake", "▶ train", "enclave accepted", "602/602 examples", "loss", "examples/s", "left in this phase",
        "left for this model", "store 8.4 MB", "SIMULATED", "ok  debug mode is off", "alone/hospital-lake",
    ):  # fmt: skip
        assert said in text, said


def test_the_live_view_reads_names_as_text():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with LiveView(console) as view:
        view({"t": 1.0, "event": "warning", "cause": "[bold]odd[/nonsense]"})
    assert "[bold]odd[/nonsense]" in stream.getvalue()


def test_the_view_fits_where_it_is_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(choose_view(as_json=False, plain=False), PlainView)
    assert isinstance(choose_view(as_json=True, plain=False), JsonView)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert isinstance(choose_view(as_json=False, plain=True), PlainView)
    assert isinstance(choose_view(as_json=False, plain=False), LiveView)


def test_the_summary_puts_the_metric_beside_what_it_is_compared_with(tmp_path: Path):
    text = summary(RESULT, tmp_path)
    lines = text.splitlines()
    assert lines[0].split() == [
        "accuracy", "on", "held-out", "examples", "all", "hospital-harbour", "hospital-lake", "hospital-north",
    ]  # fmt: skip
    assert lines[1].startswith("tuned together") and "78.6 %" in lines[1]
    assert len({len(line) for line in lines[:7]}) == 1
    for said in ("linear head", "hospital-lake alone", "majority class", "report.html", "SIMULATED", "8.4 MB"):
        assert said in text


def test_the_summary_of_little_is_little(tmp_path: Path):
    assert "no metric" in summary({"metric": None}, tmp_path)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (human_bytes(999), "999 B"), (human_bytes(1234), "1.2 kB"), (human_bytes(8.4e6), "8.4 MB"),
        (human_bytes(3e15), "3000.0 TB"), (human_time(7), "0:07"), (human_time(3723), "1:02:03"),
        (human_metric("accuracy", 0.786), "78.6 %"), (human_metric("perplexity", 7.5), "7.50"),
        (human_metric("perplexity", 1234.5), "1.23e+03"), (sparkline([]), ""), (sparkline([1, 1]), "▁▁"),
        (sparkline([2.0, 1.0]), "█▁"),
    ],
)  # fmt: skip
def test_numbers_as_a_person_reads_them(shown: str, wanted: str):
    assert shown == wanted
