"""Bad input: an error that names it and a hint, the exit code of its branch, no traceback, nothing half-written."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister import run
from cloister.api import Programs
from cloister.cli import main
from cloister.errors import DataError, ShardMismatchError, StoreFullError
from cloister.testing import FakeRelay, write_tiny_job

TRAINING = "epochs = 1\nbatch_size = 8"


def _edit(job: Path, old: str, new: str) -> None:
    text = job.read_text()
    assert old in text
    job.write_text(text.replace(old, new, 1))


def _without_file(job: Path) -> None:
    (job.parent / "alpha-train.jsonl").unlink()


def _without_column(job: Path) -> None:
    rows = [json.loads(line) for line in (job.parent / "beta-test.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"note": row["text"], "label": row["label"]}) + "\n" for row in rows)
    (job.parent / "beta-test.jsonl").write_text(text)


def _unknown_family(job: Path) -> None:
    config = json.loads((job.parent / "model" / "config.json").read_text())
    (job.parent / "model" / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))


def _cut_outside(job: Path) -> None:
    _edit(job, "[model]\n", "[model]\ncut_layer = 9\n")


def _one_name_twice(job: Path) -> None:
    _edit(job, 'name = "beta"', 'name = "alpha"')


def _no_tokenizer(job: Path) -> None:
    for path in (job.parent / "model").glob("*tokeni*"):
        path.unlink()


def _unknown_key(job: Path) -> None:
    _edit(job, "[training]", "[training]\nlearning_rate = 1.0")


@pytest.mark.parametrize(
    ("spoil", "code", "names"),
    [
        (_without_file, 3, "alpha-train.jsonl"),
        (_without_column, 3, "'text'"),
        (_unknown_family, 4, "t5"),
        (_cut_outside, 4, "cut_layer 9"),
        (_one_name_twice, 2, "'alpha'"),
        (_no_tokenizer, 4, "tokenizer"),
        (_unknown_key, 2, "training.learning_rate"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).strip("_"),
)
def test_found_before_anything_starts(spoil: Callable[[Path], None], code: int, names: str, tmp_path, capsys):
    job = write_tiny_job(tmp_path, training=TRAINING)
    spoil(job)
    assert main(["run", str(job), "--runs-dir", str(tmp_path / "runs"), "--plain"]) == code
    said = capsys.readouterr().err
    assert "error:" in said and names in said and "hint:" in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


def test_every_problem_is_reported_at_once(tmp_path, capsys):
    job = write_tiny_job(tmp_path, training=TRAINING)
    for spoil in (_one_name_twice, _unknown_key):
        spoil(job)
    assert main(["run", str(job), "--runs-dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "clients[1].name" in said and "training.learning_rate" in said


def test_a_port_that_is_taken(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        job = write_tiny_job(tmp_path, training=TRAINING, sections=f"[federation]\nport = {port}\n")
        assert main(["run", str(job), "--runs-dir", str(tmp_path / "runs"), "--plain"]) == 8
    said = capsys.readouterr().err
    assert f"port {port}" in said and "hint:" in said and "Traceback" not in said


def test_a_text_over_the_limit(tmp_path):
    job = write_tiny_job(tmp_path, clients=("beta",), training=TRAINING)
    with (tmp_path / "beta-train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "sea " * 2000, "label": "blue"}) + "\n")
    with pytest.raises(DataError) as caught:
        run(job, runs_dir=tmp_path / "runs", programs=Programs(relay=FakeRelay))
    assert "beta-train.jsonl" in caught.value.cause and "25" in caught.value.cause
    assert caught.value.hint and caught.value.exit_code == 3


def test_a_shard_altered_by_one_byte(tmp_path):
    altered: list[str] = []
    lock = threading.Lock()

    def relay(run_dir: Path, **kwargs) -> FakeRelay:
        made = FakeRelay(run_dir, **kwargs)

        def tamper(client: str, way: str, blob: bytes) -> bytes:
            with lock:  # one thread a client
                for path in sorted((run_dir.parent / "inbox").glob("?" * 64)):
                    if not altered:
                        data = bytearray(path.read_bytes())
                        data[len(data) // 2] ^= 1
                        path.write_bytes(data)
                        altered.append(path.name)
            return blob

        made.tamper = tamper
        return made

    job = write_tiny_job(tmp_path, clients=("alpha",), training=TRAINING, sections="[federation]\npatience_s = 0.2\n")
    with pytest.raises(ShardMismatchError) as caught:
        run(job, runs_dir=tmp_path / "runs", programs=Programs(relay=relay))
    assert altered[0] in caught.value.cause
    assert not (tmp_path / "runs" / "latest" / "result.json").exists()


def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path):
    """The store has no room for the second shard of one client; with room again, the run is resumed."""
    client = (sys.executable, "-c", _FULL_DISK)
    job = write_tiny_job(tmp_path, clients=("alpha",), training=TRAINING)
    with pytest.raises(StoreFullError) as caught:
        run(job, runs_dir=tmp_path / "runs", programs=Programs(client=client, relay=FakeRelay))
    assert "no space" in caught.value.cause.lower() and caught.value.hint and caught.value.exit_code == 7
    inbox = tmp_path / "runs" / "latest" / "inbox"
    assert all(len(path.name) == 64 for path in inbox.iterdir()), "an unfinished file was left"
    result = run(resume=tmp_path / "runs" / "latest", programs=Programs(relay=FakeRelay))
    assert result.result["n_examples"]["alpha"]["train"] == 24


_FULL_DISK = """
import errno, os, pathlib, runpy, shutil
count = [0]
def full(real):
    def call(target, *rest):
        if "/inbox/" in str(target) or any("/inbox/" in str(part) for part in rest):
            count[0] += 1
            if count[0] > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(target, *rest)
    return call
pathlib.Path.hardlink_to = full(pathlib.Path.hardlink_to)
shutil.copyfile = full(shutil.copyfile)
runpy.run_module("cloister.api._client_main", run_name="__main__")
"""
