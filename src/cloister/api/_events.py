"""Events: what a person may follow of a run. One JSON object a line, never a secret."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


class EventFile:
    """Appends events to a file; each process of a run has its own."""

    def __init__(self, path: Path, source: str) -> None:
        self._source = source
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def emit(self, event: str, **fields: Any) -> None:
        """Writes one event. `fields` are public by the job's own declaration."""
        self.append({"t": round(time.time(), 3), "source": self._source, "event": event, **fields})

    def append(self, event: Event) -> None:
        """Writes an event that another process made, as it is."""
        self._file.write(json.dumps(event, separators=(",", ":")) + "\n")

    def close(self) -> None:
        self._file.close()


class EventTail:
    """Reads what other processes append to their event files, in whole lines."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}

    def skip(self, path: Path) -> None:
        """Starts at the file's present end: what it holds is of an earlier start of the run."""
        self._offsets[path] = path.stat().st_size if path.exists() else 0

    def read(self, path: Path) -> list[Event]:
        """Every whole line that is new since the last call."""
        offset = self._offsets.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                chunk = file.read()
        except FileNotFoundError:
            return []
        end = chunk.rfind(b"\n") + 1
        self._offsets[path] = offset + end
        return [json.loads(line) for line in chunk[:end].splitlines() if line.strip()]
