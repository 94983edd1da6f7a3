"""The course of a comparison with a runner that answers at once: order, resume, failures, refusals, files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import stat
from pathlib import Path

import pytest

from cloister.api import compare
from cloister.api._compare import run_in_process
from cloister.api._compare_files import MethodFolder
from cloister.api._compare_jobs import METHODS, derive_job
from cloister.api._compare_table import CSV_COLUMNS
from cloister.api._compare_work import Order
from cloister.config import load_job
from cloister.errors import CloisterError, ConfigError, DataError, FederationError
from cloister.testing import write_tiny_job

from ._fake_runs import WRONG, FakeRunner

pytest.importorskip("scipy", reason="the extra evaluate is not installed")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_tiny_job(tmp_path)


def run(job: Path | None, tmp_path: Path, runner: FakeRunner, **options):
    return compare(job, out=tmp_path / "out", runner=runner, **options)


def test_every_method_with_every_seed_in_turning_order(job: Path, tmp_path: Path):
    runner, events = FakeRunner(), []
    done = run(job, tmp_path, runner, seeds=[0, 1], on_event=events.append)
    assert runner.names == [f"{name}-0" for name in METHODS] + [f"{name}-1" for name in reversed(METHODS)]
    assert [order.job.training.seed for order in runner.orders] == [0] * 6 + [1] * 6
    assert done.folder == (tmp_path / "out" / "tiny").resolve() and done.failed == []

    rows = {row["method"]: row for row in done.table["rows"]}
    assert done.table["reference"] == "fedavg" and done.table["metric"] == "accuracy"
    for name, row in rows.items():
        assert row["status"] == "done" and row["seeds"] == [0, 1]
        assert row["figure"]["value"] == pytest.approx(1 - (WRONG[name] + 0.5) / 18)
        assert row["figure"]["low"] <= row["figure"]["value"] <= row["figure"]["high"]
    assert "pair" not in rows["fedavg"]
    assert rows["method2-lora"]["pair"]["difference"] == pytest.approx(3 / 18)
    assert rows["method2-lora"]["pair_over_seeds"]["n"] == 2
    assert rows["method2-lora"]["p_corrected"] >= rows["method2-lora"]["pair"]["p_value"]
    assert rows["central"]["enclave_peak_bytes"] is None and rows["method1-lora"]["accelerator_bytes"] == 5000
    assert set(rows["central"]["per_client"]) == {"alpha", "beta"}

    told = [(e["status"], e.get("method"), e["n_done"]) for e in events if e["event"] == "compare"]
    assert told[0] == ("plan", None, 0) and told[1] == ("begin", "central", 0) and told[-1][2] == 12
    assert sum(event["event"] == "step" for event in events) == 12


def test_the_files(job: Path, tmp_path: Path):
    done = run(job, tmp_path, FakeRunner(), seeds=[0])
    assert json.loads((done.folder / "compare.json").read_text()) == json.loads(json.dumps(done.table))
    rows = list(csv.DictReader(io.StringIO((done.folder / "compare.csv").read_text())))
    assert [row["method"] for row in rows] == list(METHODS) and tuple(rows[0]) == CSV_COLUMNS
    assert rows[1]["difference"] == "" and rows[4]["reference"] == "fedavg"
    page = (done.folder / "compare.html").read_text()
    assert "ne seed: intervals over examples only" in page and "<script" not in page
    for path in done.folder.rglob("*.json"):  # labels and predictions of all clients
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_what_is_finished_is_kept(job: Path, tmp_path: Path):
    first = FakeRunner(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, first, seeds=[0])
    half = tmp_path / "out" / "tiny" / "method1-prefix-0"
    (half / "runs").mkdir()
    second, events = FakeRunner(), []
    done = run(job, tmp_path, second, seeds=[0], on_event=events.append)
    assert first.names + second.names == [f"{name}-0" for name in METHODS]
    assert not (half / "runs").exists(), "half a run was continued"
    kept = [event["method"] for event in events if event.get("status") == "kept"]
    assert kept == list(METHODS)[:3] and [row["status"] for row in done.table["rows"]] == ["done"] * 6


def test_resume_takes_job_methods_seeds_and_settings_from_the_folder(job: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeRunner(stop_at=1), methods=["central", "method2-spf"], seeds=[3, 4],
            lr={"method2-spf": 0.5})  # fmt: skip
    runner = FakeRunner()
    compare(resume=tmp_path / "out" / "tiny", runner=runner)
    assert runner.names == ["method2-spf-3", "method2-spf-4", "central-4"]
    assert [order.job.training.lr for order in runner.orders] == [0.5, 0.5, 0.01]


def test_later_calls_add_methods_and_seeds(job: Path, tmp_path: Path):
    run(job, tmp_path, FakeRunner(), methods=["fedavg"], seeds=[0])
    runner = FakeRunner()
    done = run(job, tmp_path, runner, methods=["fedavg", "method2-lora"], seeds=[0, 1])
    assert runner.names == ["method2-lora-0", "method2-lora-1", "fedavg-1"]
    assert [row["seeds"] for row in done.table["rows"]] == [[0, 1], [0, 1]]


def test_a_method_that_fails_is_noted_and_tried_again(job: Path, tmp_path: Path):
    events: list[dict] = []
    done = run(job, tmp_path, FakeRunner(failing=("fedavg",)), seeds=[0], on_event=events.append)
    [row] = done.failed
    assert (row["method"], row["reason"]) == ("fedavg", "its weights are gone")
    assert done.table["reference"] == "central"
    assert "no result of fedavg: differences are to central" in done.table["notes"]
    [told] = [event for event in events if event.get("status") == "failed"]
    assert (told["code"], told["exit_code"], told["hint"]) == ("model", 4, "look for them")
    assert json.loads((done.folder / "fedavg-0" / "failure.json").read_text())["code"] == "model"

    again = FakeRunner()
    done = run(job, tmp_path, again, seeds=[0])
    assert again.names == ["fedavg-0"] and done.failed == [] and done.table["reference"] == "fedavg"
    assert not (done.folder / "fedavg-0" / "failure.json").exists()


def test_without_any_peer_there_are_no_differences(job: Path, tmp_path: Path):
    done = run(job, tmp_path, FakeRunner(failing=("method2-spf",)), methods=["method2-lora", "method2-spf"], seeds=[0])
    assert done.table["reference"] is None
    assert any("there are no differences" in note for note in done.table["notes"])
    assert (done.folder / "compare.html").is_file()


def test_nothing_but_failures_still_ends_in_a_table(job: Path, tmp_path: Path):
    done = run(job, tmp_path, FakeRunner(failing=("central",)), methods=["central"], seeds=[0])
    assert [row["status"] for row in done.table["rows"]] == ["failed"]
    assert "its weights are gone" in (done.folder / "compare.html").read_text()


def test_a_method_that_cannot_be_is_left_out(tmp_path: Path):
    job = write_tiny_job(tmp_path, sections="")
    job.write_text(job.read_text().replace("[task]\n", "[task]\nmax_length = 500\n"))
    runner, events = FakeRunner(), []
    done = run(job, tmp_path, runner, seeds=[0], on_event=events.append)
    assert "method1-prefix-0" not in runner.names and done.failed == []
    [row] = [row for row in done.table["rows"] if row["method"] == "method1-prefix"]
    assert row["status"] == "unavailable" and "do not fit the model's 512 positions" in row["reason"]
    assert [event["method"] for event in events if event.get("status") == "unavailable"] == ["method1-prefix"]
    with pytest.raises(ConfigError, match="method1-prefix cannot run this job"):
        run(job, tmp_path, runner, methods=["method1-prefix"])


def test_perplexity_and_completions(tmp_path: Path):
    pytest.importorskip("rouge_score", reason="the extra evaluate is not installed")
    job = write_tiny_job(tmp_path, task="causal-lm", family="llama")
    runner = FakeRunner()
    done = run(job, tmp_path, runner, methods=["fedavg", "method2-lora"], seeds=[0, 1], generate=12)
    assert {order.generate for order in runner.orders} == {12}
    peer, ours = done.table["rows"]
    assert ours["figure"]["value"] == pytest.approx((5 * 6) ** 0.5)
    assert ours["figure"]["low"] < ours["figure"]["value"] < ours["figure"]["high"]
    assert ours["pair_over_seeds"]["difference"] > 0 and "pair" not in ours
    assert 0 < peer["exact_match"]["value"] < ours["exact_match"]["value"] < 1
    assert ours["rouge_l"]["value"] > peer["rouge_l"]["value"]
    page = (done.folder / "compare.html").read_text()
    assert "ROUGE-L" in page and "ntervals over 2 seeds" in page

    one = compare(job, out=tmp_path / "one", runner=FakeRunner(), methods=["fedavg", "central"], seeds=[5])
    assert one.table["rows"][0]["figure"]["low"] is None
    assert "one seed: perplexity has no interval; two seeds or more give one" in one.table["notes"]


def test_another_job_in_the_same_folder_is_refused(job: Path, tmp_path: Path):
    run(job, tmp_path, FakeRunner(), methods=["central"], seeds=[0])
    text = job.read_text()
    job.write_text(text.replace("lr = 0.01", "lr = 0.03\nseed = 8"))  # the seed is the comparison's, and no change
    with pytest.raises(ConfigError, match=r"another job: training.lr was 0.01, and is 0.03$") as caught:
        run(job, tmp_path, FakeRunner())
    assert "--out" in caught.value.hint
    job.write_text(text)
    with pytest.raises(ConfigError, match=r"another job: lr.central was None, and is 0.2"):
        run(job, tmp_path, FakeRunner(), lr={"central": 0.2})
    with (tmp_path / "beta-train.jsonl").open("a") as file:
        file.write('{"text": "the sea", "label": "blue"}\n')
    with pytest.raises(ConfigError, match=r"another job: data.beta/train has changed$"):
        run(job, tmp_path, FakeRunner())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ["lora"]}, "no method is called 'lora'"),
        ({"seeds": []}, "no seed was chosen"),
        ({"seeds": [1, 1]}, "the seed 1 is listed twice"),
        ({"seeds": [-1]}, "-1 is no seed"),
        ({"generate": 5}, "sequence-classification generates nothing"),
        ({"generate": -1}, "-1 prompts"),
        ({"lr": {"central": 0.0}}, "0.0 is no learning rate for central"),
        ({"lr": {"lora": 0.1}}, "no method is called 'lora'"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_arguments_are_refused_before_anything_is_run(job: Path, tmp_path: Path, options: dict, said: str):
    runner = FakeRunner()
    with pytest.raises(ConfigError, match=said) as caught:
        run(job, tmp_path, runner, **options)
    assert caught.value.hint or "listed twice" in said
    assert not runner.orders and not (tmp_path / "out").exists()


def test_no_job_and_no_comparison(tmp_path: Path):
    with pytest.raises(ConfigError, match="no job"):
        compare(runner=FakeRunner())
    with pytest.raises(ConfigError, match="holds no comparison"):
        compare(resume=tmp_path, runner=FakeRunner())


def test_a_job_without_test_data_is_refused(job: Path, tmp_path: Path):
    job.write_text("\n".join(line for line in job.read_text().splitlines() if not line.startswith("test =")))
    with pytest.raises(ConfigError, match="no client has held-out data"):
        run(job, tmp_path, FakeRunner())


def test_an_empty_test_file_is_refused(job: Path, tmp_path: Path):
    (tmp_path / "alpha-test.jsonl").write_text("")
    with pytest.raises(DataError, match=r"alpha-test\.jsonl"):
        run(job, tmp_path, FakeRunner())


def test_missing_libraries_are_said_before_anything_is_run(job: Path, tmp_path: Path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    runner = FakeRunner()
    with pytest.raises(CloisterError, match="comparing needs scikit-learn") as caught:
        run(job, tmp_path, runner)
    assert "cloister[evaluate]" in caught.value.hint and not runner.orders


def test_two_at_once_are_refused(job: Path, tmp_path: Path):
    class Second(FakeRunner):
        def __call__(self, order, folder, on_event):
            with pytest.raises(ConfigError, match="another `cloister compare` works in"):
                run(job, tmp_path, FakeRunner())
            return super().__call__(order, folder, on_event)

    run(job, tmp_path, Second(), methods=["central"], seeds=[0])


def test_a_result_that_cannot_be_read_is_named(job: Path, tmp_path: Path):
    done = run(job, tmp_path, FakeRunner(), methods=["central"], seeds=[0])
    (done.folder / "central-0" / "result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"result\.json cannot be read") as caught:
        run(job, tmp_path, FakeRunner(), methods=["central"], seeds=[0])
    assert "remove it" in caught.value.hint


def test_an_order_survives_its_way(job: Path):
    order = Order("fedavg", 3, derive_job(load_job(job), "fedavg", 3), 7)
    assert Order.from_dict(json.loads(json.dumps(order.as_dict()))) == order
    assert order.name == "fedavg-3"


def _process(tmp_path: Path, job: Path, monkeypatch, code: str):
    """`run_in_process` with another program in place of ours."""
    folder = MethodFolder(tmp_path / "one")
    folder.make_anew()
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, json, pathlib\nfolder = pathlib.Path(sys.argv[2])\norder = json.load(sys.stdin)\n" + code
    )
    import cloister.api._compare as module

    class Child(module.Child):
        def __init__(self, name, argv, **options):
            super().__init__(name, [argv[0], str(program), *argv[3:]], **options)

    monkeypatch.setattr(module, "Child", Child)
    events: list[dict] = []
    order = Order("central", 0, derive_job(load_job(job), "central", 0))
    return lambda: (run_in_process(order, folder, events.append), events)


TELL = "say = lambda **e: (folder / 'events.jsonl').open('a').write(json.dumps({'t': 1, **e}) + '\\n')\n"


def test_a_processs_events_and_result_come_back(job: Path, tmp_path: Path, monkeypatch):
    code = TELL + "say(source='run', event='step')\n(folder / 'result.json').write_text(json.dumps(order['seed']))"
    found, events = _process(tmp_path, job, monkeypatch, code)()
    assert found == 0 and [event["event"] for event in events] == ["step"]


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (TELL + "say(source='compare/x', event='error', code='data', cause='row 3', hint='fix it')\nsys.exit(3)",
         DataError, "row 3"),
        (TELL + "say(source='compare/x', event='error', code='bug', cause='a bug', hint='')\nsys.exit(70)",
         CloisterError, "central-0 met a bug"),
        ("import os\nos.kill(os.getpid(), 9)", FederationError, "central-0 was killed by signal 9"),
        ("sys.exit(0)", FederationError, "central-0 ended with 0"),
    ],
    ids=["error", "bug", "killed", "no-result"],
)  # fmt: skip
def test_how_a_process_failed_is_told(job: Path, tmp_path: Path, monkeypatch, code: str, error, said: str):
    with pytest.raises(error, match=said) as caught:
        _process(tmp_path, job, monkeypatch, code)()
    assert caught.value.hint
