"""Figures in README and docs have a script and results: every bench that is named exists, and every result is read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from bench import report

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
NAMED = sorted(
    {name for page in PAGES for name in re.findall(r"\bbench/[\w/]+\.(?:py|csv)\b", page.read_text("utf-8"))}
)
RESULTS = sorted((ROOT / "bench" / "results").glob("*.csv"))


@pytest.mark.parametrize("name", NAMED)
def test_every_bench_that_a_page_names_exists(name: str):
    assert (ROOT / name).is_file()


def test_the_table_of_all_results_has_each_of_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["report"])
    report.main()
    printed = capsys.readouterr().out
    assert RESULTS and all(path.stem in printed for path in RESULTS)
