"""The features that the far side trains on: all clients' sealed shards, verified once, read in any order."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cloister.errors import ShardMismatchError
from cloister.train._sealed_shard import ALTERED_HINT, Opened, OpenFiles, SealedFile, SealedShard
from cloister.train._shards import Feature, ShardBody, shard_entries

if TYPE_CHECKING:
    from cloister.train._data import TaskSpec
    from cloister.wire import Manifest, ShardEntry

HELD_OUT = "held-out"
SPLITS = ("train", "test", HELD_OUT)


@dataclass(frozen=True, order=True, slots=True)
class ExampleKey:
    """Which example: the client's name, "train", "test" or "held-out", and the example's index at that client.

    Held-out examples are training examples that `hold_out` set aside, so an index is of one of the two.
    """

    client: str
    split: str
    index: int


class _Holder(Protocol):
    def example(self, i: int) -> Feature: ...

    def label(self, i: int) -> int | None: ...


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
        ahead_bytes: of the memory budget, what examples may take that are opened before they are asked for; 0 where
            every example is in memory.
    """

    def __init__(
        self, places: Mapping[ExampleKey, _Place], clients: Iterable[str], fingerprint: str, ahead_bytes: int = 0
    ) -> None:
        self.clients = tuple(sorted(clients))
        self.fingerprint = fingerprint
        self.ahead_bytes = ahead_bytes
        self._places = places
        self._splits = {split: sorted(key for key in places if key.split == split) for split in SPLITS}

    def __repr__(self) -> str:
        shown = [split for split in SPLITS if split != HELD_OUT or self._splits[split]]
        counts = ", ".join(f"{len(self._splits[split])} {split}" for split in shown)
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

    def is_sealed(self, key: ExampleKey) -> bool:
        """Whether the example has to be read from the disk and decrypted."""
        return isinstance(self._places[key].holder, SealedShard)

    def open(self, key: ExampleKey) -> Opened:
        """One sealed example, still quantised. Safe to call from several threads.

        Raises:
            ShardMismatchError: as `get`.
        """
        holder, position, _ = self._places[key]
        assert isinstance(holder, SealedShard)  # noqa: S101 - the caller has asked `is_sealed`
        return holder.open(position)

    def opened_bytes(self, key: ExampleKey) -> int:
        """What `open` of this sealed example will take in memory."""
        holder, position, _ = self._places[key]
        assert isinstance(holder, SealedShard)  # noqa: S101
        return holder.opened_bytes(position)

    def n_tokens(self, key: ExampleKey) -> int:
        """Length of an example, without opening it."""
        return self._places[key].n_tokens

    def label(self, key: ExampleKey) -> int | None:
        """Class of an example, without opening it; None for causal-lm. *secret*."""
        place = self._places[key]
        return place.holder.label(place.position)

    def n_examples(self, split: str = "train") -> dict[str, int]:
        """Examples of each client, 0 for one that has none in this split."""
        found = Counter(key.client for key in self._splits[split])
        return {client: found[client] for client in self.clients}

    def only(self, client: str) -> Features:
        """The same test examples, and of the training examples those of one client: what it could learn alone."""
        kept = {key: place for key, place in self._places.items() if key.split != "train" or key.client == client}
        return self._view(kept, f"only/{client}")

    def hold_out(self, share: float, seed: int) -> Features:
        """The same examples, of which a share of every client's training examples is in the split "held-out" instead.

        The rule is public: of a client's n training examples the floor(share n) with the smallest
        SHA-256("cloister-held-out/v1/<seed>/<client>/<index>"), so none of a client with fewer than 1 / share.
        """

        def rank(key: ExampleKey) -> bytes:
            return hashlib.sha256(f"cloister-held-out/v1/{seed}/{key.client}/{key.index}".encode()).digest()

        moved: set[ExampleKey] = set()
        for _, found in itertools.groupby(self._splits["train"], key=lambda key: key.client):
            mine = sorted(found, key=rank)
            moved.update(mine[: math.floor(share * len(mine) + 1e-9)])  # 0.29 * 100 is less than 29
        places = {
            ExampleKey(key.client, HELD_OUT, key.index) if key in moved else key: place
            for key, place in self._places.items()
        }
        return self._view(places, f"hold-out/{share!r}/{seed}")

    def clients_with_unseen_labels(self) -> list[str]:
        """Clients with a test example of a class that nobody trains on: no model of this data can learn to give it.

        Which class, and how many examples, is *secret*; whose test split it is, is told to all.
        """
        seen = {self.label(key) for key in self._splits["train"]}
        return sorted({key.client for key in self._splits["test"] if self.label(key) not in seen})

    def _view(self, places: Mapping[ExampleKey, _Place], what: str) -> Features:
        fingerprint = hashlib.sha256(f"{self.fingerprint}/{what}".encode()).hexdigest()
        return Features(places, self.clients, fingerprint, self.ahead_bytes)


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

    def label(self, i: int) -> int | None:
        return self.features[i].label


class FeatureSource(Features):
    """All clients' sealed shards, opened for training.

    Making one verifies every shard: name and size against the manifest, every ciphertext chunk under the client's key
    and the shard's place, the body's form, its counts against the manifest, and that no example comes twice. The
    folder belongs to the untrusted host, so nothing that is read from it is believed.

    As many shards as fit stay in memory, still quantised. The others stay sealed on the disk, and of those only the
    few kilobytes that hold one example are decrypted when it is asked for, or a little earlier (`ReadAhead`).

    Args:
        parts: each client's manifest, and the folder that has its shards.
        task: which labels there must be.
        memory_budget_bytes: most bytes of opened shards in memory, one shard that is being verified included; a
            single shard larger than this is still opened, alone. What verifying needed is read-ahead's afterwards.

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
        self._files = OpenFiles()
        self.n_resident_bytes = 0
        places: dict[ExampleKey, _Place] = {}
        for manifest, folder in parts:
            for entry, context in shard_entries(manifest):
                sealed = SealedFile(Path(folder) / entry.name, manifest.feature_key, context, entry, manifest.client)
                body = sealed.open_whole(manifest, task)
                holder: _Holder = body
                if self.n_resident_bytes + entry.n_bytes <= room:
                    self.n_resident_bytes += entry.n_bytes
                else:
                    holder = SealedShard(sealed, body, self._files, is_causal=task.name == "causal-lm")
                _add(places, manifest.client, entry, body, holder)
        is_whole = sum(sizes) == self.n_resident_bytes
        left = 0 if is_whole else max(1, memory_budget_bytes - self.n_resident_bytes)
        super().__init__(places, [manifest.client for manifest in manifests], _fingerprint(manifests), left)

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
                f"shard {entry.name} of client {client} repeats {entry.split} example {index}", hint=ALTERED_HINT
            )
        places[key] = _Place(holder, i, n_tokens)


def _fingerprint(manifests: Sequence[Manifest]) -> str:
    named = [[manifest.client, [[entry.split, entry.name] for entry in manifest.shards]] for manifest in manifests]
    return hashlib.sha256(json.dumps(named, separators=(",", ":")).encode()).hexdigest()
