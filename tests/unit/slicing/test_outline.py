"""The shapes that planning reads from a configuration are those of the model that is then loaded and offloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cloister.errors import ModelError
from cloister.offload import OffloadSession
from cloister.ring import FAITHFUL, FAST, RingFormat
from cloister.slicing import (
    BackboneInfo,
    check_offload,
    empty_blocks,
    inspect_backbone,
    load_far,
    offload_model,
    outline_backbone,
)
from cloister.slicing._verdicts import weight_of
from cloister.testing import FakeAccelerator, write_tiny_model


def whole(info: BackboneInfo) -> Any:
    """The model as transformers loads it, frozen."""
    if info.is_encoder:
        return AutoModel.from_pretrained(info.path, add_pooling_layer=False).requires_grad_(False)
    return AutoModelForCausalLM.from_pretrained(info.path).requires_grad_(False)


def test_linears_and_groups_are_those_that_are_offloaded(info: BackboneInfo):
    model = whole(info)
    found = outline_backbone(info)
    assert [group.names for group in found.groups] == check_offload(model, FAST, smallest=1)
    for group in found.groups:
        weights = [weight_of(model.get_submodule(name)) for name in group.names]
        assert group.n_in == weights[0].shape[1] and group.n_out == sum(len(weight) for weight in weights)
    blocks = [group.block for group in found.groups]
    assert sorted({block for block in blocks if block is not None}) == list(range(info.n_layers))
    assert (None in blocks) is not info.is_encoder


def test_every_parameter_is_counted_once(info: BackboneInfo):
    model = whole(info)
    found = outline_backbone(info)
    tied = found.groups[-1:] if found.has_tied_head else ()
    linears = sum(group.n_in * group.n_out for group in found.groups if group not in tied)
    counted = found.n_embedding + found.n_in_blocks + found.n_outside + linears
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    assert found.has_tied_head is (not info.is_encoder and bool(model.config.tie_word_embeddings))


@pytest.mark.parametrize("form", [FAST, FAITHFUL], ids=lambda form: form.name)
def test_messages_and_bytes_of_a_step_are_those_that_the_outline_tells(info: BackboneInfo, form: RingFormat):
    """One step of LoRA over masked layers: which of them go backward, and what crosses, is known beforehand."""
    model, found = whole(info), outline_backbone(info)
    names = [name for group in found.groups if group.block is not None for name in group.names]
    transposed = isinstance(model.get_submodule(names[0]), Conv1D)
    inject_adapter_in_model(LoraConfig(target_modules=names, fan_in_fan_out=transposed), model)
    accelerator = FakeAccelerator()
    with OffloadSession(accelerator, form) as session:
        offload_model(model, session, smallest=1)
        ids = torch.arange(12).reshape(2, 6) + 3
        model(ids)[0].square().sum().backward()
        counted = session.describe()
    back = [group for group in found.groups if not group.reads_embeddings]
    assert (counted["forward"], counted["backward"]) == (len(found.groups), len(back))
    n_in, n_out = (sum(sizes) for sizes in zip(*((each.n_in, each.n_out) for each in found.groups), strict=True))
    b_in, b_out = (sum(sizes) for sizes in zip(*((each.n_in, each.n_out) for each in back), strict=True))
    assert sum(planes.nbytes for _, _, planes in accelerator.seen) == 12 * form.n_planes * (n_in + b_out)
    answers = [accelerator.weight(layer).sizes(direction)[1] for layer, direction, _ in accelerator.seen]
    assert sum(answers) == n_out + b_in


def test_queries_may_be_wider_than_the_model(tmp_path: Path):
    write_tiny_model(tmp_path, "gemma", n_heads=4, n_kv_heads=2, hidden_size=32, head_dim=16)
    found = outline_backbone(inspect_backbone(tmp_path))
    assert (found.query_size, found.kv_size) == (64, 32)
    assert found.groups[0].n_out == 128


def test_a_decoding_bert_has_a_head(tmp_path: Path):
    write_tiny_model(tmp_path, "bert", decoder=True)
    found = outline_backbone(inspect_backbone(tmp_path))
    assert [group.names[0].rpartition(".")[2] for group in found.groups if group.block is None] == ["dense", "decoder"]


def test_neither_weights_nor_a_tokenizer_are_needed(tmp_path: Path, tiny_folders: dict[str, Path]):
    (tmp_path / "config.json").write_text((tiny_folders["llama"] / "config.json").read_text())
    found = outline_backbone(inspect_backbone(tmp_path, needs_tokenizer=False))
    assert len(found.groups) == 17
    with pytest.raises(ModelError, match="no tokenizer"):
        inspect_backbone(tmp_path)


def test_a_configuration_that_transformers_refuses(tmp_path: Path, tiny_folders: dict[str, Path]):
    config: dict[str, Any] = json.loads((tiny_folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "no-such-function"}))
    with pytest.raises(ModelError, match="is refused"):
        outline_backbone(inspect_backbone(tmp_path, needs_tokenizer=False))


def test_a_hub_model_is_outlined_without_its_weights(tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def fake_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tiny_folders["llama"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    assert len(outline_backbone(inspect_backbone("someone/a-llama")).groups) == 17
    assert asked and not any("safetensors" in pattern for patterns in asked for pattern in patterns)


def test_asking_for_the_name_alone_loads_no_torch():
    code = "import sys, cloister.slicing as s; assert 'Outline' in s.__all__ and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blocks_without_weights_are_those_of_the_far_side(info: BackboneInfo):
    blocks = empty_blocks(info, 1)
    shapes = {name: tuple(parameter.shape) for name, parameter in blocks.named_parameters()}
    far = load_far(info, 1, task="sequence-classification", n_labels=2)
    assert shapes == {name: tuple(parameter.shape) for name, parameter in far.blocks.named_parameters()}
    assert all(parameter.is_meta for parameter in blocks.parameters())
