"""The report, summary and views of a run of Method 1: rounds, masks and what they rest on, both sides' evidence."""

from __future__ import annotations

import copy
import html
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloister.cli._live import LiveView
from cloister.cli._summary import summary
from cloister.cli._views import PlainView
from cloister.pad import ASSUMPTIONS, PadMode
from cloister.report import render_report, write_tensorboard

SAMPLE = Path(__file__).parent / "sample_enclave"
ASSUMPTION = ASSUMPTIONS[PadMode.OTP]


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads((SAMPLE / "result.json").read_text())


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLE / "events.jsonl").read_text().splitlines()]


def test_everything_of_the_run_is_on_the_page(result: dict[str, Any], events: list[dict[str, Any]]):
    page = html.unescape(render_report(result, events))
    for part in (
        "result",
        "loss",
        "per-client",
        "rounds",
        "pad",
        "visibility",
        "evidence",
        "bytes",
        "clients",
        "facts",
    ):
        assert f'id="{part}"' in page, part
    for said in (
        ASSUMPTION, "pad otp, ring faithful", "adapters in enclaves (Method 1)", "Every enclave was a hardened process",
        "accepted the enclaves of alpha, beta", "masked to and from the accelerators", "In each client's own enclave",
        "dotted: a new round",
    ):  # fmt: skip
        assert said in page, said
    for said in ("sealed manifest", "whatever the number of epochs", "Inside the server enclave, on features"):
        assert said not in page, said


def test_refusals_and_gaps_of_a_round_are_told(result: dict[str, Any], events: list[dict[str, Any]]):
    result["rounds"][1] |= {
        "clients": ["alpha"],
        "missing": ["gamma"],
        "rejected": {"beta": {"key": "norm", "cause": "norm 9 <too large>"}},
    }  # fmt: skip
    result["rounds"][0]["per_client"] = {}
    result["epsilon"] = 3.25
    result["epsilon_per_example"] = {"beta": 2.0, "alpha": 1.375}
    page = render_report(result, events)
    assert "beta: norm 9 &lt;too large&gt;" in page and "gamma" in page and "3.25" in page
    assert "epsilon for each example" in page and "alpha 1.38, beta 2.00" in page
    said = summary(result, Path("runs/x"))
    assert "rounds    2, 3 updates aggregated, 1 refused, 1 missing" in said and "epsilon 3.25" in said
    assert "privacy   epsilon for each example: alpha 1.38, beta 2.00\n" in said


def test_without_live_metrics_there_is_no_curve(result: dict[str, Any], events: list[dict[str, Any]]):
    quiet = [{key: value for key, value in event.items() if key != "loss"} for event in events]
    assert 'id="loss"' not in render_report(result, quiet)


def test_a_run_without_pads_or_metric_still_renders(result: dict[str, Any], events: list[dict[str, Any]]):
    bare = copy.deepcopy(result) | {"pad": None, "metric": None, "rounds": [], "client_enclaves": {}}
    page = render_report(bare, events)
    assert 'id="pad"' not in page and "No metric" in page
    assert "pad " not in summary(bare, Path("runs/x"))


def test_the_summary_says_the_mode_and_what_it_rests_on(result: dict[str, Any]):
    assert f"pad       otp, ring faithful: {ASSUMPTION}" in summary(result, Path("runs/x"))


def test_the_lines_of_a_run(events: list[dict[str, Any]]):
    stream = io.StringIO()
    with PlainView(stream) as view:
        for event in events:
            view(event)
    text = stream.getvalue()
    for said in (
        f"pad otp, ring faithful: {ASSUMPTION}", "SIMULATED: every enclave is a hardened process",
        "train: rounds: clients' enclaves train", "round 1/2: 2 updates, mean loss", "round 2/2: 2 updates",
    ):  # fmt: skip
        assert said in text, said
    assert text.count("client/alpha: step 6/6") == 2 and "near side" not in text


def test_a_round_with_refusals_as_a_line():
    stream = io.StringIO()
    view = PlainView(stream)
    view({"t": 1.0, "event": "round", "n_round": 2, "n_rounds": 3, "clients": ["a"], "rejected": ["b"],
          "missing": ["c"], "epsilon": 1.5})  # fmt: skip
    assert "round 2/3: 1 updates, epsilon 1.50; rejected: b; missing: c" in stream.getvalue()


def test_the_live_view_has_a_bar_of_rounds(events: list[dict[str, Any]]):
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    view = LiveView(console, clock=lambda: events[-1]["t"])
    seen: set[tuple[int, int]] = set()
    for event in events:
        view(event)
        seen.add(view.board.rounds)
        console.print(view._render())
    assert seen == {(0, 0), (1, 2), (2, 2)} and view.board.has_rounds
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rounds" in text and "1/2" in text
    losses = view.board.trainings["client/alpha"].losses
    assert len(losses) == 12, "a new round is no restart"


def test_a_restart_within_a_round_goes_back_to_its_beginning(events: list[dict[str, Any]]):
    view = PlainView(io.StringIO())
    for n_round, step in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (2, 1), (2, 2)):
        view(
            {"t": 1.0, "event": "step", "model": "client/a", "round": n_round, "step": step, "n_steps": 3, "loss": 1.0}
        )
    assert view.board.trainings["client/a"].round_at == 2
    assert len(view.board.trainings["client/a"].losses) == 5


def test_tensorboard_counts_steps_over_all_rounds(tmp_path: Path, events: list[dict[str, Any]]):
    from cloister.report._tensorboard import _scalars

    steps = [step for model, (_, step, tag, _) in _scalars(events) if (model, tag) == ("client/alpha", "train/loss")]
    assert steps == list(range(1, 13))
    assert [step for model, (_, step, tag, _) in _scalars(events) if tag == "eval/accuracy"] == [12]
    folder = write_tensorboard(tmp_path, events)
    assert {path.name for path in folder.iterdir()} == {"client-alpha", "client-beta", "federated"}
