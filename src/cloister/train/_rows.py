"""Rows of the file formats that a client's data may have, one at a time and in file order.

One class a format. They know nothing of tasks: `_data.py` turns rows into examples.
"""

from __future__ import annotations

import csv
import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow.parquet as pq

_BATCH_ROWS = 256
_MAX_FIELD_BYTES = 1 << 27
"""Longest line or CSV field. Python's own default of 128 KiB for a field is below a long clinical note."""


def open_rows(path: Path, split: str | None) -> RowSource:
    """The reader for a path, by its name.

    Raises:
        DataError: nothing is there, it cannot be read, or the format is unknown.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or "paths are relative to the job file's folder"
        raise DataError(f"{path}: no such file or folder", path=str(path), hint=hint)
    if path.is_dir():
        return _FolderRows(path, split)
    if split is not None:
        hint = "name one file per split instead"
        raise DataError(f"{path}: `split` is only for Hugging Face folders", path=str(path), hint=hint)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        hint = f"known: {', '.join(_KINDS)}, or a folder written by datasets' save_to_disk"
        if path.suffix.lower() == ".json":
            hint = "write one JSON object a line and name it .jsonl"
        raise DataError(f"{path}: files named *{path.suffix} are of no known format", path=str(path), hint=hint)
    return kind(path)


class RowSource(ABC):
    """Rows of one file.

    Attributes:
        path: the file or folder.
        name: which part of it, for the fingerprint.
        unit: what a row is called in messages ("line" where a text editor shows its number).
        is_untyped: every value is text (CSV).
    """

    unit = "row"
    is_untyped = False
    name = ""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def read(self, names: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(row number, values) of every row; values hold at least the named columns, if the file has them."""

    def count(self) -> int:
        """How many rows there are."""
        return sum(1 for _ in self.read([]))

    def column_names(self) -> list[str] | None:
        """Columns of the whole file, None where each row has its own (JSONL)."""
        return None

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises DataError for the first name that the file does not have."""
        found = self.column_names()
        for name in names if found is not None else []:
            if name not in (found or []) and name.split(".")[0] not in (found or []):
                raise missing_column(self, name, found or [])

    def files(self) -> list[Path]:
        """What the rows are read from, sorted."""
        return [self.path]

    def plain(self, name: str, value: Any) -> Any:
        """A value as its owner meant it, where the format stores it in another form."""
        return value

    def broken(self, row: int, what: str, hint: str) -> DataError:
        return DataError(f"{self.path}, {self.unit} {row}: {what}", path=str(self.path), row=row, hint=hint)

    def unreadable(self, error: Exception) -> DataError:
        why = (str(error) or type(error).__name__).splitlines()[0]
        return DataError(f"{self.path}: cannot be read: {why}", path=str(self.path), hint="is the file whole?")


class _JsonLines(RowSource):
    unit = "line"

    def read(self, names: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for row, line in _lines(self):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", "nested too deeply")
                at = f" (column {error.colno} of the line)" if isinstance(error, json.JSONDecodeError) else ""
                raise self.broken(row, f"not JSON: {why}{at}", "write one JSON object a line") from None
            if not isinstance(values, dict):
                found = type(values).__name__
                raise self.broken(row, f"a JSON {found}, not an object", "write one JSON object a line")
            yield row, values

    def count(self) -> int:
        return sum(1 for _, line in _lines(self) if line.strip())


class _Csv(RowSource):
    unit = "line"
    is_untyped = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._header = self._read_header()

    def _read_header(self) -> list[str]:
        header = next(self._records(), (1, []))[1]
        if not header:
            raise DataError(f"{self.path}: it is empty", path=str(self.path), hint="the first line names the columns")
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise self.broken(1, f"column {min(twice)!r} is there twice", "give every column its own name")
        return header

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(line on which it starts, fields) of every record, the header among them."""
        if csv.field_size_limit() < _MAX_FIELD_BYTES:
            csv.field_size_limit(_MAX_FIELD_BYTES)
        reader = csv.reader((line for _, line in _lines(self)), delimiter=self._delimiter, strict=True)
        start = 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = 'a field with a comma, a quote or a line break stands in quotes, and " inside it is written ""'
                raise self.broken(start, f"not CSV: {error}", hint) from None
            yield start, fields
            start = reader.line_num + 1

    def read(self, names: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        records = self._records()
        next(records, None)
        for row, fields in records:
            if not fields:
                continue
            if len(fields) != len(self._header):
                what = f"{len(fields)} fields, and the first line names {len(self._header)} columns"
                raise self.broken(row, what, "put fields that hold a comma in quotes")
            yield row, dict(zip(self._header, fields, strict=True))

    def column_names(self) -> list[str]:
        return self._header


class _Parquet(RowSource):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._open() as file:
            self._columns: list[str] = list(file.schema_arrow.names)
            self._n_rows = int(file.metadata.num_rows)

    def _open(self) -> pq.ParquetFile:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self.unreadable(error) from None

    def read(self, names: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        import pyarrow

        wanted = _top_level([name for _, name in names], self._columns)
        row = 0
        with self._open() as file:
            try:
                # One row group at a time is decoded; the writer's row group size bounds the memory.
                for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                    for values in batch.to_pylist():
                        row += 1
                        yield row, values
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise self.unreadable(error) from None

    def count(self) -> int:
        return self._n_rows

    def column_names(self) -> list[str]:
        return self._columns


class _FolderRows(RowSource):
    """A folder written by Hugging Face's `Dataset.save_to_disk` or `DatasetDict.save_to_disk`; memory-mapped."""

    def __init__(self, path: Path, split: str | None) -> None:
        super().__init__(path)
        self.name = split or ""
        self._folder = self._part(split)
        self._data = self._load()

    def _part(self, split: str | None) -> Path:
        if (self.path / "dataset_dict.json").is_file():
            parts = sorted(p.name for p in self.path.iterdir() if (p / "dataset_info.json").is_file())
            guess = did_you_mean(split, parts) if split else ""
            hint = "; ".join(filter(None, (guess, f"the splits there are: {listed(parts)}")))
            if split is None:
                raise DataError(f"{self.path}: it has several splits", path=str(self.path), hint=f"set `split`; {hint}")
            if split not in parts:
                raise DataError(f"{self.path}: there is no split {split!r}", path=str(self.path), hint=hint)
            return self.path / split
        if not (self.path / "dataset_info.json").is_file():
            hint = "expected a folder written by datasets' save_to_disk, or a .jsonl, .csv or .parquet file"
            raise DataError(f"{self.path}: not a Hugging Face dataset folder", path=str(self.path), hint=hint)
        if split is not None:
            hint = "leave `split` out"
            raise DataError(f"{self.path}: it has no splits, it is one dataset", path=str(self.path), hint=hint)
        return self.path

    def _load(self) -> datasets.Dataset:
        import datasets
        import pyarrow

        try:
            # keep_in_memory=False: rows are paged in from disk as they are read.
            return datasets.Dataset.load_from_disk(str(self._folder), keep_in_memory=False)
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise self.unreadable(error) from None

    def read(self, names: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        wanted = _top_level([name for _, name in names], self._data.column_names)
        row = 0
        if not wanted:
            yield from ((number + 1, {}) for number in range(len(self._data)))
            return
        for table in self._data.select_columns(wanted).with_format("arrow").iter(_BATCH_ROWS):
            for values in table.to_pylist():  # pyright: ignore[reportAttributeAccessIssue]
                row += 1
                yield row, values

    def count(self) -> int:
        return len(self._data)

    def column_names(self) -> list[str]:
        return self._data.column_names

    def files(self) -> list[Path]:
        return sorted(p for p in self._folder.iterdir() if p.suffix in {".arrow", ".json"})

    def plain(self, name: str, value: Any) -> Any:
        # A ClassLabel's integers count its own names, whose order need not be the job's.
        names = getattr(self._data.features.get(name), "names", None)
        if names is not None and isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return value


_KINDS: dict[str, type[RowSource]] = {
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".csv": _Csv,
    ".tsv": _Csv,
    ".parquet": _Parquet,
}


def lookup(values: Mapping[str, Any], name: str) -> Any:
    """Value of a column; a dotted name that is no column itself looks into nested objects.

    Raises:
        KeyError: it is not there.
    """
    if name in values:
        return values[name]
    found: Any = values
    for part in name.split("."):
        if not isinstance(found, Mapping):
            raise KeyError(name)
        found = found[part]
    return found


def missing_column(rows: RowSource, name: str, found: Sequence[str], *, row: int | None = None) -> DataError:
    """The error for a column that is not there; the hint lists those that are."""
    where = f"{rows.path}" if row is None else f"{rows.path}, {rows.unit} {row}"
    hint = "; ".join(filter(None, (did_you_mean(name, found), f"the columns there are: {listed(found)}")))
    return DataError(f"{where}: there is no column {name!r}", path=str(rows.path), row=row, hint=hint)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A suggestion for a mistyped name, empty if nothing is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Names for a hint, cut where there are many."""
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _lines(rows: RowSource) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end) of every line. Decoded line by line, so that an error names its line."""
    try:
        with rows.path.open("rb") as file:
            row = 0
            while raw := file.readline(_MAX_FIELD_BYTES + 1):
                row += 1
                if len(raw) > _MAX_FIELD_BYTES:
                    raise rows.broken(row, f"longer than {_MAX_FIELD_BYTES >> 20} MiB", "write one example a line")
                try:
                    yield row, raw.decode("utf-8-sig" if row == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise rows.broken(row, "not UTF-8 text", "save the file as UTF-8") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(
            f"{rows.path}: cannot be read: {why}", path=str(rows.path), hint="check its permissions"
        ) from None


def _top_level(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    wanted = {name if name in columns else name.split(".")[0] for name in names}
    return [name for name in columns if name in wanted]
