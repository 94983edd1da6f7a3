"""The server enclave's far side over one run and its restarts, with SPF."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load

from cloister.adapters import FarAdapterSpec, LoraSpec, SpfSpec, placed_support
from cloister.errors import AdapterError
from cloister.federation import ModelPlan, SplitServerPlan
from cloister.federation._split.far_work import FarWork
from cloister.federation._state import RunState
from cloister.testing import write_tiny_model
from cloister.train import Feature, MemoryFeatures, TaskSpec, TrainSpec

KEY = bytes(32)
FISHER = SpfSpec(criterion="fisher", criterion_examples=8, r=2)
TASK = TaskSpec("sequence-classification", ("a", "b", "c"))


class Attester:
    def sealing_key(self, label: str) -> bytes:
        return KEY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bert"), "bert", n_layers=2)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Callable[[FarAdapterSpec], FarWork]:
    """An enclave process that has just started, over the same sealed files."""

    def fresh(adapter: FarAdapterSpec) -> FarWork:
        plan = SplitServerPlan(
            run_id="run", job_sha384=bytes(48), policy=cast("Any", None), task=TASK,
            train=TrainSpec(max_steps=3, batch_size=4, seed=2), node_keys={}, inbox=tmp_path, work=tmp_path,
            store_url="", min_clients=1, timeout_s=1.0, patience_s=1.0, release="adapter", adapter=adapter,
            model=ModelPlan(str(model), 1, "fp32"), baselines=("alone",), memory_budget_bytes=1 << 20,
        )  # fmt: skip
        state = RunState.open(tmp_path / "state.sealed", KEY, plan)
        work = FarWork(plan, state, cast("Any", Attester()), emit=lambda *_, **__: None, stop=threading.Event())
        work._source = cast("Any", features())
        return work

    return fresh


def features() -> MemoryFeatures:
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> list[Feature]:
        return [Feature(i, torch.randn(3 + i % 4, 32, generator=generator), label=i % 3) for i in range(n)]

    return MemoryFeatures({"a": {"train": some(12), "test": some(6)}, "b": {"train": some(9), "test": some(3)}})


@pytest.mark.parametrize("adapter", [FISHER, SpfSpec(r=2), LoraSpec(r=2)], ids=["fisher", "l1", "lora"])
def test_a_run_and_its_restarts_have_the_same_rows(start: Callable[..., FarWork], adapter: FarAdapterSpec) -> None:
    work = start(adapter)
    work.load()
    work.train()
    work._state.advance("evaluate")
    support = placed_support(work._far)
    again = start(adapter)
    again.load()
    again.evaluate()
    assert placed_support(again._far) == support
    assert again._state.results["metric"]["n"] == {"a": 6, "b": 3}
    again.baselines()
    assert set(again._state.results["baselines"]["alone"]) == {"a", "b"}
    again._state.advance("done")
    last = start(adapter)
    last.load()
    assert last.release_bytes() == again.release_bytes()
    assert placed_support(last._far) == support
    told = last._state.results
    assert told["adapter"] == ("lora" if isinstance(adapter, LoraSpec) else "spf")
    assert told["n_trainable"] == sum(
        tensor.numel() for name, tensor in load(last.release_bytes()).items() if not name.startswith("support/")
    )


def test_the_report_tells_how_many_and_never_which(start: Callable[..., FarWork]) -> None:
    work = start(FISHER)
    work.load()
    work.train()
    work.evaluate()
    told = work._state.results["spf"]
    assert told == {
        "criterion": "fisher", "heads": 0.5, "neurons": 0.5,
        "chosen": {"head_groups": 2, "attention_rows": 3 * 16, "neurons": 32, "feed_forward_rows": 32},
        "of": {"head_groups": 4, "attention_rows": 3 * 32, "neurons": 64, "feed_forward_rows": 64},
    }  # fmt: skip
    assert "[" not in json.dumps(told)


@pytest.mark.parametrize("criterion", ["l1", "fisher"])
def test_a_share_that_selects_nothing_is_refused_before_any_client_works(
    start: Callable[..., FarWork], criterion: Any
) -> None:
    with pytest.raises(AdapterError, match="selects none"):
        start(replace(FISHER, criterion=criterion, heads=0.1)).load()
