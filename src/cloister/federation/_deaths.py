"""How often the processes of a relay died, and when that is hopeless."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloister.errors import RelayError

MAX_DEATHS, DEATH_WINDOW_S = 6, 60.0
"""A process that died more often than this within this time will not live the next time either."""


class Deaths:
    """Counts deaths by process name and tells of each restart that follows.

    Args:
        on_event: gets {"event": "restart", "process": name, "attempt": n}.
        logs: folder of the processes' logs, for the hint.
    """

    def __init__(
        self, on_event: Callable[[dict[str, Any]], None], logs: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_event = on_event
        self._logs = logs
        self._clock = clock
        self._times: dict[str, list[float]] = {}
        self._n_restarts: dict[str, int] = {}

    def count(self, name: str) -> None:
        """One more death of `name`, which is about to be started again.

        Raises:
            RelayError: it dies too often.
        """
        now = self._clock()
        self._times[name] = [t for t in self._times.get(name, []) if now - t < DEATH_WINDOW_S] + [now]
        n_deaths = len(self._times[name])
        if n_deaths > MAX_DEATHS:
            raise RelayError(
                f"{name} of the relay died {n_deaths} times within {DEATH_WINDOW_S:g} s",
                peer=name,
                hint=f"see the logs in {self._logs}",
            )
        self._n_restarts[name] = self._n_restarts.get(name, 0) + 1
        self._on_event({"event": "restart", "process": name, "attempt": self._n_restarts[name]})
