"""The page of a comparison: all of its table is on it, nothing from elsewhere, and what is missing is left out."""

from __future__ import annotations

import copy
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cloister.report import compare_cells, render_compare_page, write_compare_page

SAMPLE = Path(__file__).parent / "sample_compare.json"


@pytest.fixture
def table() -> dict[str, Any]:
    return json.loads(SAMPLE.read_text())


def test_every_method_and_figure_is_on_the_page(table: dict[str, Any], tmp_path: Path):
    write_compare_page(tmp_path / "compare.html", table)
    page = html.unescape((tmp_path / "compare.html").read_text())
    for part in ("table", "figures", "differences", "per-client", "facts"):
        assert f'id="{part}"' in page, part
    for row in compare_cells(table):
        for key in ("label", "figure", "difference", "seconds", "peak", "trained"):
            assert row[key] in page, (row["name"], key)
    for said in (
        *(note[1:] for note in table["notes"]),
        "SIMULATED",
        "Peak memory of an enclave",
        "masked",
        "paired, to fedavg",
    ):
        assert said in page, said
    assert page.count("<svg") == 7


def test_nothing_is_loaded_from_elsewhere_and_text_is_escaped(table: dict[str, Any]):
    table["rows"][2] |= {"status": "failed", "reason": "<script>alert(1)</script>", "figure": None}
    page = render_compare_page(table)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "url(" not in page
    assert "default-src 'none'" in page


def test_a_failed_seed_is_marked_and_a_failed_method_says_why(table: dict[str, Any]):
    table["rows"][1]["status"] = "failed"
    table["rows"][2] = {key: table["rows"][2][key] for key in ("method", "label", "seeds")} | {
        "status": "unavailable", "reason": "the prefix does not fit",
    }  # fmt: skip
    page = render_compare_page(table)
    assert "a seed failed" in page and "the prefix does not fit" in page


def test_nothing_finished(table: dict[str, Any]):
    rows = [{**{key: row[key] for key in ("method", "label")}, "seeds": [], "status": "failed", "reason": "no"}
            for row in table["rows"]]  # fmt: skip
    page = render_compare_page({**table, "rows": rows, "reference": None})
    assert 'id="table"' in page and "<svg" not in page


def test_perplexity_of_one_seed_has_no_interval(table: dict[str, Any]):
    table = copy.deepcopy(table) | {"metric": "perplexity", "higher_is_better": False}
    for row in table["rows"]:
        row["figure"] = {"value": 7.25, "low": None, "high": None, "method": "one seed"}
        row["rouge_l"] = {"value": 0.25, "low": 0.2, "high": 0.3, "method": "x"}
        for key in ("pair", "pair_over_seeds", "per_client", "macro_f1"):
            row.pop(key, None)
    assert compare_cells(table)[0]["figure"] == "7.25"
    page = render_compare_page(table)
    assert "lower is better" in page and 'id="differences"' not in page and "0.250 (0.200 to 0.300)" in page
    assert "Macro F1" not in page


def test_cells(table: dict[str, Any]):
    row = next(row for row in compare_cells(table) if row["name"] == "method2-lora")
    assert re.fullmatch(r"\d\d\.\d % \(\d\d\.\d to \d\d\.\d\)", row["figure"])
    assert re.fullmatch(r"\+\d+\.\d \(-?\d+\.\d to \d+\.\d\)", row["difference"])
    assert row["seconds"] == "1:04"
