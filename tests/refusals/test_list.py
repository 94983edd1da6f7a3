"""The list of removable checks fits the code: every text stands once, every test exists, nothing is listed twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.refusals.remove_checks import ROOT, Check, read_checks

CHECKS = read_checks()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_it_can_be_removed_and_its_tests_exist(check: Check):
    compile(check.mutated(), check.file, "exec")
    for test in check.tests:
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {re.escape(name.partition('[')[0])}\(", text, re.MULTILINE), test


def test_names_are_unique():
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    assert len(names) >= 370


def test_the_script_runs_one(tmp_path: Path):
    from tests.refusals.remove_checks import run_without

    check = next(check for check in CHECKS if check.name == "attest: debug enclave")
    assert run_without(check)[1] == ""
