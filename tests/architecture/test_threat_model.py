"""Every promise of the threat model stands next to the test that keeps it, and that test exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+?\.py)(?:::(\w+))?`", PAGE)))


def test_requirements_are_numbered_without_a_gap_and_each_names_a_test():
    lines = [line for line in PAGE.splitlines() if re.match(r"\| R\d+ \|", line)]
    assert [int(re.findall(r"R(\d+)", line)[0]) for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= 23
    assert all("`tests/" in line for line in lines)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_test_that_it_names_exists(path: str, name: str):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not name or re.search(rf"^\s*(async )?def {name}\(|^class {name}\b|^{name} = ", text, re.MULTILINE)
