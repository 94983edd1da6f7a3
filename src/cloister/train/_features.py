"""The features that the far side trains on: all clients' sealed shards, verified once, read in any order."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import torch

from cloister.channel import ChunkedReader
from cloister.errors import DecryptionError, LimitExceededError, MalformedMessageError, ShardMismatchError
from cloister.train._boundary import BoundaryBlock, dequantize
from cloister.train._shards import Feature, ShardBody, decode_shard, shard_entries
from cloister.train._store import verify_shard_file

if TYPE_CHECKING:
    from cloister.train._data import TaskSpec
    from cloister.wire import Manifest, ShardEntry

SPLITS = ("train", "test")

_MAX_OPEN_FILES = 64  # of the 1,024 that a process usually may have
_ALTERED_HINT = "the client's software or the store is faulty; remove this client or let it upload anew"
_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, order=True, slots=True)
class ExampleKey:
    """Which example: the client's name, "train" or "test", and the example's index at that client."""

    client: str
    split: str
    index: int


class _Holder(Protocol):
    def example(self, i: int) -> Feature: ...


class _Place(NamedTuple):
    holder: _Holder
    position: int
    n_tokens: int


class Features:
    """Examples of several clients in canonical order: by client name, then by index at the client.

    The features are *secret*: only the server enclave holds one of these. Names and counts are not.

    Attributes:
        clients: names, sorted.
        fingerprint: hex SHA-256 that identifies exactly these examples; checkpoints are bound to it.
    """

    def __init__(self, places: Mapping[ExampleKey, _Place], clients: Iterable[str], fingerprint: str) -> None:
        self.clients = tuple(sorted(clients))
        self.fingerprint = fingerprint
        self._places = places
        self._splits = {split: sorted(key for key in places if key.split == split) for split in SPLITS}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self._splits[split])} {split}" for split in SPLITS)
        return f"{type(self).__name__}({len(self.clients)} clients, {counts})"

    def split(self, split: str) -> list[ExampleKey]:
        """The examples of a split, in canonical order."""
        return list(self._splits[split])

    def get(self, key: ExampleKey) -> Feature:
        """One example, dequantised; `hidden` is the caller's own.

        Raises:
            ShardMismatchError: its shard was altered on the disk after it had been verified.
        """
        place = self._places[key]
        return place.holder.example(place.position)

    def n_tokens(self, key: ExampleKey) -> int:
        """Length of an example, without opening it."""
        return self._places[key].n_tokens

    def n_examples(self, split: str = "train") -> dict[str, int]:
        """Examples of each client, 0 for one that has none in this split."""
        found = Counter(key.client for key in self._splits[split])
        return {client: found[client] for client in self.clients}

    def only(self, client: str) -> Features:
        """The same test examples, and of the training examples those of one client: what it could learn alone."""
        kept = {key: place for key, place in self._places.items() if key.split != "train" or key.client == client}
        return Features(kept, self.clients, hashlib.sha256(f"{self.fingerprint}/only/{client}".encode()).hexdigest())


class MemoryFeatures(Features):
    """Features that are in memory already: `parts[client][split]` lists them. For comparisons without sealing."""

    def __init__(self, parts: Mapping[str, Mapping[str, Sequence[Feature]]]) -> None:
        places: dict[ExampleKey, _Place] = {}
        digest = hashlib.sha256()
        for client in sorted(parts):
            for split in sorted(parts[client]):
                holder = _List(parts[client][split])
                for i, feature in enumerate(holder.features):
                    places[ExampleKey(client, split, feature.index)] = _Place(holder, i, len(feature.hidden))
                    digest.update(f"{client}/{split}/{feature.index}/{len(feature.hidden)}\n".encode())
        super().__init__(places, parts, digest.hexdigest())


class _List:
    def __init__(self, features: Sequence[Feature]) -> None:
        self.features = features

    def example(self, i: int) -> Feature:
        return self.features[i]


class FeatureSource(Features):
    """All clients' sealed shards, opened for training.

    Making one verifies every shard: name and size against the manifest, every ciphertext chunk under the client's key
    and the shard's place, the body's form, its counts against the manifest, and that no example comes twice. The
    folder belongs to the untrusted host, so nothing that is read from it is believed.

    As many shards as fit stay in memory, still quantised. The others stay sealed on the disk, and of those only the
    few kilobytes that hold one example are decrypted when it is asked for.

    Args:
        parts: each client's manifest, and the folder that has its shards.
        task: which labels there must be.
        memory_budget_bytes: most bytes of opened shards in memory, one shard that is being verified included; a
            single shard larger than this is still opened, alone.

    Raises:
        ShardMismatchError: a shard is missing, altered, of another place, not as its manifest says, or the manifests
            do not fit together. Names the shard and the client.
    """

    def __init__(
        self, parts: Sequence[tuple[Manifest, Path | str]], *, task: TaskSpec, memory_budget_bytes: int = 2 << 30
    ) -> None:
        parts = sorted(parts, key=lambda part: part[0].client)
        manifests = [manifest for manifest, _ in parts]
        _check_manifests(manifests, task)
        sizes = [entry.n_bytes for manifest in manifests for entry in manifest.shards]
        # With everything in memory nothing is opened later. Otherwise one shard's room is kept free for verifying.
        room = memory_budget_bytes if sum(sizes) <= memory_budget_bytes else memory_budget_bytes - max(sizes)
        self._files = _OpenFiles()
        self.n_resident_bytes = 0
        places: dict[ExampleKey, _Place] = {}
        for manifest, folder in parts:
            for entry, context in shard_entries(manifest):
                sealed = _SealedFile(Path(folder) / entry.name, manifest.feature_key, context, entry, manifest.client)
                body = sealed.open_whole(manifest, task)
                holder: _Holder = body
                if self.n_resident_bytes + entry.n_bytes <= room:
                    self.n_resident_bytes += entry.n_bytes
                else:
                    holder = _SealedShard(sealed, body, self._files, is_causal=task.name == "causal-lm")
                _add(places, manifest.client, entry, body, holder)
        super().__init__(places, [manifest.client for manifest in manifests], _fingerprint(manifests))

    def close(self) -> None:
        """Closes the files of the shards that are not in memory. Their examples can still be read afterwards."""
        self._files.close()


def _check_manifests(manifests: Sequence[Manifest], task: TaskSpec) -> None:
    owner: dict[str, str] = {}
    clients: set[str] = set()
    for manifest in manifests:
        if manifest.client in clients:
            raise ShardMismatchError(f"two manifests are of client {manifest.client}")
        clients.add(manifest.client)
        if manifest.task != task.name:
            raise ShardMismatchError(f"the shards of client {manifest.client} are for {manifest.task}, not {task.name}")
        for name in ("run_id", "job_sha384", "hidden_size", "boundary"):
            if getattr(manifest, name) != getattr(manifests[0], name):
                raise ShardMismatchError(
                    f"the manifests of clients {manifests[0].client} and {manifest.client} differ in {name}"
                )
        for entry in manifest.shards:
            if entry.name in owner:
                raise ShardMismatchError(
                    f"shard {entry.name} is claimed by client {owner[entry.name]} and client {manifest.client}",
                    hint="no example may be counted twice",
                )
            owner[entry.name] = manifest.client


def _add(places: dict[ExampleKey, _Place], client: str, entry: ShardEntry, body: ShardBody, holder: _Holder) -> None:
    for i, (index, n_tokens) in enumerate(zip(body.indices, body.lengths, strict=True)):
        key = ExampleKey(client, entry.split, index)
        if key in places:
            raise ShardMismatchError(
                f"shard {entry.name} of client {client} repeats {entry.split} example {index}", hint=_ALTERED_HINT
            )
        places[key] = _Place(holder, i, n_tokens)


def _fingerprint(manifests: Sequence[Manifest]) -> str:
    named = [[manifest.client, [[entry.split, entry.name] for entry in manifest.shards]] for manifest in manifests]
    return hashlib.sha256(json.dumps(named, separators=(",", ":")).encode()).hexdigest()


class _OpenFiles:
    """At most `_MAX_OPEN_FILES` open shards; the one that was used longest ago is closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, tuple[BinaryIO, ChunkedReader]] = OrderedDict()

    def reader(self, sealed: _SealedFile) -> ChunkedReader:
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


class _SealedFile:
    """One shard's ciphertext, with what opens it. The key is *secret*."""

    def __init__(self, path: Path, key: bytes, context: bytes, entry: ShardEntry, client: str) -> None:
        self.path, self.entry, self.client = path, entry, client
        self._key, self._context = key, context

    def reader(self, file: BinaryIO) -> ChunkedReader:
        return ChunkedReader(file, self._key, self._context)

    def mismatch(self, what: str) -> ShardMismatchError:
        return ShardMismatchError(
            f"shard {self.entry.name} of client {self.client} {what}", path=str(self.path), hint=_ALTERED_HINT
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


class _SealedShard:
    """A verified shard that stays on the disk: reads and decrypts the bytes of one example at a time."""

    def __init__(self, sealed: _SealedFile, body: ShardBody, files: _OpenFiles, *, is_causal: bool) -> None:
        self._sealed, self._files, self._is_causal = sealed, files, is_causal
        self._indices, self._lengths = body.indices, body.lengths
        self._hidden_size, self._dtype = body.hidden_size, _DTYPES[body.boundary]
        self._starts = [0, *torch.tensor(body.lengths).cumsum(0).tolist()]
        self._offsets: dict[str, int] | None = None

    def example(self, i: int) -> Feature:
        try:
            return self._example(self._files.reader(self._sealed), i)
        except OSError as error:
            raise self._sealed.mismatch(f"cannot be read any more: {error.strerror}") from None
        except (DecryptionError, LimitExceededError):
            raise self._sealed.mismatch("was altered after it had been verified") from None

    def _example(self, reader: ChunkedReader, i: int) -> Feature:
        start, n = self._starts[i], self._lengths[i]
        values = self._read(reader, "values", self._dtype, start * self._hidden_size, n * self._hidden_size)
        scales = self._read(reader, "scales", torch.float32, start, n) if self._dtype is torch.int8 else None
        hidden = dequantize(BoundaryBlock(values.view(n, self._hidden_size), scales))
        if self._is_causal:
            return Feature(self._indices[i], hidden, labels=self._read(reader, "labels", torch.int64, start, n))
        return Feature(self._indices[i], hidden, label=int(self._read(reader, "labels", torch.int64, i, 1)))

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
