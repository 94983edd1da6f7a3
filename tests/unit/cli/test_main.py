"""The command line from outside: exit codes, error and hint lines, where data goes, and how fast it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import cloister
from cloister import errors
from cloister.cli import main
from cloister.cli._main import Terminated, build_parser


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, *args: str) -> int:
    """The exit code of `cloister check` (or `args`) when the command raises `error`."""

    def fail(_args: object) -> int:
        raise error

    for name in ("check", "run"):
        monkeypatch.setattr(f"cloister.cli._commands.{name}", fail)
    return main(args or ("check", "job.toml"))


def every_error() -> list[type[errors.CloisterError]]:
    found, pending = [], [errors.CloisterError]
    while pending:
        cls = pending.pop()
        found.append(cls)
        pending += cls.__subclasses__()
    return found


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_has_its_exit_code_and_two_lines(cls, monkeypatch, capsys):
    extra = {"peer": "a", "peer_code": "data"} if cls is errors.PeerError else {}
    code = run_with(monkeypatch, cls("what happened", hint="what to do", **extra))
    out, err = capsys.readouterr()
    assert code == cls.exit_code and out == ""
    assert err == "error: what happened\nhint: what to do\n"


def test_every_exit_code_is_in_the_help():
    text = build_parser().format_help()
    for cls in every_error():
        assert f" {cls.exit_code} " in text, cls


def test_a_configuration_shows_every_problem(monkeypatch, capsys):
    problems = [errors.Problem("a.b", "is wrong", "make it right"), errors.Problem("c", "is missing")]
    assert run_with(monkeypatch, errors.ConfigError(problems, source="job.toml")) == 2
    assert capsys.readouterr().err == (
        "error: job.toml: a.b: is wrong\nhint: make it right\nerror: job.toml: c: is missing\n"
    )


def test_a_refusal_shows_every_reason(monkeypatch, capsys):
    error = errors.MeasurementMismatchError("other code", reasons=["other code", "RTMR3 differs", "MRTD differs"])
    assert run_with(monkeypatch, error) == 5
    assert capsys.readouterr().err == "error: other code\n  - RTMR3 differs\n  - MRTD differs\n"


def test_json_gives_the_error_as_data_too(monkeypatch, capsys):
    assert run_with(monkeypatch, errors.DataError("row 3 is empty"), "run", "job.toml", "--json") == 3
    out, err = capsys.readouterr()
    event = json.loads(out)
    assert event.pop("t") > 0
    assert event == {
        "source": "run", "event": "error", "code": "data", "cause": "row 3 is empty", "hint": "", "exit_code": 3,
    }  # fmt: skip
    assert err == "error: row 3 is empty\n"


def test_a_bug_says_so_without_a_traceback_and_without_its_text(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_with(monkeypatch, KeyError("a patient's name")) == 70
    err = capsys.readouterr().err
    assert "bug in cloister (KeyError)" in err and "Traceback" not in err
    [log] = tmp_path.iterdir()
    assert str(log) in err
    assert "test_main.py" in log.read_text() and "patient" not in log.read_text() + err


def test_debug_shows_the_bug(monkeypatch):
    with pytest.raises(KeyError):
        run_with(monkeypatch, KeyError("x"), "check", "job.toml", "--debug")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143), (BrokenPipeError(), 141)])
def test_being_stopped_is_no_bug(stop, code, monkeypatch, capfd):
    assert run_with(monkeypatch, stop) == code
    assert "Traceback" not in capfd.readouterr().err


def test_init_writes_once(tmp_path: Path, capsys):
    path = tmp_path / "job.toml"
    assert main(["init", str(path)]) == 0
    assert cloister.__version__ and "[[clients]]" in path.read_text()
    path.write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert path.read_text() == "mine" and "is there already" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "no" / "folder.toml")]) == 2


def test_check_says_what_the_job_is(tmp_path: Path, capsys):
    from cloister.testing import write_tiny_job

    job = write_tiny_job(tmp_path)
    if not isinstance(job, (str, Path)):
        from cloister.config import job_to_toml

        (tmp_path / "job.toml").write_text(job_to_toml(job))
        job = tmp_path / "job.toml"
    assert main(["check", str(job)]) == 0
    out = capsys.readouterr().out
    assert "clients  alpha, beta" in out and "sha384" in out
    assert main(["check", str(tmp_path / "missing.toml")]) == 2


def test_run_needs_a_job(capsys):
    assert main(["run"]) == 2
    assert "cloister init" in capsys.readouterr().err


def test_the_summary_is_printed_when_the_result_is_there(monkeypatch, capsys, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"metric": None, "wall_s": 3}))
    asked: dict = {}

    def fake_run(job: object, **options: object) -> None:
        asked.update(options, job=job)
        on_event = options["on_event"]
        assert callable(on_event)
        on_event({"t": 1.0, "source": "run", "event": "result", "path": str(tmp_path / "result.json")})

    monkeypatch.setattr("cloister.api.run", fake_run)
    assert main(["run", "job.toml", "--runs-dir", "elsewhere"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert asked["job"] == Path("job.toml") and asked["runs_dir"] == "elsewhere" and asked["resume"] is None
    assert main(["run", "--resume", "runs/latest", "--json"]) == 0
    assert asked["job"] is None and asked["resume"] == Path("runs/latest")
    assert json.loads(capsys.readouterr().out)["event"] == "result"


ANSWER = {"label": "red", "probability": 0.75, "probabilities": {"red": 0.75, "blue": 0.25}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    seen = SimpleNamespace(texts=None)

    def fake_predict(run_dir: Path, client: str, texts: list[str]) -> list[dict]:
        seen.texts = texts
        return [ANSWER if client == "classifier" else {"completion": " and on"} for _ in texts]

    monkeypatch.setattr("cloister.api.predict", fake_predict)
    return seen


def test_predict_prints_one_answer_a_text(asked, capsys):
    assert main(["predict", "--run", "r", "--client", "classifier", "one", "two"]) == 0
    assert capsys.readouterr().out == " 75.0 %  red  <- one\n 75.0 %  red  <- two\n"
    assert main(["predict", "--run", "r", "--client", "writer", "one"]) == 0
    assert capsys.readouterr().out == "one and on\n"
    assert main(["predict", "--run", "r", "--client", "classifier", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "one", **ANSWER}


def test_predict_reads_files(asked, tmp_path: Path, capsys):
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    assert main(["predict", "--run", "r", "--client", "classifier", "--file", str(tmp_path / "texts.txt")]) == 0
    assert asked.texts == ["one", "two"]
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n"two"\n{"prompt": "three"}\n')
    assert main(["predict", "--run", "r", "--client", "classifier", "--file", str(tmp_path / "rows.jsonl")]) == 0
    assert asked.texts == ["one", "two", "three"]
    capsys.readouterr()
    for name, content, says in [
        ("bad.jsonl", b"{", "row 1: not JSON"), ("none.jsonl", b'{"txt": 1}', "has no text"),
        ("empty.txt", b"\n", "no text"), ("latin.txt", b"\xe9", "not UTF-8"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert main(["predict", "--run", "r", "--client", "classifier", "--file", str(tmp_path / name)]) == 3
        assert says in capsys.readouterr().err
    assert main(["predict", "--run", "r", "--client", "classifier", "--file", str(tmp_path / "missing.txt")]) == 3


def test_predict_reads_pairs(asked, tmp_path: Path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"text": "one", "text_b": "two"}\n')
    argv = ["predict", "--run", "r", "--client", "classifier", "--file", str(tmp_path / "pairs.jsonl")]
    assert main(argv) == 0
    assert asked.texts == [("one", "two")]
    assert capsys.readouterr().out == " 75.0 %  red  <- one | two\n"
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "one", "text_b": "two", **ANSWER}
    (tmp_path / "pairs.jsonl").write_text('{"text": "one", "text_b": 2}\n')
    assert main(argv) == 3
    assert "text_b is no text" in capsys.readouterr().err


def test_predict_refuses_an_empty_text(asked, capsys):
    assert main(["predict", "--run", "r", "--client", "classifier", "one", "  "]) == 3
    assert asked.texts is None and "text 2 is empty" in capsys.readouterr().err


def test_wrong_arguments_exit_as_a_wrong_job_does(capsys):
    for args in ([], ["fly"], ["predict", "--run", "r"], ["run", "j", "--json", "--plain"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 2
    capsys.readouterr()


def test_help_starts_fast_and_imports_nothing_heavy():
    code = (
        "import sys, cloister.cli\n"
        "try: cloister.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'rich', 'pydantic', 'transformers', 'flwr', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "cloister quickstart" in done.stdout and "exit codes" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"cloister {cloister.__version__}\n"
