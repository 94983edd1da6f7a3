"""Reading ahead changes when examples are opened, never which, nor how many bytes of them wait."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.adapters import trainable_state
from cloister.errors import ShardMismatchError
from cloister.train import ExampleKey, FarTrainer, FeatureSource, TrainSpec, evaluate
from cloister.train._boundary import BoundaryBlock
from cloister.train._read_ahead import ReadAhead
from cloister.train._sealed_shard import Opened

SPEC = TrainSpec(epochs=2, batch_size=4, lr=3e-3, seed=5)


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert "read-ahead" not in names()


@pytest.fixture
def open_source():
    """open_source(job, folder, budget): sealed anew; closed when the test is over."""
    made: list[FeatureSource] = []

    def make(job, folder, budget: int, boundary: str = "int8") -> FeatureSource:
        parts = [(job.seal(folder, client, boundary=boundary), folder) for client in job.tokens]
        made.append(FeatureSource(parts, task=job.task, memory_budget_bytes=budget))
        return made[-1]

    yield make
    for source in made:
        source.close()


class Endless:
    """A stand-in source: every example sealed, of `n` bytes, and it counts what waits."""

    ahead_bytes = 100

    def __init__(self, sizes: list[int], sealed: list[bool] | None = None) -> None:
        self.sizes, self.sealed = sizes, sealed or [True] * len(sizes)
        self.opened: list[int] = []
        self.direct: list[int] = []
        self.fails_at: int | None = None

    def is_sealed(self, key: ExampleKey) -> bool:
        return self.sealed[key.index]

    def opened_bytes(self, key: ExampleKey) -> int:
        return self.sizes[key.index]

    def open(self, key: ExampleKey) -> Opened:
        if key.index == self.fails_at:
            raise ShardMismatchError(f"shard of example {key.index}")
        self.opened.append(key.index)
        return Opened(key.index, BoundaryBlock(torch.full((1, 2), float(key.index))), label=1)

    def get(self, key: ExampleKey):
        self.direct.append(key.index)
        return Opened(key.index, BoundaryBlock(torch.full((1, 2), float(key.index))), label=1).feature()


def keys_of(source: Endless) -> list[ExampleKey]:
    return [ExampleKey("a", "train", i) for i in range(len(source.sizes))]


def wait_until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 150), st.booleans()), max_size=30), st.integers(1, 5))
def test_the_examples_in_their_order_whatever_lies_where(found, batch):
    source = Endless([size for size, _ in found], [is_sealed for _, is_sealed in found])
    keys = keys_of(source)
    with ReadAhead(source, iter(keys)) as ahead:
        taken = [feature for at in range(0, len(keys), batch) for feature in ahead.take(keys[at : at + batch])]
    assert [feature.index for feature in taken] == [key.index for key in keys]
    assert all(bool((feature.hidden == feature.index).all()) for feature in taken)
    assert source.opened == [i for i, is_sealed in enumerate(source.sealed) if is_sealed]
    assert source.direct == [i for i, is_sealed in enumerate(source.sealed) if not is_sealed]


def test_bytes_that_wait_are_bounded_and_a_large_example_waits_alone():
    source = Endless([40, 40, 40, 150, 10])
    keys = keys_of(source)
    with ReadAhead(source, keys) as ahead:
        for n_taken, n_opened in enumerate([2, 3, 3, 4]):
            wait_until(lambda n=n_opened: len(source.opened) >= n)
            time.sleep(0.02)
            assert len(source.opened) == n_opened, f"after {n_taken} were taken"
            ahead.take([keys[n_taken]])
        wait_until(lambda: len(source.opened) == 5)


def test_an_error_comes_at_its_example_as_it_is_and_once():
    source = Endless([1] * 6)
    source.fails_at = 3
    keys = keys_of(source)
    with ReadAhead(source, keys) as ahead:
        assert [feature.index for feature in ahead.take(keys[:3])] == [0, 1, 2]
        with pytest.raises(ShardMismatchError, match="shard of example 3"):
            ahead.take(keys[3:4])
        with pytest.raises(RuntimeError, match="not been announced"):
            ahead.take(keys[4:5])


def test_another_order_than_announced_is_a_bug_and_said():
    source = Endless([1, 1])
    keys = keys_of(source)
    with ReadAhead(source, keys) as ahead, pytest.raises(RuntimeError, match="another order"):
        ahead.take(keys[::-1])
    with ReadAhead(source, keys[:1]) as ahead, pytest.raises(RuntimeError, match="not been announced"):
        ahead.take([*keys[:1], *keys[:1]])


def test_keys_that_cannot_be_made_are_an_error_and_not_an_endless_wait():
    def keys():
        yield ExampleKey("a", "train", 0)
        raise KeyError("lost")

    source = Endless([1, 1])
    with ReadAhead(source, keys()) as ahead:
        ahead.take(keys_of(source)[:1])
        with pytest.raises(KeyError, match="lost"):
            ahead.take(keys_of(source)[1:])


def test_stops_promptly_with_everything_still_to_come():
    source = Endless([60] * 100_000)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), ReadAhead(source, keys_of(source)):
        _ = 1 / 0
    assert time.monotonic() - began < 5
    assert len(source.opened) <= 2


def test_what_is_in_memory_needs_no_thread(make_job, tmp_path, open_source):
    job = make_job()
    source = open_source(job, tmp_path, 1 << 30)
    assert (source.ahead_bytes, job.source().ahead_bytes) == (0, 0)
    keys = source.split("train")
    with ReadAhead(source, keys) as ahead:
        assert "read-ahead" not in names()
        assert len(ahead.take(keys)) == len(keys)


@pytest.mark.parametrize("budget", [1, 20_000])
def test_ahead_and_resident_bytes_are_within_the_budget(make_job, tmp_path, budget, open_source):
    job = make_job()
    source = open_source(job, tmp_path, budget, "fp32")
    assert source.ahead_bytes > 0 and source.ahead_bytes + source.n_resident_bytes <= budget
    assert source.only("east").ahead_bytes == source.hold_out(0.3, 0).ahead_bytes == source.ahead_bytes
    key = next(key for key in source.split("train") if source.is_sealed(key))
    opened = source.open(key)
    assert source.opened_bytes(key) == opened.block.n_bytes
    assert "tensor" not in repr(opened)


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("boundary", ["int8", "bf16"])
def test_training_and_metric_have_the_same_bits(make_job, lora, tmp_path, task, boundary, open_source):
    job = make_job("llama" if task == "causal-lm" else "bert", task)
    found = []
    for name, budget in (("memory", 1 << 30), ("some", 9_000), ("none", 1)):
        folder = tmp_path / name
        folder.mkdir()
        source = open_source(job, folder, budget, boundary)
        assert bool(source.ahead_bytes) == (name != "memory")
        far = job.far(SPEC.seed)
        result = FarTrainer(far, SPEC, lora, job.task, source).train()
        found.append((result.losses, evaluate(far, source, job.task), trainable_state(far)))
    for losses, metric, state in found[1:]:
        assert (losses, metric) == found[0][:2]
        assert all(torch.equal(tensor, state[name]) for name, tensor in found[0][2].items())


def test_an_altered_shard_ends_training_with_its_name(make_job, lora, tmp_path, open_source):
    job = make_job()
    source = open_source(job, tmp_path, 1)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
    with pytest.raises(ShardMismatchError, match="was altered after it had been verified"):
        FarTrainer(job.far(SPEC.seed), SPEC, lora, job.task, source).train()


def test_a_stop_in_mid_epoch_leaves_no_thread(make_job, lora, tmp_path, open_source):
    job, stop = make_job(), threading.Event()
    source = open_source(job, tmp_path, 1)
    trainer = FarTrainer(
        job.far(SPEC.seed), replace(SPEC, epochs=50), lora, job.task, source,
        on_step=lambda info: stop.set() if info.step == 2 else None, stop=stop,
    )  # fmt: skip
    assert trainer.train().n_steps == 2


def test_two_threads_may_read_one_source(make_job, tmp_path, monkeypatch, open_source):
    """Each reader evicts what the other has open."""
    monkeypatch.setattr("cloister.train._sealed_shard._MAX_OPEN_FILES", 1)
    job = make_job()
    source, plain = open_source(job, tmp_path, 1, "fp32"), job.source()
    keys = source.split("train") * 5
    with ReadAhead(source, keys) as ahead:
        for key in keys:
            assert torch.equal(ahead.take([key])[0].hidden, source.get(key).hidden)
            assert torch.equal(source.get(key).hidden, plain.get(key).hidden)
