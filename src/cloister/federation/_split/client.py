"""A client's part of Method 2: the frozen near side over its own text, sealed features, and the manifest of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloister._files import write_whole
from cloister.errors import CloisterError, MalformedMessageError
from cloister.wire import Manifest, PrepareProgress, PrepareRequest, RecordMessage

if TYPE_CHECKING:
    from cloister.federation._plan import SplitClientPlan
    from cloister.train import NearRun


class NearWork:
    """Runs the near side in a thread of its own, once, when the server first asks.

    Args:
        near_run: makes the run from where progress goes and what stops it.
        emit: tells this institution's own people.
    """

    def __init__(
        self,
        plan: SplitClientPlan,
        near_run: Callable[[Callable[[int, int, int], None], threading.Event], NearRun],
        *,
        emit: Callable[..., None],
    ) -> None:
        self._plan = plan
        self._near_run = near_run
        self._emit = emit
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._worker: threading.Thread | None = None
        self._progress = (0, 0, 0)
        self._manifest: Manifest | None = None
        self._failure: CloisterError | None = None

    def stop(self) -> None:
        """Ends the near side at its next batch; what is sealed is kept."""
        self._stop.set()

    def keep_release(self, release: bytes) -> None:
        """Writes `release.safetensors` beside the report."""
        write_whole(self._plan.work / "release.safetensors", release)

    def serve(self, message: RecordMessage) -> RecordMessage:
        """The manifest, or progress where `patience_s` passes first."""
        if not isinstance(message, PrepareRequest):
            raise MalformedMessageError(f"a client of this method does not answer {message.KIND}")
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="near-run", daemon=True)
            self._worker.start()
        self._idle.wait(timeout=message.patience_s)
        if self._failure is not None:
            raise self._failure
        return self._manifest or PrepareProgress(*self._progress)

    def _work(self) -> None:
        try:
            self._manifest = self._near_run(self._tell_progress, self._stop).run(self._plan.datasets)
        except CloisterError as error:
            self._failure = error
        finally:
            self._idle.set()

    def _tell_progress(self, n_done: int, n_total: int, n_bytes: int) -> None:
        self._progress = (n_done, n_total, n_bytes)
        self._emit("progress", client=self._plan.name, n_done=n_done, n_total=n_total, n_bytes=n_bytes)
