"""Reads one table of a policy file, collecting every problem with its key path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, cast

from cloister.errors import Problem

_MAX_LIST = 1024
_HEX = re.compile(r"[0-9a-f]*")


class TableReader:
    """A table whose keys are asked for one by one; `finish` then reports the keys that nobody asked for.

    Every method returns a usable value even where the file is wrong, so that reading goes on and finds the rest.

    Args:
        values: the table as `tomllib` parsed it.
        path: its key path, empty for the document.
        problems: where problems go; shared by all readers of a file.
    """

    def __init__(self, values: dict[str, Any], path: str, problems: list[Problem]) -> None:
        self._values = values
        self._path = path
        self._problems = problems
        self._known: set[str] = set()

    def problem(self, key: str, cause: str, *, hint: str = "") -> None:
        """Record a problem of `key` in this table."""
        self._problems.append(Problem(f"{self._path}.{key}" if self._path else key, cause, hint))

    def has(self, key: str) -> bool:
        """Whether the table names `key`; asking makes the key known."""
        self._known.add(key)
        return key in self._values

    def table(self, key: str) -> TableReader:
        """The sub-table `key`, empty where it is missing."""
        path = f"{self._path}.{key}" if self._path else key
        value: object = self._values[key] if self.has(key) else {}
        if not isinstance(value, dict):
            self.problem(key, "must be a table")
            value = {}
        return TableReader(cast("dict[str, Any]", value), path, self._problems)

    def boolean(self, key: str, *, default: bool) -> bool:
        """true or false."""
        value: object = self._values[key] if self.has(key) else default
        if not isinstance(value, bool):
            self.problem(key, "must be true or false")
            return default
        return value

    def integer(self, key: str, *, minimum: int, maximum: int) -> int | None:
        """A whole number of the range, or None where it is missing."""
        if not self.has(key):
            return None
        value: object = self._values[key]
        # A TOML boolean is a Python int; it is no number here.
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            allowed = str(minimum) if minimum == maximum else f"a whole number from {minimum} to {maximum}"
            self.problem(key, f"must be {allowed}")
            return minimum
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, empty where it is missing."""
        return self._texts(key) or ()

    def choices(self, key: str, allowed: Iterable[str], *, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """A list of words out of `allowed`."""
        names = tuple(allowed)
        values = self._texts(key)
        if values is None:
            return default
        for value in values:
            if value not in names:
                self.problem(key, f'"{value}" is not known', hint="one of " + ", ".join(names))
        return tuple(value for value in values if value in names)

    def hex_list(self, key: str, *, n_bytes: int) -> tuple[str, ...] | None:
        """Values of `n_bytes` bytes in lower-case hex; None, which is not the same as [], where it is missing."""
        values = self._texts(key)
        if values is None:
            return None
        lowered = tuple(value.lower() for value in values)
        for value in lowered:
            if len(value) != 2 * n_bytes or not _HEX.fullmatch(value):
                self.problem(key, f"every value must be {2 * n_bytes} hex digits")
        return lowered

    def hex_bytes(self, key: str, n_bytes: int) -> bytes:
        """One value of `n_bytes` bytes in hex; zeros where it is missing."""
        value: object = self._values[key] if self.has(key) else "00" * n_bytes
        if not isinstance(value, str) or len(value) != 2 * n_bytes or not _HEX.fullmatch(value.lower()):
            self.problem(key, f"must be {2 * n_bytes} hex digits")
            return bytes(n_bytes)
        return bytes.fromhex(value)

    def finish(self) -> None:
        """Report every key of the table that was never asked for."""
        for key in self._values:
            if key not in self._known:
                close = difflib.get_close_matches(key, self._known, n=1)
                self.problem(key, "unknown key", hint=f"did you mean {close[0]}?" if close else "")

    def _texts(self, key: str) -> tuple[str, ...] | None:
        if not self.has(key):
            return None
        value: object = self._values[key]
        items = cast("list[object]", value) if isinstance(value, list) else [None]
        if len(items) > _MAX_LIST or not all(isinstance(item, str) for item in items):
            self.problem(key, f"must be a list of at most {_MAX_LIST} texts")
            return ()
        return tuple(cast("list[str]", items))
