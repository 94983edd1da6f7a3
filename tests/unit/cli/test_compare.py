"""`cloister compare` from outside: arguments, lines while it runs, the table, exit codes, and how it is resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cloister.api import compare as run_compare
from cloister.api._compare_jobs import METHODS
from cloister.cli import _help, main
from cloister.cli._compare import parse_rates, parse_seeds
from cloister.errors import ConfigError
from cloister.testing import write_tiny_job

sys.path.insert(0, str(Path(__file__).parents[1] / "api"))
from _fake_runs import FakeRunner

pytest.importorskip("scipy", reason="the extra evaluate is not installed")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`cloister compare` over a runner that answers at once: gives exit code, stdout, stderr."""
    job = write_tiny_job(tmp_path)
    capsys.readouterr()  # transformers says that it writes a model

    def call(*args: str, runner: FakeRunner | None = None) -> tuple[int, str, str]:
        runner = runner or FakeRunner()
        monkeypatch.setattr("cloister.api.compare", lambda *a, **k: run_compare(*a, **k, runner=runner))
        code = main(["compare", *(args or (str(job),)), "--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    call.job = str(job)  # type: ignore[attr-defined]
    call.folder = (tmp_path / "out" / "tiny").resolve()  # type: ignore[attr-defined]
    return call


def test_the_table_and_the_lines(shell):
    code, out, err = shell(shell.job, "--seeds", "1")
    assert code == 0
    lines = out.strip().splitlines()
    assert lines[0].split("  ")[0] == "method" and "accuracy (95 %)" in lines[0] and "to fedavg" in lines[0]
    assert [line.split()[0] for line in lines[1:7]] == list(METHODS)
    assert "88.9 %" in lines[1] and "- one seed: intervals over examples only" in out
    assert len({len(line) for line in lines[:7]}) == 1, "columns are not aligned"
    assert f"report  {shell.folder / 'compare.html'}" in out
    assert "[1 of 6] central, seed 0\n" in err and "accuracy 88.9 % in 1:02, done" in err
    assert err.count("step 1/1, loss 0.500") == 6


def test_json_is_events_and_the_table(shell):
    code, out, err = shell(shell.job, "--seeds", "1", "--only", "fedavg,method2-lora", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == ""
    assert [line["event"] for line in lines] == ["compare", *["compare", "step", "compare"] * 2, "comparison"]
    assert lines[-1]["reference"] == "fedavg" and [row["method"] for row in lines[-1]["rows"]] == [
        "fedavg",
        "method2-lora",
    ]


def test_a_failed_method_is_in_the_table_and_the_exit_code(shell):
    code, out, err = shell(shell.job, "--seeds", "1", runner=FakeRunner(failing=("method1-lora",)))
    assert code == 4  # a ModelError's
    assert "FAILED: its weights are gone" in out and "method1-lora, seed 0: FAILED: its weights are gone" in err
    assert "hint: look for them" in err and out.count(" %") == 6


def test_ctrl_c_says_how_to_go_on(shell):
    code, _, err = shell(shell.job, "--seeds", "1", runner=FakeRunner(stop_at=1))
    assert code == 130 and f"cloister compare --resume {shell.folder} goes on" in err
    code, _, err = shell("--resume", str(shell.folder))
    assert code == 0 and "central, seed 0: accuracy 88.9 % in 1:02, kept from before" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--only", "loar"), "no method is called 'loar'"),
        (("--only", ","), "no method was chosen"),
        (("--seeds", "x"), "--seeds x is no list of seeds"),
        (("--seeds", "0"), "no seed was chosen"),
        (("--lr", "central"), "--lr central is no rate of a method"),
        (("--generate", "3"), "generates nothing"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_arguments(shell, args: tuple[str, ...], said: str):
    code, out, err = shell(shell.job, *args)
    assert code == 2 and out == "" and said in err and "hint: " in err and err.count("error: ") == 1


def test_no_job(capsys: pytest.CaptureFixture[str]):
    assert main(["compare"]) == 2
    assert "error: no job" in capsys.readouterr().err


def test_seeds():
    assert parse_seeds("0,1,2") == parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("7,") == [7] and parse_seeds(" 4, 2 ") == [4, 2]
    with pytest.raises(ConfigError):
        parse_seeds("1;2")


def test_rates():
    assert parse_rates(["central=0.1", "method1-prefix=1e-2"]) == {"central": 0.1, "method1-prefix": 0.01}
    assert parse_rates(None) == {}


def test_the_help_names_every_method(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in METHODS) and "in the clear" in said and "minute" in said
    assert "compare job.toml" in _help.CLOISTER
