"""Sealed shards of several clients as one source: same examples in any memory, and every alteration refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister import wire
from cloister.channel import ChunkedWriter
from cloister.errors import ShardMismatchError
from cloister.train import ExampleKey, FeatureSource, MemoryFeatures, TaskSpec, encode_shard, shard_context

RUN_ID = "20260102-0304-far-ab12"
KEY = bytes(range(32))


def seal_all(job, folder: Path, **kwargs):
    return [(job.seal(folder, client, **kwargs), folder) for client in job.tokens]


def source(job, parts, budget: int = 1 << 30) -> FeatureSource:
    return FeatureSource(parts, task=job.task, memory_budget_bytes=budget)


@pytest.fixture
def job(make_job):
    return make_job()


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("boundary", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("budget", [1 << 30, 1, 20_000])
def test_same_examples_whatever_fits_in_memory(make_job, tmp_path, task, boundary, budget):
    job = make_job("llama" if task == "causal-lm" else "bert", task)
    opened = source(job, seal_all(job, tmp_path, boundary=boundary), budget)
    plain = job.source()
    assert opened.clients == ("east", "north", "west")
    for split in ("train", "test"):
        assert opened.split(split) == plain.split(split)
        assert opened.n_examples(split) == plain.n_examples(split)
    assert opened.n_resident_bytes <= budget
    tolerance = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.51 / 127}[boundary]
    for key in (*opened.split("train"), *opened.split("test")):
        got, expected = opened.get(key), plain.get(key)
        assert opened.n_tokens(key) == len(expected.hidden)
        assert (got.index, got.label) == (expected.index, expected.label)
        bound = tolerance * expected.hidden.abs().amax(dim=1, keepdim=True)
        assert bool(((got.hidden - expected.hidden).abs() <= bound).all())
        if task == "causal-lm":
            assert torch.equal(got.labels, expected.labels)
    opened.close()
    assert len(opened.get(key).hidden) == opened.n_tokens(key)
    opened.close()


def test_canonical_order_is_by_client_then_index(job, tmp_path):
    keys = source(job, seal_all(job, tmp_path)).split("train")
    assert keys == sorted(keys)
    assert keys[0] == ExampleKey("east", "train", 0)


def test_fingerprint_is_of_exactly_these_shards(job, tmp_path):
    parts = seal_all(job, tmp_path)
    assert source(job, parts).fingerprint == source(job, parts[::-1]).fingerprint
    assert source(job, parts[:2]).fingerprint != source(job, parts).fingerprint
    assert source(job, parts).only("east").fingerprint != source(job, parts).fingerprint


def test_only_keeps_everyones_test_examples(job, tmp_path):
    alone = source(job, seal_all(job, tmp_path)).only("east")
    assert {key.client for key in alone.split("train")} == {"east"}
    assert {key.client for key in alone.split("test")} == {"east", "north", "west"}
    assert alone.n_examples("train") == {"east": 9, "north": 0, "west": 0}


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_one_changed_byte_names_shard_and_client(job, tmp_path, position, budget):
    parts = seal_all(job, tmp_path)
    name = parts[1][0].shards[1].name
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardMismatchError, match=f"shard {name} of client east was altered"):
        source(job, parts, budget)


def test_missing_and_cut_shards_are_refused(job, tmp_path):
    parts = seal_all(job, tmp_path)
    path = tmp_path / parts[0][0].shards[0].name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ShardMismatchError, match="client west has"):
        source(job, parts)
    path.unlink()
    with pytest.raises(ShardMismatchError, match="client west cannot be read"):
        source(job, parts)


def test_shard_altered_after_it_was_verified_is_refused_when_read(job, tmp_path):
    parts = seal_all(job, tmp_path)
    opened = source(job, parts, budget=1)
    path = tmp_path / parts[0][0].shards[0].name
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardMismatchError, match="client west was altered after"):
        opened.get(ExampleKey("west", "train", 0))
    opened.close()
    path.unlink()
    with pytest.raises(ShardMismatchError, match="client west cannot be read any more"):
        opened.get(ExampleKey("west", "train", 0))


def test_shard_under_another_key_or_at_another_place_is_refused(job, tmp_path):
    manifest = job.seal(tmp_path, "east")
    wrong_key = replace(manifest, feature_key=bytes(32))
    with pytest.raises(ShardMismatchError, match="does not open"):
        source(job, [(wrong_key, tmp_path)])
    swapped = replace(manifest, shards=(manifest.shards[1], manifest.shards[0], *manifest.shards[2:]))
    with pytest.raises(ShardMismatchError, match="does not open"):
        source(job, [(swapped, tmp_path)])
    renamed = replace(manifest, client="other")
    with pytest.raises(ShardMismatchError, match="client other does not open"):
        source(job, [(renamed, tmp_path)])


def test_counts_must_be_the_manifests(job, tmp_path):
    manifest = job.seal(tmp_path, "east")
    first = manifest.shards[0]
    for change in ({"n_examples": first.n_examples + 1}, {"n_tokens": first.n_tokens - 1}):
        altered = replace(manifest, shards=(replace(first, **change), *manifest.shards[1:]))
        with pytest.raises(ShardMismatchError, match="its manifest says"):
            source(job, [(altered, tmp_path)])
    with pytest.raises(ShardMismatchError, match="boundary fp32, its manifest says int8"):
        source(job, [(replace(manifest, boundary="int8"), tmp_path)])


def test_one_example_twice_is_refused_within_and_across_clients(job, tmp_path):
    east = job.seal(tmp_path, "east")
    with pytest.raises(ShardMismatchError, match="two manifests are of client east"):
        source(job, [(east, tmp_path), (east, tmp_path)])
    with pytest.raises(ShardMismatchError, match="claimed by client east and client west"):
        source(job, [(east, tmp_path), (replace(east, client="west"), tmp_path)])
    part = job.features("east", "train")[:2]
    entries = [seal(job, tmp_path, part, index) for index in (0, 1)]
    with pytest.raises(ShardMismatchError, match="repeats train example 0"):
        source(job, [(replace(east, shards=tuple(entries)), tmp_path)])


def seal(job, folder: Path, part, index: int, body: bytes | None = None) -> wire.ShardEntry:
    body = encode_shard(part, boundary="fp32", task=job.task) if body is None else body
    scratch = folder / "scratch"
    with scratch.open("wb") as file, ChunkedWriter(file, KEY, shard_context(RUN_ID, "east", "train", index)) as writer:
        writer.write(body)
    name = hashlib.sha256(scratch.read_bytes()).hexdigest()
    scratch.rename(folder / name)
    n_tokens = sum(len(feature.hidden) for feature in part)
    return wire.ShardEntry(name, (folder / name).stat().st_size, len(part), n_tokens, "train")


def test_a_body_that_is_none_is_refused(job, tmp_path):
    east = job.seal(tmp_path, "east")
    part = job.features("east", "train")[:1]
    bad = replace(east, shards=(seal(job, tmp_path, part, 0, b"not a shard"),))
    with pytest.raises(ShardMismatchError, match="of client east has a wrong body"):
        source(job, [(bad, tmp_path)])
    label = replace(part[0], label=3)  # the task has three labels
    bad = replace(east, shards=(seal(job, tmp_path, [label], 0),))
    with pytest.raises(ShardMismatchError, match="label is out of range"):
        source(job, [(bad, tmp_path)])


@pytest.mark.parametrize("change", [{"run_id": "20260102-0304-other-cd34"}, {"job_sha384": bytes([1]) * 48}])
def test_manifests_of_different_runs_do_not_mix(job, tmp_path, change):
    east, west = (job.seal(tmp_path, client) for client in ("east", "west"))
    with pytest.raises(ShardMismatchError, match="clients east and west differ in"):
        source(job, [(east, tmp_path), (replace(west, **change), tmp_path)])


def test_manifest_of_another_task_is_refused(job, tmp_path):
    east = job.seal(tmp_path, "east")
    with pytest.raises(ShardMismatchError, match="are for sequence-classification, not causal-lm"):
        FeatureSource([(east, tmp_path)], task=TaskSpec("causal-lm"))


def test_few_files_stay_open(job, tmp_path, monkeypatch):
    monkeypatch.setattr("cloister.train._sealed_shard._MAX_OPEN_FILES", 2)
    opened = source(job, seal_all(job, tmp_path, per_shard=1), budget=1)
    for key in opened.split("train"):
        opened.get(key)
        assert len(opened._files._open) <= 2
    opened.close()
    assert not opened._files._open


def test_repr_tells_counts_only(job, tmp_path):
    assert repr(source(job, seal_all(job, tmp_path))) == "FeatureSource(3 clients, 27 train, 12 test)"
    assert repr(MemoryFeatures({})) == "MemoryFeatures(0 clients, 0 train, 0 test)"
