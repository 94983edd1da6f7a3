"""Checkpoints come in several forms; each gives the same side, and a broken one gives an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cloister.errors import ModelError
from cloister.slicing import inspect_backbone, load_far, load_near
from cloister.slicing._weights import SafetensorsSource

State = dict[str, Tensor]


def logits(folder: Path, batch: tuple[Tensor, Tensor]) -> Tensor:
    info = inspect_backbone(folder)
    with torch.no_grad():
        hidden = load_near(info, 2)(*batch)
        return load_far(info, 2, task="causal-lm")(hidden, batch[1])


def rewrite(folder: Path, change: Callable[[State], State]) -> None:
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=["llama", "llama-tied", "bert-decoder", "gpt2", "gpt_neox"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, tiny_folders: dict[str, Path]) -> Path:
    return Path(shutil.copytree(tiny_folders[request.param], tmp_path / request.param))


@pytest.fixture
def llama(tmp_path: Path, tiny_folders: dict[str, Path]) -> Path:
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "llama"))


def test_a_sharded_checkpoint(folder: Path, batch: tuple[Tensor, Tensor]) -> None:
    expected = logits(folder, batch)
    (folder / "model.safetensors").rename(folder / "whole")
    state = load_file(folder / "whole")
    (folder / "whole").unlink()
    weight_map = {}
    for i, name in enumerate(sorted(state)):
        weight_map[name] = f"model-{i % 2 + 1:05}-of-00002.safetensors"
    for file in set(weight_map.values()):
        save_file({n: state[n] for n in state if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits(folder, batch), expected)


def test_a_checkpoint_of_the_base_model_alone(tmp_path: Path, tiny_folders: dict, batch: tuple[Tensor, Tensor]) -> None:
    """GPT-2 on the hub is saved so: without `transformer.` before each name, and its head is the embedding."""
    folder = Path(shutil.copytree(tiny_folders["gpt2"], tmp_path / "gpt2"))
    expected = logits(folder, batch)
    rewrite(folder, lambda s: {n.removeprefix("transformer."): t for n, t in s.items() if not n.startswith("lm_head")})
    assert torch.equal(logits(folder, batch), expected)


def test_old_names_of_norms(tmp_path: Path, tiny_folders: dict, batch: tuple[Tensor, Tensor]) -> None:
    folder = Path(shutil.copytree(tiny_folders["bert-decoder"], tmp_path / "bert"))
    expected = logits(folder, batch)

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(folder, lambda s: {old(n): t for n, t in s.items()})
    assert any("gamma" in n for n in load_file(folder / "model.safetensors"))
    assert torch.equal(logits(folder, batch), expected)


def test_a_pickled_checkpoint_is_left_to_transformers(folder: Path, batch: tuple[Tensor, Tensor]) -> None:
    expected = logits(folder, batch)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(folder, batch), expected)


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_checkpoint_that_stores_a_head_beside_the_embedding(
    llama: Path, batch: tuple[Tensor, Tensor], says_tied: bool
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": says_tied}))
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        expected = model(input_ids=batch[0], attention_mask=batch[1]).logits
    real = batch[1].bool()
    torch.testing.assert_close(logits(llama, batch)[real], expected[real], atol=1e-6, rtol=0)


def test_half_precision_is_widened(llama: Path, batch: tuple[Tensor, Tensor]) -> None:
    rewrite(llama, lambda s: {n: t.to(torch.bfloat16) for n, t in s.items()})
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=batch[0], attention_mask=batch[1]).logits
    real = batch[1].bool()
    torch.testing.assert_close(logits(llama, batch)[real], expected[real], atol=1e-6, rtol=0)


def test_only_the_tensors_of_a_side_are_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = SafetensorsSource.get

    def spy(self: SafetensorsSource, name: str) -> Tensor | None:
        found = get(self, name)
        if found is not None:
            read.append(name)
        return found

    monkeypatch.setattr(SafetensorsSource, "get", spy)
    info = inspect_backbone(llama)
    load_near(info, 1)
    assert {n.split(".")[1] for n in read} == {"embed_tokens", "layers"}
    assert {n.split(".")[2] for n in read if ".layers." in n} == {"0"}
    read.clear()
    load_far(info, 1, task="causal-lm")
    assert {n.split(".")[2] for n in read if ".layers." in n} == {"1", "2", "3"}
    assert "model.embed_tokens.weight" not in read
    assert len(read) == len(set(read))


def test_a_file_that_changes_later_does_not_change_the_model(llama: Path, batch: tuple[Tensor, Tensor]) -> None:
    near = load_near(inspect_backbone(llama), 2)
    before = near(*batch)
    path = llama / "model.safetensors"
    with path.open("r+b") as file:  # in place: the same pages that a mapping would see
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert torch.equal(near(*batch), before)


def test_a_head_that_is_missing(llama: Path) -> None:
    rewrite(llama, lambda s: {n: t for n, t in s.items() if not n.startswith("lm_head")})
    with pytest.raises(ModelError, match=r"no lm_head\.weight"):
        load_far(inspect_backbone(llama), 2, task="causal-lm")
    load_far(inspect_backbone(llama), 2, task="sequence-classification", n_labels=2)


def test_a_block_that_is_missing(llama: Path) -> None:
    rewrite(llama, lambda s: {n: t for n, t in s.items() if ".layers.3." not in n})
    info = inspect_backbone(llama)
    load_near(info, 3)
    with pytest.raises(ModelError, match=r"layers\.3\."):
        load_far(info, 3, task="causal-lm")


def test_a_tensor_of_another_shape(llama: Path) -> None:
    rewrite(llama, lambda s: s | {"model.norm.weight": torch.ones(31)})
    with pytest.raises(ModelError, match=r"norm\.weight .*\(31,\).*\(32,\)"):
        load_far(inspect_backbone(llama), 2, task="causal-lm")


def test_a_file_cut_short(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read"):
        load_near(inspect_backbone(llama), 2)


def test_a_shard_that_is_not_there(llama: Path) -> None:
    names = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="cannot be read"):
        load_near(inspect_backbone(llama), 2)


def test_no_weights_at_all(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="do not load"):
        load_near(inspect_backbone(llama), 2)


@pytest.mark.parametrize("change", [{"num_attention_heads": "four"}, {"hidden_act": "none such"}])
def test_a_configuration_that_transformers_refuses(llama: Path, change: dict) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match="refused"):
        load_near(inspect_backbone(llama), 2)
