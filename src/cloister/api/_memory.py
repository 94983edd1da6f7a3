"""Peak memory of every process of a run, as the kernel counts it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

_HIGH_WATER = re.compile(rb"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_EVERY_S = 0.5


class MemoryWatch:
    """Keeps the highest resident set size seen per role, over all processes that played it."""

    def __init__(self) -> None:
        self.peak_rss_bytes: dict[str, int] = {}
        self._last = 0.0

    def sample(self, pids: Mapping[str, list[int]]) -> None:
        """Reads the kernel's own high-water mark; at most twice a second."""
        if time.monotonic() - self._last < _EVERY_S:
            return
        self._last = time.monotonic()
        for role, numbers in pids.items():
            for pid in numbers:
                self.peak_rss_bytes[role] = max(self.peak_rss_bytes.get(role, 0), peak_rss_bytes(pid))


def peak_rss_bytes(pid: int) -> int:
    """High-water mark of one process, 0 if it is gone."""
    try:
        found = _HIGH_WATER.search(Path(f"/proc/{pid}/status").read_bytes())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0
