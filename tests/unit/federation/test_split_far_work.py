"""The far side's work in the server enclave: the precision that a run keeps, early stopping, unseen labels."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloister.adapters import LoraSpec, trainable_state
from cloister.errors import ConfigError
from cloister.federation import ModelPlan, SplitServerPlan
from cloister.federation._split.far_work import FarWork
from cloister.slicing import inspect_backbone
from cloister.testing import write_tiny_model
from cloister.train import Feature, MemoryFeatures, TaskSpec, TrainSpec
from cloister.train import _precision as precision_module

TASK = TaskSpec("sequence-classification", ("a", "b", "c"))
SPEC = TrainSpec(epochs=4, batch_size=4, lr=0.02, seed=3)


class State:
    """`RunState` without its file."""

    def __init__(self, results: dict[str, Any] | None = None, phase: str = "train") -> None:
        self.results, self.phase = results or {}, phase

    def set_result(self, name: str, value: Any) -> None:
        self.results[name] = value


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_tiny_model(folder / "model", "bert", n_layers=4, seed=1)
        self.hidden_size = inspect_backbone(self.model).hidden_size
        self.events: list[dict[str, Any]] = []

    def work(self, state: State, spec: TrainSpec = SPEC, *, live_metrics: bool = True, **plan: Any) -> FarWork:
        made = SplitServerPlan(
            run_id="20260102-0304-tiny-ab12", job_sha384=bytes(48), policy=SimpleNamespace(),
            task=TASK, train=spec, node_keys={}, inbox=self.folder, work=self.folder, store_url="", min_clients=1,
            timeout_s=1, patience_s=1, live_metrics=live_metrics, adapter=LoraSpec(r=2),
            model=ModelPlan(str(self.model), 2, "fp32"), baselines=("majority", "alone"), memory_budget_bytes=1 << 30,
            **plan,
        )  # fmt: skip
        attester = SimpleNamespace(sealing_key=lambda _purpose: bytes(32))
        work = FarWork(made, state, attester, emit=self.emit, stop=threading.Event())  # type: ignore[arg-type]
        work.load()
        work._source = self.source()  # type: ignore[assignment]
        return work

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def source(self, unseen: bool = False) -> MemoryFeatures:
        generator = torch.Generator().manual_seed(0)

        def features(n: int, n_labels: int) -> list[Feature]:
            return [
                Feature(i, torch.randn(2 + i % 3, self.hidden_size, generator=generator), label=i % n_labels)
                for i in range(n)
            ]

        return MemoryFeatures(
            {
                "east": {"train": features(12, 2), "test": features(6, 3 if unseen else 2)},
                "west": {"train": features(8, 2), "test": features(4, 2)},
            }
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda has: monkeypatch.setattr(precision_module, "has_bf16", lambda _device="cpu": has)


@pytest.mark.parametrize(
    ("wanted", "has", "taken"), [("fp32", True, "fp32"), ("auto", True, "bf16"), ("auto", False, "fp32")]
)
def test_the_report_says_which_precision_was_taken(world: World, chip: Any, wanted: str, has: bool, taken: str):
    chip(has)
    state = State()
    work = world.work(state, replace(SPEC, precision=wanted, epochs=1))  # type: ignore[arg-type]
    work.train()
    assert state.results["precision"] == taken
    assert work._far is not None and work._far.is_bf16 == (taken == "bf16")
    work.evaluate()
    assert state.results["metric"]["name"] == "accuracy"


def test_bf16_without_such_a_processor_ends_the_run_before_it_trains(world: World, chip: Any):
    chip(False)
    with pytest.raises(ConfigError, match=r"training\.precision"):
        world.work(State(), replace(SPEC, precision="bf16"))


@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_a_resumed_run_keeps_its_precision_on_another_processor(world: World, chip: Any, begun: str):
    spec, state = replace(SPEC, precision="auto", epochs=1), State()
    chip(begun == "bf16")
    world.work(state, spec).train()
    chip(True)
    resumed = world.work(state, spec)
    assert resumed._far is not None and resumed._far.is_bf16 == (begun == "bf16")
    resumed.train()
    assert state.results["precision"] == begun
    if begun == "bf16":
        chip(False)
        with pytest.raises(ConfigError, match=r"training\.precision"):
            world.work(state, spec)


def test_early_stopping_is_told_and_answers_come_from_the_epoch_that_was_kept(world: World):
    state = State()
    work = world.work(state, replace(SPEC, epochs=30, patience=1, held_out=0.25, schedule="constant", lr=0.1))
    work.train()
    found = state.results["early_stopping"]
    assert found["patience"] == 1 and found["held_out"] == {"east": 3, "west": 2}
    assert found["best_epoch"] == found["losses"].index(min(found["losses"])) + 1
    assert found["stopped_at_epoch"] == len(found["losses"]) < 30
    told = [event for event in world.said("metric") if event["when"] == "epoch"]
    assert [event["epoch"] for event in told] == list(range(1, len(found["losses"]) + 1))
    assert told[0]["name"] == "accuracy" and set(told[0]["per_client"]) == {"east", "west"}
    work.evaluate()
    done = State(state.results, phase="done")
    again = world.work(done)
    assert again._far is not None and work._far is not None
    kept = trainable_state(work._far)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trainable_state(again._far).items())


def test_without_live_metrics_held_out_metrics_are_not_told(world: World):
    state = State()
    world.work(state, replace(SPEC, patience=1, held_out=0.25), live_metrics=False).train()
    assert not world.said("metric") and state.results["early_stopping"]["losses"]


def test_without_patience_the_report_has_no_early_stopping(world: World):
    state = State()
    world.work(state, replace(SPEC, epochs=1)).train()
    assert "early_stopping" not in state.results and state.results["unseen_labels"] == []


def test_alone_trains_in_the_same_precision_and_with_the_same_patience(world: World, chip: Any, monkeypatch: Any):
    chip(True)
    seen: list[TrainSpec] = []
    import cloister.train as train

    def alone(far: Any, source: Any, client: str, spec: TrainSpec, *_: Any, **__: Any) -> dict[str, Any]:
        assert far.is_bf16
        seen.append(spec)
        return {"name": "accuracy", "value": 0.5, "per_client": {}}

    monkeypatch.setattr(train, "alone_baseline", alone)
    state = State()
    work = world.work(state, replace(SPEC, epochs=1, precision="auto", patience=2, held_out=0.5))
    work.train()
    work.baselines()
    assert [(spec.precision, spec.patience) for spec in seen] == [("bf16", 2)] * 2


def test_labels_that_nobody_trains_on_are_warned_of_once_and_reported_without_the_class(world: World):
    state = State()
    for _ in range(2):  # begun, and resumed
        work = world.work(state, replace(SPEC, epochs=1))
        work._source = world.source(unseen=True)  # type: ignore[assignment]
        work.train()
    [warning] = world.said("warning")
    assert warning["cause"].startswith("client east has test examples of a class that no client trains on")
    assert state.results["unseen_labels"] == ["east"]
