"""LoRA: where it goes, what trains, what it computes, and that a seed decides it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from cloister.adapters import LoraSpec, add_lora, n_frozen, n_trainable, trainable_state
from cloister.errors import AdapterError, UnsupportedLayerError
from cloister.slicing import FarSide, inspect_backbone, load_far
from cloister.testing import TINY_FAMILIES, write_tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: write_tiny_model(root / family, family) for family in TINY_FAMILIES}


@pytest.fixture(params=TINY_FAMILIES)
def far(request: pytest.FixtureRequest, folders: dict[str, Path]) -> FarSide:
    return make_far(folders[request.param])


@pytest.fixture
def llama(folders: dict[str, Path]) -> FarSide:
    return make_far(folders["llama"])


def make_far(folder: Path, task: str = "sequence-classification") -> FarSide:
    return load_far(inspect_backbone(folder), 2, task=task, n_labels=3)


def boundary() -> tuple[Tensor, Tensor]:
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return hidden, mask


def test_tuning_starts_at_the_backbone(far: FarSide) -> None:
    before = far(*boundary())
    add_lora(far, LoraSpec(), seed=0)
    torch.testing.assert_close(far(*boundary()), before, atol=1e-6, rtol=0)


def test_what_trains_is_lora_and_a_new_head(far: FarSide) -> None:
    add_lora(far, LoraSpec(), seed=0)
    trains = {name for name, p in far.named_parameters() if p.requires_grad}
    assert {name for name in trains if ".lora_" not in name} == {"head.weight", "head.bias"}
    assert all(("lora_" in n) == p.requires_grad for n, p in far.blocks.named_parameters())
    assert n_trainable(far) + n_frozen(far) == sum(p.numel() for p in far.parameters())
    assert n_trainable(far) == sum(t.numel() for t in trainable_state(far).values())


def test_a_language_model_head_stays_frozen(folders: dict[str, Path]) -> None:
    far = make_far(folders["llama"], task="causal-lm")
    add_lora(far, LoraSpec(), seed=0)
    assert not any(p.requires_grad for p in (*far.head.parameters(), *far.norm.parameters()))


def test_only_what_trains_gets_a_gradient_and_a_step_helps(far: FarSide) -> None:
    add_lora(far, LoraSpec(), seed=0)
    labels = torch.tensor([0, 2])
    optimizer = torch.optim.AdamW([p for p in far.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = cross_entropy(far(*boundary()), labels)
        loss.backward()
        losses.append(loss.item())
        assert all((p.grad is not None) == p.requires_grad for p in far.parameters())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_all_linear_means_every_linear_of_every_block(far: FarSide) -> None:
    expected = sum(isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D" for m in far.blocks.modules())
    add_lora(far, LoraSpec(r=4), seed=0)
    found = [name for name, _ in far.blocks.named_parameters() if ".lora_A." in name]
    assert len(found) == expected > 0


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_formula(llama: FarSide, use_rslora: bool) -> None:
    weight = llama.blocks[0].mlp.up_proj.weight.clone()
    add_lora(llama, LoraSpec(r=4, alpha=6, use_rslora=use_rslora), seed=0)
    layer = llama.blocks[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(2))
    x = boundary()[0]
    scale = 6 / (math.sqrt(4) if use_rslora else 4)
    torch.testing.assert_close(layer(x), linear(x, weight) + scale * linear(linear(x, a), b))


@pytest.mark.parametrize(
    ("targets", "per_block"), [(("q_proj", "v_proj"), 2), (("mlp.up_proj",), 1), (("0.self_attn.q_proj",), 0.5)]
)
def test_named_targets(llama: FarSide, targets: tuple[str, ...], per_block: float) -> None:
    add_lora(llama, LoraSpec(targets=targets), seed=0)
    found = [name for name, _ in llama.blocks.named_parameters() if ".lora_A." in name]
    assert len(found) == per_block * len(llama.blocks)
    assert all(any(f"{target}.lora_A" in name for target in targets) for name in found)


@pytest.mark.parametrize("target", ["qkv", "proj", "input_layernorm", "mlp", "head", ""])
def test_a_target_that_is_no_linear_lists_those_there_are(llama: FarSide, target: str) -> None:
    with pytest.raises(UnsupportedLayerError, match="is not a linear") as caught:
        add_lora(llama, LoraSpec(targets=("q_proj", target)), seed=0)
    assert "q_proj" in caught.value.hint
    assert "mlp.up_proj" in caught.value.hint
    assert not any(".lora_" in name for name, _ in llama.named_parameters())


def test_a_second_adapter_is_refused(llama: FarSide) -> None:
    add_lora(llama, LoraSpec(), seed=0)
    with pytest.raises(AdapterError, match="already"):
        add_lora(llama, LoraSpec(), seed=0)


def test_the_seed_alone_decides(folders: dict[str, Path]) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        far = make_far(folders["llama"])
        add_lora(far, LoraSpec(), seed=seed)
        return {name: t for name, t in trainable_state(far).items() if ".lora_A." in name}

    first = state(5)
    torch.manual_seed(99)
    again, other = state(5), state(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    # Kaiming uniform with a = sqrt(5) is uniform in +-1/sqrt(in): 32 features in.
    a = first["blocks.0.self_attn.q_proj.lora_A.default.weight"]
    assert 0.9 / math.sqrt(32) < a.abs().max() <= 1 / math.sqrt(32)


def test_the_global_generator_is_left_alone(llama: FarSide) -> None:
    before = torch.get_rng_state()
    add_lora(llama, LoraSpec(), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"targets": ()},
    ],
)
def test_a_senseless_spec_is_refused(wrong: dict) -> None:
    with pytest.raises(AdapterError):
        LoraSpec(**wrong)


def test_the_far_side_trains_a_too(llama: FarSide) -> None:
    with pytest.raises(AdapterError, match="FFA"):
        add_lora(llama, LoraSpec(freeze_a=True), seed=0)
