"""Opening the examples of coming steps while the current one computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from cloister.train._features import ExampleKey, Features
    from cloister.train._sealed_shard import Opened
    from cloister.train._shards import Feature


class ReadAhead:
    """Examples in an order that is known beforehand; one thread reads and decrypts those that lie sealed on the disk.

    Opened examples wait quantised, at most `source.ahead_bytes` of them (a larger one waits alone), and become float32
    when they are taken, in the caller's thread: a tensor operation in a second thread would bring a second team of
    compute threads along. Examples in memory are not touched before they are taken, and where all of them are, there
    is no thread. What comes out is the same with and without one.

    A context manager; leaving it ends the thread.

        with ReadAhead(source, keys) as ahead:
            features = ahead.take(keys[:16])

    Args:
        source: *secret*; where examples come from.
        keys: the examples in the order in which they will be taken; iterated in the thread.
    """

    def __init__(self, source: Features, keys: Iterable[ExampleKey]) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._ready: deque[tuple[ExampleKey | None, Opened | BaseException]] = deque()
        self._n_bytes = 0  # of what is ready, and of what is being opened
        self._stopped = False
        self._worker: threading.Thread | None = None
        if source.ahead_bytes:
            self._worker = threading.Thread(target=self._work, args=(keys,), name="read-ahead", daemon=True)
            self._worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, keys: Sequence[ExampleKey]) -> list[Feature]:
        """The next examples, which must be those that were announced.

        Raises:
            ShardMismatchError: a shard was altered on the disk after it had been verified; at the example that it was
                found at, as without reading ahead.
        """
        return [self._take(key) for key in keys]

    def close(self) -> None:
        """Ends the thread, after the example that it is at. What it has opened is dropped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
        self._ready.clear()

    def _take(self, key: ExampleKey) -> Feature:
        if self._worker is None or not self._source.is_sealed(key):
            return self._source.get(key)
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._stopped)
            if not self._ready:
                raise RuntimeError("an example was taken that had not been announced")
            due, found = self._ready.popleft()
            if isinstance(found, BaseException):
                self._stopped = True
                raise found
            if due != key:
                raise RuntimeError("examples were taken in another order than announced")
            self._n_bytes -= self._source.opened_bytes(key)
            self._changed.notify_all()
        return found.feature()

    def _work(self, keys: Iterable[ExampleKey]) -> None:
        try:
            for key in keys:
                if not self._source.is_sealed(key):
                    continue
                if not self._has_room(self._source.opened_bytes(key)):
                    return
                self._put(key, self._source.open(key))
        except BaseException as error:
            self._put(None, error)  # raised where its example is taken
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _has_room(self, n_bytes: int) -> bool:
        """Waits until so many bytes may be opened; False where nothing more is wanted."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not self._n_bytes or self._n_bytes + n_bytes <= self._source.ahead_bytes
            )
            self._n_bytes += n_bytes
            return not self._stopped

    def _put(self, key: ExampleKey | None, found: Opened | BaseException) -> None:
        with self._changed:
            self._ready.append((key, found))
            self._changed.notify_all()
