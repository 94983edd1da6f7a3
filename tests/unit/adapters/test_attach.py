"""Adapters on whole models of every family: what trains, that seeds decide, and that states go out and in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from torch.nn.functional import cross_entropy

from cloister.adapters import (
    AdapterSpec,
    LoraSpec,
    PrefixSpec,
    adapter_spec,
    adapter_state,
    attach_adapter,
    load_adapter_state,
)
from cloister.errors import AdapterError, StateMismatchError, UnsupportedLayerError

from .conftest import Load, batch, disturb, logits

SPECS: dict[str, AdapterSpec] = {
    "lora": LoraSpec(r=2, alpha=4),
    "ffa-lora": LoraSpec(r=2, alpha=4, freeze_a=True),
    "prefix": PrefixSpec(n_tokens=4),
    "prefix-mlp": PrefixSpec(n_tokens=4, projection=True, hidden_size=6),
}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> AdapterSpec:
    return SPECS[request.param]


def trained_names(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_adapter_and_head_train_and_a_step_helps(load: Load, case: str, spec: AdapterSpec) -> None:
    model = attach_adapter(load(case), spec, seed=1)
    own = "prompt_encoder." if isinstance(spec, PrefixSpec) else ".lora_"
    heads = {name for name in trained_names(model) if own not in name}
    assert all(".modules_to_save." in name for name in heads)
    assert bool(heads) == case.endswith("sequence-classification")
    if spec == SPECS["ffa-lora"]:
        assert not any(".lora_A." in name for name in trained_names(model))

    def loss() -> torch.Tensor:
        out = model.eval()(**batch()).logits
        target = torch.tensor([0, 2]) if heads else batch()["input_ids"]
        return cross_entropy(out.flatten(0, -2), target.flatten())

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    first = loss()
    for _ in range(6):
        optimizer.zero_grad()
        loss().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
    assert loss() < first


def test_lora_starts_at_the_backbone(load: Load) -> None:
    before = logits(load("llama-causal-lm"))
    assert torch.allclose(logits(attach_adapter(load("llama-causal-lm"), LoraSpec(), seed=0)), before, atol=1e-6)


def test_a_state_goes_out_and_in(load: Load, case: str, spec: AdapterSpec) -> None:
    model, other = (attach_adapter(load(case), spec, seed=1) for _ in range(2))
    disturb(model)
    state = adapter_state(model)
    assert state.spec.digest == adapter_spec(other).digest
    assert not torch.allclose(logits(model), logits(other), atol=1e-4)
    load_adapter_state(other, type(state).parse(state.to_bytes(), adapter_spec(other)))
    assert torch.equal(logits(model), logits(other))
    again = adapter_state(other).tensors
    assert all(np.array_equal(tensor, again[name]) for name, tensor in state.tensors.items())


def test_names_are_those_of_pefts_files(load: Load, case: str) -> None:
    model = attach_adapter(load(case), LoraSpec(r=2), seed=1)
    assert sorted(get_peft_model_state_dict(model, save_embedding_layers=False)) == list(adapter_spec(model).shapes)


def test_the_seed_alone_decides(load: Load, case: str, spec: AdapterSpec) -> None:
    def state(seed: int) -> bytes:
        return adapter_state(attach_adapter(load(case), spec, seed=seed)).to_bytes()

    before = torch.get_rng_state()
    first = state(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert state(1) == first
    if spec != SPECS["ffa-lora"] or case.endswith("classification"):
        assert state(2) != first


def test_the_frozen_a_of_another_seed_is_another_adapter(load: Load) -> None:
    spec = LoraSpec(r=2, freeze_a=True)
    one, two = (attach_adapter(load("llama-causal-lm"), spec, seed=seed) for seed in (1, 2))
    with pytest.raises(StateMismatchError):
        load_adapter_state(two, adapter_state(one))


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (LoraSpec(r=3), r"lora_A.weight"),
        (LoraSpec(r=2, alpha=8), "adapter"),
        (LoraSpec(r=2, use_rslora=True), "adapter"),
        (LoraSpec(r=2, targets=("q_proj",)), r"mlp|k_proj"),
        (LoraSpec(r=2, freeze_a=True), r"lora_A.weight"),
        (PrefixSpec(), "lora_A.weight"),
    ],
    ids=lambda value: str(value).partition("(")[2][:40],
)
def test_a_state_of_another_adapter_is_refused_and_changes_nothing(load: Load, other: AdapterSpec, key: str) -> None:
    model = attach_adapter(load("llama-causal-lm"), LoraSpec(r=2, alpha=16), seed=1)
    before = adapter_state(model).to_bytes()
    with pytest.raises(StateMismatchError) as caught:
        load_adapter_state(model, adapter_state(attach_adapter(load("llama-causal-lm"), other, seed=1)))
    assert caught.value.key
    import re

    assert re.search(key, caught.value.key)
    assert adapter_state(model).to_bytes() == before


def test_dropout_does_not_change_what_a_state_means(load: Load) -> None:
    one, two = (attach_adapter(load("llama-causal-lm"), LoraSpec(dropout=p), seed=1) for p in (0.0, 0.1))
    assert adapter_spec(one).digest == adapter_spec(two).digest


def test_targets_in_a_spec_are_paths_in_the_blocks(load: Load) -> None:
    model = attach_adapter(load("bert-sequence-classification"), LoraSpec(r=2, targets=("query",)), seed=1)
    spec = adapter_spec(model)
    assert spec.adapter.targets == tuple(f"{i}.attention.self.query" for i in range(3))  # type: ignore[union-attr]
    again = attach_adapter(load("bert-sequence-classification"), spec.adapter, seed=1)
    assert adapter_spec(again).digest == spec.digest
    assert len(spec.lora_pairs()) == 3


def test_all_linear_leaves_pooler_and_head_alone(load: Load) -> None:
    model = attach_adapter(load("bert-sequence-classification"), LoraSpec(r=2), seed=1)
    assert all(".encoder.layer." in name or "classifier" in name for name in adapter_spec(model).shapes)


@pytest.mark.parametrize("spec", [LoraSpec(), PrefixSpec()], ids=["lora", "prefix"])
def test_a_second_adapter_is_refused(load: Load, spec: AdapterSpec) -> None:
    model = load("llama-causal-lm")
    attach_adapter(model, LoraSpec(), seed=1)
    with pytest.raises(AdapterError, match="already"):
        attach_adapter(model, spec, seed=1)


def test_a_target_that_is_no_linear_changes_nothing(load: Load) -> None:
    model = load("llama-causal-lm")
    with pytest.raises(UnsupportedLayerError, match="is not a linear"):
        attach_adapter(model, LoraSpec(targets=("nothing",)), seed=1)
    assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_a_model_without_a_head_is_refused(load: Load) -> None:
    with pytest.raises(AdapterError, match="neither"):
        attach_adapter(load("llama-causal-lm").model, LoraSpec(), seed=1)


def test_a_model_without_blocks_is_refused(load: Load) -> None:
    model = load("llama-causal-lm")
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedLayerError, match="blocks"):
        attach_adapter(model, LoraSpec(), seed=1)


def test_a_model_without_our_adapter_has_no_state(load: Load) -> None:
    with pytest.raises(AdapterError, match="no adapter of ours"):
        adapter_state(load("llama-causal-lm"))


def test_numbers_that_are_not_finite_never_become_a_state(load: Load) -> None:
    model = attach_adapter(load("llama-causal-lm"), PrefixSpec(n_tokens=2), seed=1)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(StateMismatchError, match="finite"):
        adapter_state(model)


def test_a_half_precision_backbone_has_a_float32_state(load: Load) -> None:
    model = attach_adapter(load("llama-sequence-classification").to(torch.bfloat16), LoraSpec(r=2), seed=1)
    state = adapter_state(model)
    load_adapter_state(model, state)
    assert adapter_state(model).to_bytes() == state.to_bytes()


@pytest.mark.parametrize("wrong", [{"n_tokens": 0}, {"hidden_size": 0}], ids=str)
def test_a_senseless_prefix_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(AdapterError):
        PrefixSpec(**wrong)  # type: ignore[arg-type]
