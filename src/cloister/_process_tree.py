"""Peak memory of a tree of processes, from the kernel's own counters."""

from __future__ import annotations

import re
import threading
from pathlib import Path


class TreeWatch:
    """Peak memory of a process and all its descendants, sampled from the kernel's own counters in a thread.

    Resident set sizes count a page once for every process that maps it, so the sum is an upper bound; it is the same
    bound for both sides of a comparison, and it can be read of a process that is not dumpable.

    Args:
        pid: root of the tree.
        itself: count the root too.

    Attributes:
        largest_bytes: of the largest process.
        sum_bytes: of all at once.
        by_process: high-water mark by process, named by id and command.
    """

    EVERY_S = 0.5

    def __init__(self, pid: int, *, itself: bool = True) -> None:
        self._pid = pid
        self._itself = itself
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tree-watch", daemon=True)
        self.largest_bytes = 0
        self.sum_bytes = 0
        self.by_process: dict[str, int] = {}

    def __enter__(self) -> TreeWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            total = 0
            for pid in _tree(self._pid)[0 if self._itself else 1 :]:
                status = _read(f"/proc/{pid}/status")
                total += _kib(status, "VmRSS")
                peak = _kib(status, "VmHWM")
                name = re.search(r"^Name:\s*(.+)$", status, re.MULTILINE)
                key = f"{pid} {name.group(1) if name else '?'}"
                self.by_process[key] = max(self.by_process.get(key, 0), peak)
                self.largest_bytes = max(self.largest_bytes, peak)
            self.sum_bytes = max(self.sum_bytes, total)


def _tree(root: int) -> list[int]:
    """The process and its descendants, from one look at /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (fields := _read(path / "stat").rpartition(")")[2].split()):
            children.setdefault(int(fields[1]), []).append(int(path.name))
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += children.get(pid, [])
    return found


def _kib(status: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
