"""The pad keys of a process: made when it starts, stored nowhere, one for each job, layer and direction."""

from __future__ import annotations

import os
import threading
from enum import StrEnum

from cloister.errors import PadExhaustedError
from cloister.pad._guard import ProcessBound
from cloister.pad._stream import KEY_BYTES, PadStream, derive_key


class Direction(StrEnum):
    """Which product the pads of a stream are for."""

    FORWARD = "forward"
    BACKWARD = "backward"


class PadKeys(ProcessBound):
    """The key of one job at a time, and under it a stream for each layer and direction. Thread-safe.

    The job key is 32 bytes of os.urandom, and no caller can give another: a restarted process and a restored copy of
    any file have other pads. It cannot be copied or pickled, and refuses to work in a forked child.
    """

    __slots__ = ("_key", "_lock", "_n_jobs", "_streams")

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._key = bytearray()
        self._n_jobs = 0
        self._streams: dict[tuple[str, Direction], PadStream] = {}
        self.new_job()

    def __repr__(self) -> str:
        return f"PadKeys(n_jobs={self._n_jobs}, n_streams={len(self._streams)})"

    def new_job(self) -> None:
        """Retire every stream and start over with a fresh key.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._lock:
            self._retire()
            self._n_jobs += 1
            self._key[:] = os.urandom(KEY_BYTES)

    def stream(self, layer: str, direction: Direction) -> PadStream:
        """The pads of a layer and direction in this job: one stream, with one ledger, however often asked for.

        Args:
            layer: *public*, the layer's name in the model.
            direction: *public*.

        Raises:
            PadReuseError: in a forked process.
            PadExhaustedError: after `close`.
        """
        self._stay_home()
        with self._lock:
            if not self._key:
                raise PadExhaustedError("the pad keys were closed")
            found = self._streams.get((layer, direction))
            if found is None:
                labels = (b"stream", self._n_jobs.to_bytes(8, "big"), layer.encode(), direction.encode())
                found = self._streams[layer, direction] = PadStream(bytearray(derive_key(self._key, *labels)))
            return found

    def close(self) -> None:
        """Retire every stream and zero the job's key. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._lock:
            self._retire()
            self._key.clear()

    def _retire(self) -> None:
        for stream in self._streams.values():
            stream.retire()
        self._streams.clear()
        self._key[:] = bytes(len(self._key))
