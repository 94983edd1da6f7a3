"""What near and far side promise beside their numbers: what they hold, what trains, which batches they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor

from cloister.errors import ModelError
from cloister.slicing import BackboneInfo, FarSide, NearSide, inspect_backbone, load_far, load_near


@pytest.fixture
def llama(tiny_folders: dict) -> BackboneInfo:
    return inspect_backbone(tiny_folders["llama"])


def test_near_is_frozen_and_stays_in_evaluation_mode(info: BackboneInfo) -> None:
    near = load_near(info, 2)
    near.train()
    assert not any(module.training for module in near.modules())
    assert not any(p.requires_grad for p in near.parameters())


def test_far_starts_frozen_but_for_a_new_head(info: BackboneInfo) -> None:
    far = load_far(info, 2, task="sequence-classification", n_labels=3)
    assert {n for n, p in far.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_every_tensor_has_a_value(info: BackboneInfo) -> None:
    for side in (load_near(info, 2), load_far(info, 2, task="sequence-classification", n_labels=3)):
        assert not [n for n, t in (*side.named_parameters(), *side.named_buffers()) if t.is_meta]
        assert all(bool(t.isfinite().all()) for t in side.parameters())


def test_the_two_sides_share_out_the_weights(llama: BackboneInfo) -> None:
    from transformers import AutoModelForCausalLM

    near, far = load_near(llama, 1), load_far(llama, 1, task="causal-lm")
    whole = AutoModelForCausalLM.from_pretrained(llama.path)
    count = sum(p.numel() for side in (near, far) for p in side.parameters())
    assert count == sum(p.numel() for p in whole.parameters())
    assert [len(near.blocks), len(far.blocks)] == [1, 3]


def test_the_head_comes_from_the_seed_alone(llama: BackboneInfo) -> None:
    def head(seed: int) -> Tensor:
        return load_far(llama, 2, task="sequence-classification", n_labels=3, seed=seed).head.weight

    first = head(5)
    torch.manual_seed(123)
    assert torch.equal(head(5), first)
    assert not torch.equal(head(6), first)


def test_loading_leaves_the_global_generator_alone(llama: BackboneInfo) -> None:
    before = torch.get_rng_state()
    load_near(llama, 2)
    load_far(llama, 2, task="sequence-classification", n_labels=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_near_is_close_and_gives_fp32(llama: BackboneInfo, batch: tuple[Tensor, Tensor]) -> None:
    exact, rounded = load_near(llama, 2)(*batch), load_near(llama, 2, dtype=torch.bfloat16)(*batch)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_head_is_forward_over_features(llama: BackboneInfo, batch: tuple[Tensor, Tensor]) -> None:
    near, far = load_near(llama, 2), load_far(llama, 2, task="causal-lm")
    hidden = near(*batch)
    assert torch.equal(far.head(far.features(hidden, batch[1])), far(hidden, batch[1]))
    assert torch.equal(far.norm(far.only_blocks(hidden, batch[1])), far.features(hidden, batch[1]))


def test_a_copy_is_its_own_model(llama: BackboneInfo, batch: tuple[Tensor, Tensor]) -> None:
    far = load_far(llama, 2, task="causal-lm")
    hidden = load_near(llama, 2)(*batch)
    before = far(hidden, batch[1])
    twin = copy.deepcopy(far)
    with torch.no_grad():
        for parameter in far.blocks.parameters():
            parameter.zero_()
    assert torch.equal(twin(hidden, batch[1]), before)
    assert not torch.equal(far(hidden, batch[1]), before)


def test_left_padding_is_refused(llama: BackboneInfo) -> None:
    near, far = load_near(llama, 2), load_far(llama, 2, task="causal-lm")
    ids, mask = torch.tensor([[0, 7, 8]]), torch.tensor([[0, 1, 1]])
    with pytest.raises(ValueError, match="right"):
        near(ids, mask)
    with pytest.raises(ValueError, match="right"):
        far(torch.zeros(1, 3, 32), mask)


def test_mask_of_another_shape_is_refused(llama: BackboneInfo) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        load_near(llama, 2)(torch.tensor([[5, 7, 8]]), torch.ones(1, 2, dtype=torch.long))


def test_an_encoder_refuses_causal_lm(tiny_folders: dict) -> None:
    info = inspect_backbone(tiny_folders["bert-encoder"])
    with pytest.raises(ModelError, match="encoder") as caught:
        load_far(info, 2, task="causal-lm")
    assert "sequence-classification" in caught.value.hint


@pytest.mark.parametrize("n_labels", [None, 0, 1])
def test_a_head_needs_labels(llama: BackboneInfo, n_labels: int | None) -> None:
    with pytest.raises(ModelError, match="two labels"):
        load_far(llama, 2, task="sequence-classification", n_labels=n_labels)


def test_shapes_are_as_the_signatures_say(info: BackboneInfo, batch: tuple[Tensor, Tensor]) -> None:
    near, far = load_near(info, 2), load_far(info, 2, task="sequence-classification", n_labels=3)
    checked = jaxtyped(typechecker=beartype)
    hidden = checked(NearSide.forward)(near, *batch)
    for method in (FarSide.forward, FarSide.pooled, FarSide.features, FarSide.only_blocks):
        checked(method)(far, hidden, batch[1])
    with pytest.raises(TypeCheckError):
        checked(FarSide.forward)(far, hidden[0], batch[1])
