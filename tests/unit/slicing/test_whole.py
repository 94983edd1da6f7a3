"""A whole backbone with a fresh adapter computes what transformers computes, in every family and for both tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from cloister.adapters import LoraSpec, PrefixSpec, attach_adapter
from cloister.errors import ModelError
from cloister.slicing import WholeSide, inspect_backbone, load_whole, pool
from cloister.testing import TINY_FAMILIES, write_tiny_model

MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_next_tokens(tmp_path: Path, family: str) -> None:
    path = write_tiny_model(tmp_path / "model", family, decoder=family == "bert")
    info = inspect_backbone(path)
    side = WholeSide(attach_adapter(load_whole(info, task="causal-lm"), LoraSpec(r=2), seed=0), info, task="causal-lm")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(ids(), attention_mask=MASK).logits
        found = side(ids(), MASK)
    assert torch.allclose(found[MASK.bool()], expected[MASK.bool()], atol=1e-5)
    assert len(side.blocks) == info.n_layers


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_what_a_classifier_reads(tmp_path: Path, family: str, pooling: str) -> None:
    path = write_tiny_model(tmp_path / "model", family)
    info = inspect_backbone(path)
    model = load_whole(info, task="sequence-classification", n_labels=3)
    side = WholeSide(
        attach_adapter(model, LoraSpec(r=2), seed=0), info, task="sequence-classification", pooling=pooling
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path).eval()(ids(), attention_mask=MASK).last_hidden_state
        assert torch.allclose(side.pooled(ids(), MASK), pool(hidden, MASK, pooling), atol=1e-5)
        assert side(ids(), MASK).shape == (2, 3)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_prefix_changes_every_token_and_trains(tmp_path: Path, family: str) -> None:
    info = inspect_backbone(write_tiny_model(tmp_path / "model", family))
    plain = load_whole(info, task="sequence-classification", n_labels=3)
    side = WholeSide(attach_adapter(plain, PrefixSpec(4), seed=0), info, task="sequence-classification")
    side(ids(), MASK).sum().backward()
    trained = [p for p in side.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_an_encoder_does_not_write(tmp_path: Path) -> None:
    info = inspect_backbone(write_tiny_model(tmp_path / "model", "bert"))
    with pytest.raises(ModelError, match="encoder"):
        load_whole(info, task="causal-lm")


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_tiny_model(tmp_path / "model", "llama")
    tensors = load_file(path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({k: v for k, v in tensors.items() if k != gone}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="down_proj"):
        load_whole(inspect_backbone(path), task="causal-lm")
