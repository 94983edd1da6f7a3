"""A bounded run of the fuzzer with a fixed seed; `python tests/fuzz/parsers.py` runs a million cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fuzz.parsers import Target, all_targets, fuzz

from cloister.errors import MalformedMessageError


def test_every_parser_ends_in_a_result_or_a_cloister_error(tmp_path: Path):
    done = list(fuzz(all_targets(tmp_path), cases=20_000))
    assert len(done) >= 15
    assert sum(n for _, n, _ in done) >= 19_000
    # Some cases parse and some do not: the changes are neither too timid nor too wild.
    assert any(parsed for _, _, parsed in done)
    assert all(parsed < n for _, n, parsed in done)


def test_the_fuzzer_sees_another_exception():
    def parse(data: bytes) -> None:
        if data[:1] != b"h":
            raise KeyError("found")
        raise MalformedMessageError("refused")

    with pytest.raises(AssertionError, match="KeyError"):
        list(fuzz([Target("bad", parse, [b"honest"])], cases=200))
