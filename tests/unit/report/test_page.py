"""The report page: everything of a run is on it, nothing is loaded, nothing of the run is taken for markup."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cloister.report import model_rows, render_report, write_report

SAMPLE = Path(__file__).parent / "sample"


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads((SAMPLE / "result.json").read_text())


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLE / "events.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "link", "br", "rect", "line", "path", "polyline"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_spf_trains_is_among_the_facts(result, events):
    counts = {"head_groups": 3, "neurons": 10, "attention_rows": 96, "feed_forward_rows": 20}
    spf = {
        "criterion": "fisher",
        "heads": 0.5,
        "neurons": 0.1,
        "chosen": counts,
        "of": {k: 9 * v for k, v in counts.items()},
    }
    page = render_report(result | {"adapter": "spf", "spf": spf, "n_trainable": 4242}, events)
    for shown in ("fisher: 3 of 27 head groups, 10 of 90 neurons", "4242"):
        assert shown in page


def test_precision_and_early_stopping_are_among_the_facts(result, events):
    assert "early stopping" not in Page(render_report(result, events)).text
    found = {"patience": 1, "held_out": {"a": 3}, "losses": [0.7, 0.5, 0.6], "best_epoch": 2, "stopped_at_epoch": 3}
    text = Page(render_report({**result, "precision": "bf16", "early_stopping": found}, events)).text
    assert "bf16" in text and "kept epoch 2, stopped after 3 (held-out loss 0.500)" in text
    told = {**found, "stopped_at_epoch": None}
    assert "kept epoch 2, did not stop in 3" in Page(render_report({**result, "early_stopping": told}, events)).text


def test_the_page_shows_the_run(result, events):
    html = render_report(result, events)
    page = Page(html)
    for said in (
        "78.6 %", "72.5 %", "hospital-lake alone", "majority class", "SIMULATED", "quickstart", result["run_id"],
        "training text", "boundary tensors and labels", "RTMR3", result["policy_sha384"], result["job_sha384"],
        "report_data binds the evidence", "8.4 MB", "train 36.1 s", "server enclave", "2.13.0", "int8",
    ):  # fmt: skip
        assert said in page.text, said
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert sections == {
        "result", "loss", "per-client", "visibility", "evidence", "phases", "bytes", "memory", "clients", "facts",
    }  # fmt: skip


def test_every_plot_says_in_words_what_it_shows(result, events):
    plots = [attrs for tag, attrs in Page(render_report(result, events)).tags if tag == "svg"]
    assert len(plots) == 6
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 20 for plot in plots)


def test_nothing_is_loaded_and_nothing_runs(result, events):
    page = Page(render_report(result, events))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "form"}
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or value == "data:,"
    assert not re.search(r"https?://|@import|url\(", render_report(result, events))


def test_names_are_text_and_never_markup(result, events):
    evil = '<script>alert("x")</script>'
    result["job"] = result["visibility"][0]["what"] = result["evidence"][0]["reasons"][0] = evil
    per_client = result["metric"]["per_client"]
    per_client[evil] = per_client.pop("hospital-lake")
    result["baselines"]["alone"][evil] = result["baselines"]["alone"].pop("hospital-lake")
    result["bytes"][evil] = 3
    events.append({"t": 1.0, "source": "run", "event": "warning", "cause": evil})
    html = render_report(result, events)
    assert "<script" not in html and "&lt;script&gt;" in html
    Page(html)


def test_a_run_on_real_hardware_has_no_stamp(result, events):
    result["simulated"] = False
    assert "SIMULATED" not in render_report(result, events)


def test_a_result_without_its_optional_parts_still_renders(result, events):
    bare = copy.deepcopy(result)
    for key in ("baselines", "losses", "bytes", "peak_rss_bytes", "evidence", "visibility", "phases_s", "versions"):
        bare[key] = type(bare[key])()
    Page(render_report(bare, []))
    Page(render_report({**bare, "metric": None}, []))
    Page(render_report({"job": "x", "run_id": "y"}, []))


def test_perplexity_is_told_to_be_better_when_lower(result, events):
    for metric in (result["metric"], result["baselines"]["alone"]["hospital-lake"]):
        metric["name"] = "perplexity"
        metric["value"] = 7.5
        metric["per_client"] = dict.fromkeys(metric["per_client"], 7.0)
    result["baselines"] = {"alone": {"hospital-lake": result["baselines"]["alone"]["hospital-lake"]}}
    result["before"] = {**result["metric"], "value": 20.25}
    text = Page(render_report(result, events)).text
    assert "lower is better" in text and "7.50" in text and "20.25" in text and "7.5 %" not in text


def test_without_live_metrics_the_loss_comes_from_the_report(result, events):
    quiet = [event for event in events if event["event"] not in ("step", "metric")]
    assert 'id="loss"' in render_report(result, quiet)


def test_a_step_that_a_resumed_run_repeats_is_drawn_once(result, events):
    result["losses"] = []
    steps = [event for event in events if event["event"] == "step"]
    html = render_report(result, [*events, *steps])
    assert "in 138 steps" in html


def test_warnings_restarts_and_absent_clients_are_said(result, events):
    result["left_out"] = ["hospital-lake"]
    for process in ("superlink", "server", "server"):
        events.append({"t": 2.0, "source": "run", "event": "restart", "process": process, "attempt": 1})
    text = Page(render_report(result, events)).text
    assert "Left out" in text and "superlink, server (2 times)" in text


def test_decisions_that_differ_in_their_time_only_are_said_once(result, events):
    for i, decision in enumerate(result["evidence"]):
        decision["reasons"] = [*decision["reasons"], f"verified at 2026-11-22 23:08:0{i}Z"]
    assert render_report(result, events).count('class="checks"') == 1
    result["evidence"][1]["reasons"][0] = "something else"
    assert render_report(result, events).count('class="checks"') == 2


def test_phases_are_in_the_order_of_the_run(result, events):
    result["phases_s"] = dict(sorted(result["phases_s"].items()))
    text = Page(render_report(result, events)).text
    assert (
        text.index("start 9.4 s")
        < text.index("prepare 10.9 s")
        < text.index("train 36.1 s")
        < text.index("finish 1.2 s")
    )


def test_the_file_is_private_to_its_user(tmp_path, result, events):
    path = write_report(tmp_path, result, events)
    assert path == tmp_path / "report.html"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == render_report(result, events)


def test_models_come_in_the_order_of_comparison(result):
    assert [row.kind for row in model_rows(result)] == ["tuned", "linear-head", "alone", "alone", "alone", "majority"]
    assert model_rows({}) == []
