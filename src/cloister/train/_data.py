"""What a job's data is: the column map, the task, one example, and datasets read in file order with bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cloister.errors import DataError
from cloister.train._rows import RowSource, did_you_mean, listed, lookup, missing_column, open_rows

TaskName = Literal["causal-lm", "sequence-classification"]
Pooling = Literal["mean", "cls", "last"]

MIN_LABELS = 2


@dataclass(frozen=True)
class Columns:
    """Which column of a client's file holds what. Only the columns that the task uses are looked for.

    Attributes:
        text: the text to classify.
        text_b: the second text of a pair; None where there is only one.
        label: the class, as an index into `TaskSpec.labels` or as one of its strings.
        prompt: what the model is given (causal-lm).
        completion: what the model should answer; the loss is on this part only (causal-lm).
    """

    text: str = "text"
    text_b: str | None = None
    label: str = "label"
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass(frozen=True)
class TaskSpec:
    """What the tuned model is for. Public: every party of a run agrees on it.

    Attributes:
        name: "sequence-classification" or "causal-lm".
        labels: class names in the order of their indices; empty for causal-lm.
        pooling: which position the classification head reads.
        max_length: longest example in tokens; None for the backbone's own limit.
        on_too_long: refuse an example over the limit, or cut it and count it.
    """

    name: TaskName
    labels: tuple[str, ...] = ()
    pooling: Pooling = "mean"
    max_length: int | None = None
    on_too_long: Literal["error", "truncate"] = "error"


@dataclass(frozen=True)
class Example:
    """One example of a client's own data. *secret*: its client host and the near side on it.

    Attributes:
        index: position in the dataset after filtering, from 0.
        row: where it stands in its file, for error messages.
        text, text_b, label: set for sequence-classification.
        prompt, completion: set for causal-lm.
    """

    index: int
    row: int
    text: str | None = field(default=None, repr=False)
    text_b: str | None = field(default=None, repr=False)
    label: int | None = field(default=None, repr=False)
    prompt: str | None = field(default=None, repr=False)
    completion: str | None = field(default=None, repr=False)


class Dataset:
    """A client's examples in file order, read anew on every pass and never held in memory as a whole.

    Made by `open_dataset`. Every pass checks every row that it yields.

    Attributes:
        path: the file or folder.
        columns, task: as given.
    """

    def __init__(self, rows: RowSource, columns: Columns, task: TaskSpec, where: Mapping[str, Any]) -> None:
        self._rows = rows
        self._where = dict(where)
        self._length: int | None = None
        self.path = rows.path
        self.columns = columns
        self.task = task

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r})"

    def __len__(self) -> int:
        """Number of examples; the first call may read the file once."""
        if self._length is None:
            if self._where:
                self._length = sum(1 for _ in self._matching(self._names("where")))
            else:
                self._length = self._rows.count()
        return self._length

    def __iter__(self) -> Iterator[Example]:
        """Yields the examples that `where` leaves, in file order.

        Raises:
            DataError: a row cannot be used, or no row is left at all.
        """
        index = 0
        for row, values in self._matching(self._names("all")):
            yield self._example(index, row, values)
            index += 1
        if index == 0:
            raise self._empty()
        self._length = index

    def check(self, n_rows: int = 64) -> None:
        """Read the first `n_rows` examples, so that a wrong column or label is found before anything is started.

        Raises:
            DataError
        """
        for example in self:
            if example.index + 1 >= n_rows:
                return

    def place(self, example: Example) -> str:
        """Where an example stands, for messages: "train.jsonl, line 17"."""
        return f"{self.path}, {self._rows.unit} {example.row}"

    def fingerprint(self) -> str:
        """Hex SHA-256 over the files' bytes and over what is read from them; equal means: the same examples.

        *secret*: stays in the client's own journal, since it would confirm a guess of the data.
        """
        asked = json.dumps([asdict(self.columns), asdict(self.task), self._rows.name, self._where], sort_keys=True)
        digest = hashlib.sha256(asked.encode())
        try:
            for file in self._rows.files():
                digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as reader:
                    digest.update(hashlib.file_digest(reader, "sha256").digest())
        except OSError as error:
            raise self._rows.unreadable(error) from None
        return digest.hexdigest()

    def _names(self, which: Literal["where", "all"]) -> list[tuple[str, str]]:
        """(what it is for, column name) of every column that is read."""
        names = [(f"where.{name}", name) for name in self._where]
        if which == "all":
            names += needed_columns(self.columns, self.task)
        return names

    def _matching(self, names: list[tuple[str, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for row, values in self._rows.read(names):
            if all(_matches(self._value(row, values, key), wanted, self._rows) for key, wanted in self._where.items()):
                yield row, values

    def _value(self, row: int, values: Mapping[str, Any], name: str) -> Any:
        try:
            return lookup(values, name)
        except KeyError:
            raise missing_column(self._rows, name, list(values), row=row) from None

    def _example(self, index: int, row: int, values: Mapping[str, Any]) -> Example:
        columns = self.columns
        if self.task.name == "causal-lm":
            prompt, completion = (self._text(row, values, name) for name in (columns.prompt, columns.completion))
            return Example(index, row, prompt=prompt, completion=completion)
        text = self._text(row, values, columns.text)
        text_b = None if columns.text_b is None else self._text(row, values, columns.text_b)
        return Example(index, row, text=text, text_b=text_b, label=self._label(row, values))

    def _text(self, row: int, values: Mapping[str, Any], name: str) -> str:
        value = self._value(row, values, name)
        if not isinstance(value, str):
            found = "empty" if value is None else f"a {type(value).__name__}"
            raise self._bad(row, name, f"is {found}, not text", "fill it in, or leave the row out")
        if not value.strip():
            raise self._bad(row, name, "is an empty text", "fill it in, or leave the row out")
        return value

    def _label(self, row: int, values: Mapping[str, Any]) -> int:
        name, labels = self.columns.label, self.task.labels
        value = self._rows.plain(name, self._value(row, values, name))
        if isinstance(value, str):
            if value in labels:
                return labels.index(value)
            # CSV has no numbers, so a class index arrives as text.
            if not (self._rows.is_untyped and value.strip().isdecimal()):
                hint = did_you_mean(value, labels) or f"the job's labels are: {listed(labels)}"
                raise self._bad(row, name, f"is {value[:60]!r}, which is not one of the job's labels", hint)
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            found = "empty" if value is None else f"a {type(value).__name__}"
            raise self._bad(row, name, f"is {found}, not a class", "give the label's text, or its index from 0")
        if not 0 <= value < len(labels):
            hint = f"indices count from 0; the job's labels are: {listed(labels)}"
            raise self._bad(row, name, f"is class {value}, and the job has {len(labels)} labels", hint)
        return value

    def _bad(self, row: int, name: str, what: str, hint: str) -> DataError:
        cause = f"{self.path}, {self._rows.unit} {row}: column {name!r} {what}"
        return DataError(cause, path=str(self.path), row=row, hint=hint)

    def _empty(self) -> DataError:
        if self._where:
            shown = ", ".join(f"{name} = {value!r}" for name, value in self._where.items())
            hint = "look at the values in that column, or drop the filter"
            return DataError(f"{self.path}: no row is left where {shown}", path=str(self.path), hint=hint)
        return DataError(f"{self.path}: there is no example in it", path=str(self.path), hint="is it the right file?")


def open_dataset(
    path: str | Path,
    *,
    columns: Columns,
    task: TaskSpec,
    split: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Dataset:
    """The examples in a JSONL, CSV or Parquet file, or in a folder that Hugging Face's `save_to_disk` wrote.

    Args:
        path: the file or folder; the format follows from the name.
        columns: which column holds what.
        task: what to look for; its labels give the class indices.
        split: which part of a Hugging Face DatasetDict; only for such folders.
        where: keeps only rows in which each named column equals the value (or one of a list of values). A dotted name
            looks into nested objects: `{"clients.natural": 0}`.

    Raises:
        DataError: the file is not there, is of an unknown format, or lacks a column.
    """
    rows = open_rows(Path(path), split)
    if task.name == "sequence-classification" and len(task.labels) < MIN_LABELS:
        raise DataError(
            f"{path}: sequence-classification needs at least {MIN_LABELS} labels", hint='set `labels = ["...", "..."]`'
        )
    dataset = Dataset(rows, columns, task, where or {})
    rows.check_columns([name for _, name in dataset._names("all")])
    return dataset


def check_dataset(
    path: str | Path,
    *,
    columns: Columns,
    task: TaskSpec,
    split: str | None = None,
    where: Mapping[str, Any] | None = None,
    n_rows: int = 64,
) -> None:
    """Fail early: the file is there, has the columns, and its first `n_rows` examples can be used.

    Raises:
        DataError: names the file, row and column.
    """
    open_dataset(path, columns=columns, task=task, split=split, where=where).check(n_rows)


def needed_columns(columns: Columns, task: TaskSpec) -> list[tuple[str, str]]:
    """(key in the job's `columns`, column name) of what this task reads."""
    keys = ("prompt", "completion") if task.name == "causal-lm" else ("text", "text_b", "label")
    return [(key, name) for key in keys if (name := getattr(columns, key)) is not None]


def _matches(value: Any, wanted: Any, rows: RowSource) -> bool:
    if isinstance(wanted, list | tuple):
        return any(_matches(value, one, rows) for one in wanted)
    if rows.is_untyped and not isinstance(wanted, str):
        return value.strip().lower() == str(wanted).lower()
    # In Python True == 1; in data they are two things.
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
