"""A sealed shard of features on the host's disk: verified once, then read and decrypted one example at a time."""

from __future__ import annotations

import json
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from cloister.channel import ChunkedReader
from cloister.errors import DecryptionError, LimitExceededError, MalformedMessageError, ShardMismatchError
from cloister.train._boundary import BoundaryBlock, bytes_per_token, dequantize
from cloister.train._shards import Feature, ShardBody, decode_shard
from cloister.train._store import verify_shard_file

if TYPE_CHECKING:
    from cloister.train._data import TaskSpec
    from cloister.wire import Manifest, ShardEntry

ALTERED_HINT = "the client's software or the store is faulty; remove this client or let it upload anew"

_MAX_OPEN_FILES = 64  # of the 1,024 that a process usually may have
_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Opened:
    """An example of a sealed shard, decrypted and still quantised: as int8 a quarter of its float32. *secret*."""

    index: int
    block: BoundaryBlock = field(repr=False)
    label: int | None = field(default=None, repr=False)
    labels: torch.Tensor | None = field(default=None, repr=False)

    def feature(self) -> Feature:
        """The example, dequantised."""
        return Feature(self.index, dequantize(self.block), label=self.label, labels=self.labels)


class OpenFiles:
    """At most `_MAX_OPEN_FILES` open shards; the one that was used longest ago is closed first.

    Attributes:
        lock: to hold while a reader is asked for and used, since another thread's may close it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._open: OrderedDict[Path, tuple[BinaryIO, ChunkedReader]] = OrderedDict()

    def reader(self, sealed: SealedFile) -> ChunkedReader:
        if sealed.path in self._open:
            self._open.move_to_end(sealed.path)
            return self._open[sealed.path][1]
        if len(self._open) >= _MAX_OPEN_FILES:
            self._open.popitem(last=False)[1][0].close()
        file = sealed.path.open("rb")
        try:
            reader = sealed.reader(file)
        except BaseException:
            file.close()
            raise
        self._open[sealed.path] = (file, reader)
        return reader

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1][0].close()


class SealedFile:
    """One shard's ciphertext, with what opens it. The key is *secret*."""

    def __init__(self, path: Path, key: bytes, context: bytes, entry: ShardEntry, client: str) -> None:
        self.path, self.entry, self.client = path, entry, client
        self._key, self._context = key, context

    def reader(self, file: BinaryIO) -> ChunkedReader:
        return ChunkedReader(file, self._key, self._context)

    def mismatch(self, what: str) -> ShardMismatchError:
        return ShardMismatchError(
            f"shard {self.entry.name} of client {self.client} {what}", path=str(self.path), hint=ALTERED_HINT
        )

    def open_whole(self, manifest: Manifest, task: TaskSpec) -> ShardBody:
        """Verifies everything about this shard that can be verified by itself."""
        verify_shard_file(self.path, self.entry, client=self.client)
        try:
            with self.path.open("rb") as file:
                reader = self.reader(file)
                body = decode_shard(reader.read_at(0, reader.size), hidden_size=manifest.hidden_size, task=task)
        except OSError as error:
            raise self.mismatch(f"cannot be read: {error.strerror}") from None
        except DecryptionError:
            raise self.mismatch("does not open with its manifest's key at its place") from None
        except (MalformedMessageError, LimitExceededError) as error:
            raise self.mismatch(f"has a wrong body: {error.cause}") from None
        counted = {
            "examples": (len(body), self.entry.n_examples),
            "tokens": (body.n_tokens, self.entry.n_tokens),
            "boundary": (body.boundary, manifest.boundary),
        }
        for what, (found, expected) in counted.items():
            if found != expected:
                raise self.mismatch(f"holds {what} {found}, its manifest says {expected}")
        return body


class SealedShard:
    """A verified shard that stays on the disk: reads and decrypts the bytes of one example at a time."""

    def __init__(self, sealed: SealedFile, body: ShardBody, files: OpenFiles, *, is_causal: bool) -> None:
        self._sealed, self._files, self._is_causal = sealed, files, is_causal
        self._indices, self._lengths = body.indices, body.lengths
        self._classes = None if is_causal else [body.label(i) for i in range(len(body))]
        self._hidden_size, self._dtype = body.hidden_size, _DTYPES[body.boundary]
        self._bytes_per_token = bytes_per_token(body.hidden_size, body.boundary) + (8 if is_causal else 0)
        self._starts = [0, *torch.tensor(body.lengths).cumsum(0).tolist()]
        self._offsets: dict[str, int] | None = None

    def example(self, i: int) -> Feature:
        return self.open(i).feature()

    def label(self, i: int) -> int | None:
        return self._classes[i] if self._classes else None

    def opened_bytes(self, i: int) -> int:
        return self._lengths[i] * self._bytes_per_token

    def open(self, i: int) -> Opened:
        try:
            with self._files.lock:
                return self._open(self._files.reader(self._sealed), i)
        except OSError as error:
            raise self._sealed.mismatch(f"cannot be read any more: {error.strerror}") from None
        except (DecryptionError, LimitExceededError):
            raise self._sealed.mismatch("was altered after it had been verified") from None

    def _open(self, reader: ChunkedReader, i: int) -> Opened:
        start, n = self._starts[i], self._lengths[i]
        values = self._read(reader, "values", self._dtype, start * self._hidden_size, n * self._hidden_size)
        scales = self._read(reader, "scales", torch.float32, start, n) if self._dtype is torch.int8 else None
        block = BoundaryBlock(values.view(n, self._hidden_size), scales)
        if self._is_causal:
            return Opened(self._indices[i], block, labels=self._read(reader, "labels", torch.int64, start, n))
        # The label was verified with the rest of the shard, so it need not be read again.
        return Opened(self._indices[i], block, label=self.label(i))

    def _read(self, reader: ChunkedReader, name: str, dtype: torch.dtype, first: int, count: int) -> torch.Tensor:
        if self._offsets is None:
            self._offsets = _tensor_offsets(reader)
        raw = reader.read_at(self._offsets[name] + first * dtype.itemsize, count * dtype.itemsize)
        # A bytearray, because torch wants memory that it may write to.
        return torch.frombuffer(bytearray(raw), dtype=dtype)


def _tensor_offsets(reader: ChunkedReader) -> dict[str, int]:
    """Where each tensor begins in a safetensors body that `decode_shard` has accepted."""
    (n_header,) = struct.unpack("<Q", reader.read_at(0, 8))
    header: dict[str, Any] = json.loads(reader.read_at(8, n_header))
    return {name: 8 + n_header + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
