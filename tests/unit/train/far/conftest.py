"""A tiny job in memory: token ids of three clients, their features, and what turns them into sealed shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cloister import wire
from cloister.adapters import LoraSpec
from cloister.channel import ChunkedWriter
from cloister.slicing import BackboneInfo, FarSide, inspect_backbone, load_far, load_near
from cloister.testing import write_tiny_model
from cloister.train import Feature, MemoryFeatures, TaskSpec, encode_shard, shard_context

RUN_ID = "20260102-0304-far-ab12"
KEY = bytes(range(32))
CUT = 2
LABELS = ("a", "b", "c")
CLIENTS = ("west", "east", "north")  # not sorted, on purpose


@dataclass
class TinyJob:
    """A model folder, and per client and split the token ids with labels."""

    folder: Path
    task: TaskSpec
    tokens: dict[str, dict[str, list[tuple[list[int], int | list[int]]]]]
    info: BackboneInfo = field(init=False)

    def __post_init__(self) -> None:
        self.info = inspect_backbone(self.folder)
        self._near = load_near(self.info, CUT)

    def far(self, seed: int = 0) -> FarSide:
        n_labels = len(self.task.labels) or None
        return load_far(self.info, CUT, task=self.task.name, n_labels=n_labels, pooling=self.task.pooling, seed=seed)

    def features(self, client: str, split: str) -> list[Feature]:
        return [self._feature(i, *pair) for i, pair in enumerate(self.tokens[client][split])]

    def source(self) -> MemoryFeatures:
        return MemoryFeatures({c: {s: self.features(c, s) for s in self.tokens[c]} for c in self.tokens})

    def _feature(self, index: int, ids: list[int], label: int | list[int]) -> Feature:
        x = torch.tensor([ids])
        with torch.no_grad():
            hidden = self._near(x, torch.ones_like(x))[0].clone()
        if isinstance(label, int):
            return Feature(index, hidden, label=label)
        return Feature(index, hidden, labels=torch.tensor(label))

    def seal(
        self, folder: Path, client: str, *, boundary: str = "fp32", per_shard: int = 4, key: bytes = KEY
    ) -> wire.Manifest:
        """Seals a client's features as its near side would, and writes them into `folder`."""
        entries = []
        for split in ("train", "test"):
            found = self.features(client, split)
            for n, start in enumerate(range(0, len(found), per_shard)):
                part = found[start : start + per_shard]
                body = encode_shard(part, boundary=boundary, task=self.task)
                entries.append(seal_body(folder, body, client, split, n, part, key))
        return manifest(client, entries, self.task, boundary, self.info.hidden_size, key)


def seal_body(
    folder: Path, body: bytes, client: str, split: str, index: int, part: list[Feature], key: bytes = KEY
) -> wire.ShardEntry:
    scratch = folder / "scratch"
    with scratch.open("wb") as file, ChunkedWriter(file, key, shard_context(RUN_ID, client, split, index)) as writer:
        writer.write(body)
    name = hashlib.sha256(scratch.read_bytes()).hexdigest()
    scratch.rename(folder / name)
    n_tokens = sum(len(f.hidden) for f in part)
    return wire.ShardEntry(name, (folder / name).stat().st_size, len(part), n_tokens, split)


def manifest(client, entries, task, boundary, hidden_size, key=KEY) -> wire.Manifest:
    return wire.Manifest(
        run_id=RUN_ID,
        client=client,
        job_sha384=bytes(48),
        feature_key=key,
        hidden_size=hidden_size,
        boundary=boundary,
        task=task.name,
        shards=tuple(entries),
        n_truncated=0,
    )


def random_tokens(task: str, vocab_size: int, *, n_train: int, n_test: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, n: int = 1) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    def example():
        n = draw(3, 15)[0]
        ids = draw(5, vocab_size, n)
        if task == "causal-lm":
            n_prompt = draw(1, n)[0]
            return ids, [-100] * n_prompt + ids[n_prompt:]
        label = draw(0, len(LABELS))[0]
        # One token tells the class, so that there is something to learn.
        return [5 + label, *ids], label

    return {"train": [example() for _ in range(n_train)], "test": [example() for _ in range(n_test)]}


@pytest.fixture(scope="session")
def make_job(tmp_path_factory) -> Callable[..., TinyJob]:
    """make_job("bert", "sequence-classification"): each is made once."""
    made: dict[tuple[str, str], TinyJob] = {}

    def make(family: str = "bert", task: str = "sequence-classification") -> TinyJob:
        if (family, task) not in made:
            folder = write_tiny_model(tmp_path_factory.mktemp(family), family, n_layers=4, seed=3)
            info = inspect_backbone(folder)
            labels = LABELS if task == "sequence-classification" else ()
            spec = TaskSpec(task, labels, pooling="mean" if info.is_encoder else "last")
            tokens = {
                client: random_tokens(task, info.vocab_size, n_train=7 + 2 * i, n_test=4, seed=i)
                for i, client in enumerate(CLIENTS)
            }
            made[family, task] = TinyJob(folder, spec, tokens)
        return made[family, task]

    return make


@pytest.fixture
def lora() -> LoraSpec:
    return LoraSpec(r=4, alpha=8)
