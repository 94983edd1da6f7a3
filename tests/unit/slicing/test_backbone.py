"""Reading what a backbone is, and every refusal that names the file and says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import ModelError, UnsupportedFamilyError
from cloister.slicing import (
    FAMILIES,
    BackboneInfo,
    inspect_backbone,
    load_far,
    load_near,
    load_tokenizer,
    local_folder,
    resolve_cut,
)
from cloister.testing import TINY_FAMILIES, write_tiny_model


@pytest.fixture
def folder(tmp_path: Path, tiny_folders: dict[str, Path]) -> Path:
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_every_family_has_a_tiny_model() -> None:
    assert sorted(FAMILIES) == sorted(TINY_FAMILIES)


def test_an_unknown_tiny_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t5"):
        write_tiny_model(tmp_path, "t5")


def test_facts(info: BackboneInfo) -> None:
    assert (info.n_layers, info.hidden_size, info.vocab_size, info.max_length) == (4, 32, 288, 512)
    assert info.is_encoder == info.path.endswith("bert-encoder")
    assert info.revision == ""


def test_inspecting_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from cloister.slicing import inspect_backbone, resolve_cut; import cloister.adapters;"
        f"resolve_cut(inspect_backbone({str(folder)!r}), None);"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_an_unknown_name_of_the_package() -> None:
    import cloister.slicing

    with pytest.raises(AttributeError, match="nonsense"):
        cloister.slicing.nonsense  # noqa: B018


def test_defaults_of_the_family_count(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=None)
    assert inspect_backbone(folder).max_length == 2048  # LlamaConfig's default


def test_the_default_cut_is_half() -> None:
    info = BackboneInfo("m", "llama", 5, 8, 100, 64, is_encoder=False)
    assert resolve_cut(info, None) == 2
    assert [resolve_cut(info, cut) for cut in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cut", [-1, 5, 99, True])
def test_a_cut_outside_the_layers_is_refused(cut: int) -> None:
    info = BackboneInfo("m", "llama", 5, 8, 100, 64, is_encoder=False)
    with pytest.raises(ModelError, match="cut_layer") as caught:
        resolve_cut(info, cut)
    assert "0 to 4" in caught.value.hint


def test_loading_checks_the_cut_too(folder: Path) -> None:
    with pytest.raises(ModelError, match="cut_layer 4"):
        load_near(inspect_backbone(folder), 4)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_missing_folder(path: str) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        inspect_backbone(path)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ModelError, match="is not a folder"):
        inspect_backbone(tmp_path / "x")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        inspect_backbone(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_configuration_that_does_not_parse(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        inspect_backbone(folder)


@pytest.mark.parametrize("value", ["many", 0, -3, 1.5, True])
def test_a_configuration_with_a_senseless_count(folder: Path, value: Any) -> None:
    edit_config(folder, num_hidden_layers=value)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        inspect_backbone(folder)


def test_an_unknown_family_lists_the_known(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    with pytest.raises(UnsupportedFamilyError, match="t5") as caught:
        inspect_backbone(folder)
    assert all(name in caught.value.hint for name in FAMILIES)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"use_bidirectional_attention": True}, "both directions"),
        ({"add_cross_attention": True}, "another model"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_variants_without_a_proof_are_refused(folder: Path, change: dict, word: str) -> None:
    edit_config(folder, **change)
    with pytest.raises(UnsupportedFamilyError, match=word):
        inspect_backbone(folder)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, tokenizer=False)
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        inspect_backbone(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_a_tokenizer_that_does_not_load(folder: Path) -> None:
    info = inspect_backbone(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="does not load"):
        load_tokenizer(info)


def test_the_tokenizer_pads_on_the_right(info: BackboneInfo) -> None:
    tokenizer = load_tokenizer(info)
    batch = tokenizer(["fever", "é"], padding=True)
    assert batch["attention_mask"][1][-1] == 0
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "fever"


def test_a_tokenizer_without_padding_gets_it(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(inspect_backbone(folder))
    assert tokenizer.pad_token == "<eos>"


def test_a_hub_name_is_resolved_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder.rename(folder.parent / commit)
    asked = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    info = inspect_backbone("acme/tiny-llama")
    assert (info.path, info.revision) == ("acme/tiny-llama", commit)
    load_tokenizer(info)
    assert local_folder(info) == snapshot
    load_far(info, 2, task="causal-lm")
    # What was inspected is what is loaded, even if the name moves on meanwhile; weights only when they are needed.
    assert asked[0] == ("acme/tiny-llama", None, False)
    assert asked[1] == ("acme/tiny-llama", commit, False)
    assert asked[2] == ("acme/tiny-llama", commit, True)


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="acme/none") as caught:
        inspect_backbone("acme/none")
    assert "network" in caught.value.hint
