"""The comparison table: what its rows hold, and its forms."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest

from cloister.errors import DataError
from cloister.evaluate import compare_pair, comparison_table, holm, interval, seed_mean

FEW = {"n_resamples": 300}


@pytest.fixture
def scores(make):
    return {
        "plain LoRA": make([1, 0, 1, 0, 1, 0, 1, 1, 0, 1]),
        "split | SPF": make([1, 1, 1, 1, 1, 1, 1, 1, 0, 1]),
        "prefix": make([1, 0, 0, 0, 1, 0, 1, 0, 0, 1]),
    }


def test_rows_hold_what_the_single_functions_give(scores):
    table = comparison_table(scores, reference="plain LoRA", **FEW)
    assert [row.method for row in table.rows] == list(scores)
    reference, better, worse = table.rows
    assert reference.pair is None
    assert reference.p_corrected is None
    for row in (better, worse):
        assert row.pair == compare_pair(scores[row.method], scores["plain LoRA"], **FEW)
        assert row.figure == interval(scores[row.method], **FEW)
        assert row.per_client == scores[row.method].per_client()
        assert (row.n, row.n_seeds) == (10, 1)
    assert [better.p_corrected, worse.p_corrected] == holm([better.pair.p_value, worse.pair.p_value])
    assert better.pair.difference > 0 > worse.pair.difference


def test_seeds_are_averaged_by_example(make, scores):
    second = make([0, 0, 1, 0, 1, 0, 1, 1, 1, 1])
    table = comparison_table({"a": [scores["plain LoRA"], second], "b": scores["prefix"]}, reference="b", **FEW)
    assert (table.rows[0].n_seeds, table.rows[1].n_seeds) == (2, 1)
    assert table.rows[0].figure == interval(seed_mean([scores["plain LoRA"], second]), **FEW)
    assert "permutation" in table.rows[0].pair.test


def test_csv_reads_back(scores):
    table = comparison_table(scores, reference="plain LoRA", correction="fdr_bh", **FEW)
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["method"] for row in rows] == list(scores)
    assert rows[0]["p_value"] == ""
    assert float(rows[1]["difference"]) == table.rows[1].pair.difference
    assert float(rows[1]["p_corrected"]) == table.rows[1].p_corrected
    assert rows[1]["metric"] == "accuracy"


def test_markdown_has_a_line_for_each_method_and_says_what_it_means(scores):
    shown = comparison_table(scores, reference="plain LoRA", **FEW).to_markdown()
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert all(line.replace("\\|", "").count("|") == 7 for line in lines)
    assert "| plain LoRA | 0.600 [" in shown
    assert "| split \\| SPF | 0.900 [" in shown
    assert "+0.300 [" in shown
    assert "95 % intervals" in shown
    assert "McNemar exact" in shown
    assert "holm" in shown


def test_a_table_of_perplexities_says_that_differences_are_logarithms(make):
    found = comparison_table(
        {"a": make([4.0, 6.0, 5.0], "perplexity", [2, 3, 2]), "b": make([3.0, 6.5, 4.0], "perplexity", [2, 3, 2])},
        reference="a", **FEW)  # fmt: skip
    assert found.rows[1].pair.difference == pytest.approx(
        math.log(found.rows[0].figure.value / found.rows[1].figure.value)
    )
    assert "ln(reference / method) to a" in found.to_markdown()


def test_it_is_plain_data(scores):
    found = json.loads(json.dumps(comparison_table(scores, reference="prefix", **FEW).as_dict(), allow_nan=False))
    assert found["reference"] == "prefix"
    assert found["rows"][0]["pair"]["test"] == "McNemar exact"
    assert found["rows"][2]["pair"] is None


def test_one_method_alone_is_a_table_too(scores):
    found = comparison_table({"prefix": scores["prefix"]}, reference="prefix", **FEW)
    assert len(found.rows) == 1
    assert "p by" not in found.to_markdown()


def test_an_unknown_reference_is_refused(scores):
    with pytest.raises(DataError, match="the reference 'nobody' is not among the methods") as caught:
        comparison_table(scores, reference="nobody")
    assert "prefix" in caught.value.hint


def test_a_method_without_runs_is_refused(scores):
    with pytest.raises(DataError, match="no run"):
        comparison_table({**scores, "none": []}, reference="prefix", **FEW)


def test_the_page_shows_what_runs(capsys):
    page = (Path(__file__).parents[3] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    given = {"labels": [0, 1, 1, 0], "predicted_ours": [0, 1, 1, 1], "predicted_peer": [0, 0, 1, 1],
             "ids": ["w", "x", "y", "z"], "clients": ["a", "a", "b", "b"]}  # fmt: skip
    exec(compile(code, "docs/evaluate.md", "exec"), given)  # noqa: S102
    assert "| split, SPF + LoRA | 0.750 [" in capsys.readouterr().out
