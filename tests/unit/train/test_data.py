"""Datasets: every format gives the same examples; a bad row is named with file, place, column and a hint."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloister import train
from cloister.errors import DataError
from cloister.testing import shared_dir

LABELS = ("cardiology", "oncology", "neurology")
ROWS: list[dict[str, Any]] = [
    {"text": "chest pain, at rest", "label": "cardiology", "site": {"name": "north", "n": 0}},
    {"text": 'a "lump"\nin the neck', "label": "oncology", "site": {"name": "lake", "n": 1}},
    {"text": "headache — since März", "label": "neurology", "site": {"name": "north", "n": 0}},
]
TASK = train.TaskSpec("sequence-classification", labels=LABELS)


def _write(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / f"train.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif kind in {"csv", "tsv"}:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerow(["text", "label", "site.name", "site.n"])
            writer.writerows([r["text"], r["label"], r["site"]["name"], r["site"]["n"]] for r in rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        import datasets

        path = folder / "hf"
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def _open(path: Path, task: train.TaskSpec = TASK, **options: Any) -> train.Dataset:
    columns = options.pop("columns", train.Columns())
    return train.open_dataset(path, columns=columns, task=task, **options)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "hf"])
class TestEveryFormat:
    def test_gives_the_same_examples_in_file_order_on_every_pass(self, tmp_path: Path, kind: str) -> None:
        dataset = _open(_write(tmp_path, kind))
        assert len(dataset) == 3
        for _ in range(2):
            found = list(dataset)
            assert [(e.index, e.text, e.label) for e in found] == [(i, r["text"], i) for i, r in enumerate(ROWS)]

    def test_where_looks_into_nested_columns_and_numbers_what_is_left(self, tmp_path: Path, kind: str) -> None:
        dataset = _open(_write(tmp_path, kind), where={"site.n": 0})
        assert len(dataset) == 2
        assert [(e.index, e.label) for e in dataset] == [(0, 0), (1, 2)]
        assert [e.label for e in _open(dataset.path, where={"site.name": ["lake", "sea"]})] == [1]

    def test_where_that_leaves_nothing_is_an_error(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(DataError, match=r"no row is left where site\.name = 'south'"):
            _open(_write(tmp_path, kind), where={"site.name": "south"}).check()

    def test_a_column_that_is_not_there_is_named_with_those_that_are(self, tmp_path: Path, kind: str) -> None:
        path = _write(tmp_path, kind)
        with pytest.raises(DataError, match="there is no column 'texts'") as caught:
            _open(path, columns=train.Columns(text="texts")).check()
        assert str(path) in caught.value.cause
        assert "did you mean 'text'?" in caught.value.hint
        assert "label" in caught.value.hint
        assert caught.value.path == str(path)

    def test_an_unknown_label_names_file_row_column_and_labels(self, tmp_path: Path, kind: str) -> None:
        path = _write(tmp_path, kind, [*ROWS, {**ROWS[0], "label": "cardiologie"}])
        with pytest.raises(DataError, match="column 'label' is 'cardiologie'") as caught:
            list(_open(path))
        # JSONL has a blank line between rows; the CSV's second record spans two lines, after the header.
        row = {"jsonl": 7, "csv": 6, "tsv": 6}.get(kind, 4)
        assert caught.value.row == row
        assert f"{path}, {'row' if row == 4 else 'line'} {row}" in caught.value.cause
        assert caught.value.hint == "did you mean 'cardiology'?"

    def test_an_empty_text_is_refused(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(DataError, match="column 'text' is an empty text"):
            list(_open(_write(tmp_path, kind, [*ROWS, {**ROWS[0], "text": " \n"}])))

    def test_the_fingerprint_follows_content_and_question(self, tmp_path: Path, kind: str) -> None:
        path = _write(tmp_path, kind)
        found = _open(path).fingerprint()
        assert _open(path).fingerprint() == found
        assert _open(path, where={"site.n": 0}).fingerprint() != found
        other = tmp_path / "other"
        other.mkdir()
        assert _open(_write(other, kind, ROWS[:2])).fingerprint() != found


class TestLabels:
    def test_indices_are_classes(self, write_jsonl: Callable[..., Path]) -> None:
        path = write_jsonl([{"text": "a", "label": 2}, {"text": "b", "label": "oncology"}])
        assert [e.label for e in _open(path)] == [2, 1]

    @pytest.mark.parametrize(
        ("label", "cause"),
        [
            (3, "is class 3, and the job has 3 labels"),
            (-1, "is class -1"),
            (True, "is a bool"),
            (1.0, "is a float"),
            (None, "is empty"),
            ([1], "is a list"),
            ("1", "is '1', which is not one of the job's labels"),
        ],
    )
    def test_anything_else_is_refused(self, write_jsonl: Callable[..., Path], label: Any, cause: str) -> None:
        with pytest.raises(DataError, match=cause) as caught:
            list(_open(write_jsonl([{"text": "a", "label": label}])))
        assert caught.value.hint
        assert caught.value.row == 1

    def test_csv_indices_are_text_that_reads_as_a_number(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("text,label\na,2\nb,oncology\n")
        assert [e.label for e in _open(path)] == [2, 1]
        path.write_text("text,label\na,3\n")
        with pytest.raises(DataError, match="is class 3"):
            list(_open(path))

    def test_class_label_integers_go_by_name_not_by_number(self, tmp_path: Path) -> None:
        import datasets

        # Hugging Face numbers its names in another order than the job; by number two classes would change places.
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neurology", "cardiology"])}
        )
        data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        data.save_to_disk(str(tmp_path / "hf"))
        assert [e.label for e in _open(tmp_path / "hf")] == [2, 0]

    def test_one_label_is_no_classification(self, write_jsonl: Callable[..., Path]) -> None:
        with pytest.raises(DataError, match="at least 2 labels"):
            _open(write_jsonl([{"text": "a", "label": 0}]), train.TaskSpec("sequence-classification", labels=("a",)))


class TestTasks:
    def test_a_pair_needs_both_texts(self, write_jsonl: Callable[..., Path]) -> None:
        path = write_jsonl([{"q": "a", "text": "b", "label": 0}, {"q": "c", "text": None, "label": 0}])
        dataset = _open(path, columns=train.Columns(text="q", text_b="text"))
        with pytest.raises(DataError, match="line 2: column 'text' is empty, not text"):
            list(dataset)

    def test_causal_lm_reads_prompt_and_completion_only(self, write_jsonl: Callable[..., Path]) -> None:
        path = write_jsonl([{"prompt": "Q", "completion": "A"}])
        (example,) = _open(path, train.TaskSpec("causal-lm"))
        assert (example.prompt, example.completion, example.label) == ("Q", "A", None)
        assert "Q" not in repr(example)

    def test_causal_lm_text_that_is_a_number_is_refused(self, write_jsonl: Callable[..., Path]) -> None:
        path = write_jsonl([{"prompt": "Q", "completion": 7}])
        with pytest.raises(DataError, match="column 'completion' is a int, not text"):
            list(_open(path, train.TaskSpec("causal-lm")))


class TestFiles:
    def test_a_missing_file_suggests_its_neighbour(self, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
        write_jsonl([], "train.jsonl")
        with pytest.raises(DataError, match="no such file") as caught:
            _open(tmp_path / "trian.jsonl")
        assert caught.value.hint == "did you mean 'train.jsonl'?"
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize(("name", "hint"), [("a.xlsx", "known: .jsonl"), ("a.json", "name it .jsonl")])
    def test_an_unknown_format_says_what_is_known(self, tmp_path: Path, name: str, hint: str) -> None:
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match="no known format") as caught:
            _open(tmp_path / name)
        assert hint in caught.value.hint

    def test_an_empty_file_is_an_error(self, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no example in it"):
            list(_open(write_jsonl([])))
        (tmp_path / "a.csv").write_text("")
        with pytest.raises(DataError, match="it is empty"):
            _open(tmp_path / "a.csv")

    @pytest.mark.parametrize(
        ("line", "cause"),
        [
            ('{"text": "a",}', r"line 2: not JSON: .*column"),
            ("[1]", "line 2: a JSON list, not an object"),
            ("[" * 200_000, "line 2: not JSON: nested too deeply"),
        ],
    )
    def test_broken_json_names_its_line(self, write_jsonl: Callable[..., Path], line: str, cause: str) -> None:
        with pytest.raises(DataError, match=cause):
            list(_open(write_jsonl([ROWS[0], line])))

    def test_other_encodings_name_their_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "a", "label": 0}\n{"text": "M\xe4rz", "label": 0}\n')
        with pytest.raises(DataError, match="line 2: not UTF-8") as caught:
            list(_open(path))
        assert caught.value.row == 2

    @pytest.mark.parametrize(
        ("text", "cause"),
        [
            ("text,label\na,b,0\n", "line 2: 3 fields, and the first line names 2 columns"),
            ('text,label\n"a,0\n', "line 2: not CSV"),
            ("text,text\na,b\n", "line 1: column 'text' is there twice"),
        ],
    )
    def test_broken_csv_names_its_line(self, tmp_path: Path, text: str, cause: str) -> None:
        path = tmp_path / "a.csv"
        path.write_text(text)
        with pytest.raises(DataError, match=cause):
            list(_open(path))

    def test_long_csv_fields_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text(f"text,label\n{'x' * 300_000},0\n\n")
        assert [len(e.text or "") for e in _open(path)] == [300_000]

    def test_a_truncated_parquet_file_is_an_error(self, tmp_path: Path) -> None:
        path = _write(tmp_path, "parquet")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match="cannot be read"):
            _open(path)

    def test_a_damaged_parquet_page_is_an_error(self, tmp_path: Path) -> None:
        path = _write(tmp_path, "parquet")
        blob = bytearray(path.read_bytes())
        blob[4:40] = b"\xff" * 36
        path.write_bytes(blob)
        with pytest.raises(DataError, match="cannot be read"):
            list(_open(path))

    def test_a_where_column_that_is_not_there_is_an_error(self, write_jsonl: Callable[..., Path]) -> None:
        with pytest.raises(DataError, match=r"there is no column 'clients\.natural'"):
            list(_open(write_jsonl([{"text": "a", "label": 0, "clients": {"iid": 1}}]), where={"clients.natural": 0}))

    def test_where_tells_true_from_one(self, write_jsonl: Callable[..., Path]) -> None:
        path = write_jsonl([{"text": "a", "label": 0, "x": True}, {"text": "b", "label": 0, "x": 1}])
        assert [e.text for e in _open(path, where={"x": 1})] == ["b"]

    def test_split_is_only_for_folders(self, write_jsonl: Callable[..., Path]) -> None:
        with pytest.raises(DataError, match="only for Hugging Face folders"):
            _open(write_jsonl([ROWS[0]]), split="train")


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        import datasets

        parts = {name: datasets.Dataset.from_list(ROWS) for name in ("train", "test")}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "hf"))
        return tmp_path / "hf"

    def test_a_split_is_read(self, folder: Path) -> None:
        assert len(list(_open(folder, split="test"))) == 3
        assert _open(folder, split="test").fingerprint() != _open(folder, split="train").fingerprint()

    @pytest.mark.parametrize(("split", "cause"), [(None, "several splits"), ("tset", "no split 'tset'")])
    def test_a_wrong_split_lists_those_there_are(self, folder: Path, split: str | None, cause: str) -> None:
        with pytest.raises(DataError, match=cause) as caught:
            _open(folder, split=split)
        assert "test, train" in caught.value.hint

    def test_a_plain_folder_is_no_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not a Hugging Face dataset folder"):
            _open(tmp_path)

    def test_a_single_dataset_has_no_split(self, folder: Path) -> None:
        with pytest.raises(DataError, match="it has no splits"):
            _open(folder / "train", split="train")

    def test_a_damaged_folder_is_an_error(self, folder: Path) -> None:
        for file in (folder / "train").glob("*.arrow"):
            file.write_bytes(b"not arrow")
        with pytest.raises(DataError, match="cannot be read"):
            list(_open(folder, split="train"))


def test_real_data_is_split_among_clients_without_loss() -> None:
    shared = shared_dir()
    if shared is None:
        pytest.skip("the shared data folder is not there (CLOISTER_SHARED)")
    folder = shared / "data" / "datasets" / "hoc"
    task = train.TaskSpec(
        "sequence-classification", labels=tuple(json.loads((folder / "meta.json").read_text())["labels"])
    )
    whole = _open(folder / "train.jsonl", task)
    parts = [_open(folder / "train.jsonl", task, where={"clients.natural": k}) for k in range(5)]
    assert len(whole) == sum(len(part) for part in parts) == 2733
    assert sorted(e.row for part in parts for e in part) == [e.row for e in whole]


def test_check_dataset_reads_only_the_first_rows(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([ROWS[0], ROWS[1], "broken"])
    train.check_dataset(path, columns=train.Columns(), task=TASK, n_rows=2)
    with pytest.raises(DataError, match="line 3"):
        train.check_dataset(path, columns=train.Columns(), task=TASK)
