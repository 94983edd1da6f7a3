"""The near side's run over a client's own text: once through the frozen blocks, quantised, sealed, and on the store.

Memory is bounded by one window of text, one batch, and one shard, whatever the size of the data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

from cloister import channel, wire
from cloister.errors import CloisterError, DataError, StoreError
from cloister.train._boundary import Boundary, BoundaryBlock
from cloister.train._data import Dataset, Example, TaskSpec
from cloister.train._encoder import NearCallable, NearEncoder, label_tensor
from cloister.train._journal import Journal, ShardRecord
from cloister.train._shards import ShardBuilder, shard_context
from cloister.train._store import ShardStore, as_store_errors, verify_shard_file
from cloister.train._text import Tokenised

_log = logging.getLogger(__name__)

SHARD_MAX_BYTES = 64 << 20
SPLITS = ("train", "test")
_KEY_BYTES = 32
_WORK_HINT = "check the permissions of the run folder"


class NearRun:
    """Runs a client's datasets through the near side once and puts sealed shards on the store.

    A run that was interrupted goes on behind its last whole shard; one that was finished gives the same manifest again
    and computes nothing. Any change of data, job, boundary or near side starts anew, under a fresh key.
    """

    def __init__(
        self,
        near: NearCallable,
        tokenizer: Any,
        task: TaskSpec,
        *,
        work_dir: str | Path,
        store: ShardStore,
        run_id: str,
        client: str,
        job_sha384: bytes,
        boundary: Boundary = "int8",
        batch_size: int = 32,
        window: int = 512,
        shard_max_bytes: int = SHARD_MAX_BYTES,
        model_max_length: int | None = None,
        near_digest: bytes = b"",
        on_progress: Callable[[int, int, int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            near: the frozen near side.
            tokenizer: of transformers, the backbone's.
            task: labels, length limit.
            work_dir: private folder of this client in this run: journal with the feature key, shards not yet stored.
            store: where sealed shards go.
            run_id, client, job_sha384: bound into every shard and into the manifest.
            boundary: "int8", "bf16" or "fp32".
            batch_size: examples per forward pass.
            window: examples that are sorted by length together.
            shard_max_bytes: largest shard body, unless one example alone is larger.
            model_max_length: positions that the backbone has.
            near_digest: identifies backbone and cut, so that another one starts anew.
            on_progress: called with (examples done, examples in all, bytes on the store) after every batch.
            stop: set it to end the run after the current batch.
        """
        self._encoder = NearEncoder(
            near, tokenizer, task, boundary=boundary, batch_size=batch_size, model_max_length=model_max_length
        )
        self._window = window
        self._shard_max_bytes = shard_max_bytes
        self._work_dir = Path(work_dir)
        self._store = store
        self._run_id, self._client, self._job_sha384 = run_id, client, job_sha384
        self._near_digest = near_digest
        self._on_progress = on_progress or (lambda _done, _total, _bytes: None)
        self._stop = stop or threading.Event()

    def run(self, datasets: Mapping[str, Dataset]) -> wire.Manifest:
        """Everything to the store; afterwards the manifest names every shard, train first.

        Nothing is written to the store before every row of every dataset has been read and found usable.

        Args:
            datasets: "train" and, if there is one, "test".

        Raises:
            DataError: a row cannot be used, or a text is over the limit.
            StoreFullError: no space on the store or in `work_dir`; what was complete is kept.
            StoreError: the store or `work_dir` cannot be used.
            CloisterError: `stop` was set.
        """
        ordered = {split: datasets[split] for split in SPLITS if split in datasets}
        if ordered.keys() != datasets.keys() or "train" not in ordered:
            raise DataError(f"datasets are {sorted(datasets)}, expected train and test")
        with as_store_errors("cannot use the work folder", self._work_dir, hint=_WORK_HINT):
            self._work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fingerprint = self._fingerprint(ordered)
        journal = self._journal(ordered, fingerprint)
        self._progress(journal, 0)
        for split, dataset in ordered.items():
            self._run_split(split, dataset, journal)
        return self._manifest(journal)

    def _fingerprint(self, datasets: Mapping[str, Dataset]) -> str:
        facts = {
            "run_id": self._run_id,
            "client": self._client,
            "job": self._job_sha384.hex(),
            "near": self._near_digest.hex(),
            "task": asdict(self._encoder.task),
            "limit": self._encoder.text.limit,
            "boundary": self._encoder.boundary,
            # These three decide which examples share a batch and a shard.
            "batching": [self._encoder.batch_size, self._window, self._shard_max_bytes],
            "data": {split: dataset.fingerprint() for split, dataset in datasets.items()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _journal(self, datasets: Mapping[str, Dataset], fingerprint: str) -> Journal:
        path = self._work_dir / "journal"
        journal = Journal.load(path, fingerprint)
        if journal is None:
            totals = {split: self._survey(dataset) for split, dataset in datasets.items()}
            journal = Journal.begin(path, fingerprint, key=secrets.token_bytes(_KEY_BYTES), totals=totals)
        else:
            self._catch_up(journal, fingerprint)
        self._remove_leftovers({self._sealed_path(record.name) for record in journal.shards})
        return journal

    def _remove_leftovers(self, keep: set[Path]) -> None:
        """Ciphertext that an earlier run left and that no journal names."""
        with as_store_errors("cannot tidy the work folder", self._work_dir, hint=_WORK_HINT):
            for left in (*self._work_dir.glob("shard-*.part"), *self._work_dir.glob("shard-*.sealed")):
                if left not in keep:
                    left.unlink(missing_ok=True)

    def _survey(self, dataset: Dataset) -> int:
        """Number of examples, every one of them found usable."""
        total = 0
        for window in _windows(dataset, self._window):
            self._check_stop()
            total += len(window)
            if self._encoder.task.on_too_long == "error":
                self._encoder.text.encode(window, place=dataset.place)
        return total

    def _catch_up(self, journal: Journal, fingerprint: str) -> None:
        """Finish what an interruption left between sealed and stored; forget shards that are gone."""
        for number, record in enumerate(journal.shards):
            is_there = self._store.exists(record.name, record.n_bytes)
            if not is_there and not self._is_sealed(record):
                _log.warning("shard %s is neither on the store nor here: made again from there on", record.name)
                journal.keep(number, fingerprint)
                return
            self._put(journal, record, is_there=is_there)

    def _is_sealed(self, record: ShardRecord) -> bool:
        path = self._sealed_path(record.name)
        if path.is_file():
            try:
                verify_shard_file(path, _entry(record))
            except StoreError:
                return False
            return True
        return False

    def _run_split(self, split: str, dataset: Dataset, journal: Journal) -> None:
        n_done = sum(record.n_examples for record in journal.of_split(split))
        if n_done == journal.totals[split]:
            return
        shard = _OpenShard(self, split, journal)
        position = 0
        for window in _windows(dataset, self._window):
            if position + len(window) <= n_done:
                position += len(window)
                continue
            for batch in self._encoder.window(window, dataset.place):
                # Counted from the start in the order of processing, which the fingerprint fixes: whatever lies before
                # n_done is in a whole shard. A batch that it cuts through is computed again, for equal bits.
                n_skipped = min(max(n_done - position, 0), len(batch))
                position += len(batch)
                if n_skipped < len(batch):
                    self._check_stop()
                    for item, block in list(zip(batch, self._encoder.blocks(batch), strict=True))[n_skipped:]:
                        shard.add(item, block)
                    self._progress(journal, shard.n_examples)
        if position != journal.totals[split]:
            raise DataError(
                f"{dataset.path}: it had {journal.totals[split]} examples and now has {position}",
                path=str(dataset.path),
                hint="something writes to it during the run; run again when it is complete",
            )
        shard.close()
        self._progress(journal, 0)

    def _seal(self, builder: ShardBuilder, record: dict[str, Any], journal: Journal) -> None:
        temporary = self._work_dir / f"shard-{record['split']}-{record['index']}.part"
        context = shard_context(self._run_id, self._client, record["split"], record["index"])
        try:
            with as_store_errors("cannot write a shard", temporary, hint=_WORK_HINT):
                with temporary.open("xb") as file:
                    writer = channel.ChunkedWriter(cast(BinaryIO, file), journal.key, context)
                    builder.write_to(writer.write)
                    writer.close()
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self._sealed_path(writer.sha256))
        finally:
            temporary.unlink(missing_ok=True)
        sealed = ShardRecord(**record, name=writer.sha256, n_bytes=writer.n_bytes)
        journal.add_sealed(sealed)
        self._put(journal, sealed, is_there=self._store.exists(sealed.name, sealed.n_bytes))

    def _put(self, journal: Journal, record: ShardRecord, *, is_there: bool) -> None:
        path = self._sealed_path(record.name)
        if not is_there:
            self._store.put_file(record.name, path)
        if record.name not in journal.stored:
            journal.add_stored(record.name)
        path.unlink(missing_ok=True)

    def _sealed_path(self, name: str) -> Path:
        return self._work_dir / f"shard-{name}.sealed"

    def _progress(self, journal: Journal, n_open: int) -> None:
        n_done = sum(record.n_examples for record in journal.shards) + n_open
        n_bytes = sum(record.n_bytes for record in journal.shards if record.name in journal.stored)
        self._on_progress(n_done, sum(journal.totals.values()), n_bytes)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise CloisterError(
                f"the near side of {self._client} was stopped", hint="`cloister run --resume` goes on from here"
            )

    def _manifest(self, journal: Journal) -> wire.Manifest:
        return wire.Manifest(
            run_id=self._run_id,
            client=self._client,
            job_sha384=self._job_sha384,
            feature_key=journal.key,
            hidden_size=journal.shards[0].hidden_size,
            boundary=self._encoder.boundary,
            task=self._encoder.task.name,
            shards=tuple(_entry(record) for record in journal.shards),
            n_truncated=sum(record.n_truncated for record in journal.shards),
        )


class _OpenShard:
    """The shard that is being filled; closes itself when the next example does not fit."""

    def __init__(self, run: NearRun, split: str, journal: Journal) -> None:
        self._run = run
        self._split = split
        self._journal = journal
        self._builder: ShardBuilder | None = None
        self._n_truncated = 0
        self._hidden_size = 0

    @property
    def n_examples(self) -> int:
        return 0 if self._builder is None else self._builder.n_examples

    def add(self, item: Tokenised, block: BoundaryBlock) -> None:
        if self._builder is not None and self._builder.size_with(block.n_tokens) > self._run._shard_max_bytes:
            self.close()
        if self._builder is None:
            self._hidden_size = int(block.values.shape[1])
            encoder = self._run._encoder
            self._builder = ShardBuilder(encoder.boundary, encoder.task, self._hidden_size)
        self._builder.add(item.index, block, item.label, label_tensor(item))
        self._n_truncated += item.truncated

    def close(self) -> None:
        if self._builder is None:
            return
        record = {
            "split": self._split,
            "index": len(self._journal.of_split(self._split)),
            "n_examples": self._builder.n_examples,
            "n_tokens": self._builder.n_tokens,
            "n_truncated": self._n_truncated,
            "hidden_size": self._hidden_size,
        }
        self._run._seal(self._builder, record, self._journal)
        self._builder, self._n_truncated = None, 0


def _entry(record: ShardRecord) -> wire.ShardEntry:
    split = cast(wire.Split, record.split)
    return wire.ShardEntry(record.name, record.n_bytes, record.n_examples, record.n_tokens, split)


def _windows(dataset: Iterable[Example], size: int) -> Iterator[list[Example]]:
    examples = iter(dataset)
    while window := list(itertools.islice(examples, size)):
        yield window
