"""PEFT's folder format: a stock `PeftModel` loads what we write, and what it writes we read or refuse by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save

from cloister.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    LoraSpec,
    PrefixSpec,
    adapter_state,
    attach_adapter,
    load_adapter_state,
    parse_peft_files,
    peft_files,
)
from cloister.errors import (
    AdapterError,
    LimitExceededError,
    MalformedMessageError,
    StateMismatchError,
    StoreError,
    UnsupportedLayerError,
    WireError,
)
from cloister.train import load_peft, save_peft

from .conftest import Load, disturb, logits

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SPECS: dict[str, AdapterSpec] = {
    "lora": LoraSpec(r=2, alpha=3.5, dropout=0.1, use_rslora=True),
    "ffa-lora": LoraSpec(r=2, alpha=4, freeze_a=True),
    "prefix": PrefixSpec(n_tokens=4),
    "prefix-mlp": PrefixSpec(n_tokens=4, projection=True, hidden_size=6),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_stock_peft_model_loads_it_and_computes_the_same(
    load: Load, case: str, spec: AdapterSpec, tmp_path: Path
) -> None:
    model = attach_adapter(load(case), spec, seed=1)
    disturb(model)
    save_peft(adapter_state(model), tmp_path / "deep" / "folder", base_model="org/backbone")
    stock = PeftModel.from_pretrained(load(case), tmp_path / "deep" / "folder")
    assert stock.peft_config["default"].base_model_name_or_path == "org/backbone"
    torch.testing.assert_close(logits(stock), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_can_be_continued_from(load: Load, case: str, spec: AdapterSpec, tmp_path: Path) -> None:
    model = attach_adapter(load(case), spec, seed=1)
    disturb(model)
    save_peft(adapter_state(model), tmp_path)
    state = load_peft(tmp_path)
    again = attach_adapter(load(case), state.spec.adapter, seed=9)
    load_adapter_state(again, state)
    torch.testing.assert_close(logits(again), logits(model), atol=2e-5, rtol=1e-5)


def test_what_stock_peft_saves_is_read(load: Load, case: str, tmp_path: Path) -> None:
    task = {"causal-lm": "CAUSAL_LM"}.get(case.partition("-")[2], "SEQ_CLS")
    name = next(n.rpartition(".")[2] for n, _ in load(case).named_modules() if n.rpartition(".")[2] in _QUERIES)
    stock = get_peft_model(
        load(case), LoraConfig(task_type=task, r=3, target_modules=[name], fan_in_fan_out=name == "c_attn")
    )
    disturb(stock)
    stock.save_pretrained(tmp_path)
    state = load_peft(tmp_path)
    model = attach_adapter(load(case), state.spec.adapter, seed=0)
    load_adapter_state(model, state)
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-6, rtol=1e-5)


_QUERIES = ("q_proj", "query", "c_attn", "query_key_value")


def test_what_stock_peft_saves_of_a_prefix_is_read(load: Load, tmp_path: Path) -> None:
    case = "qwen3-sequence-classification"
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    stock = get_peft_model(load(case), config)
    disturb(stock)
    stock.save_pretrained(tmp_path)
    state = load_peft(tmp_path)
    model = attach_adapter(load(case), state.spec.adapter, seed=0)
    load_adapter_state(model, state)
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-6, rtol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(load: Load) -> dict[str, bytes]:
    model = attach_adapter(load("llama-sequence-classification"), LoraSpec(r=2, targets=("q_proj",)), seed=1)
    return peft_files(adapter_state(model))


@pytest.fixture
def prefix_files(load: Load) -> dict[str, bytes]:
    return peft_files(adapter_state(attach_adapter(load("llama-causal-lm"), PrefixSpec(2), seed=1)))


def configured(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    config = json.loads(files[CONFIG_FILE]) | changes
    return files | {CONFIG_FILE: json.dumps({k: v for k, v in config.items() if v is not ...}).encode()}


def weighted(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    tensors = load_safetensors(files[WEIGHTS_FILE]) | changes
    return files | {WEIGHTS_FILE: save({name: t for name, t in tensors.items() if t is not ...})}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedLayerError, "IA3"),
        ({"task_type": "SEQ_2_SEQ_LM"}, UnsupportedLayerError, "SEQ_2_SEQ_LM"),
        ({"use_dora": True}, UnsupportedLayerError, "use_dora"),
        ({"bias": "all"}, UnsupportedLayerError, "bias"),
        ({"alpha_pattern": {"q_proj": 3}}, UnsupportedLayerError, "alpha_pattern"),
        ({"fan_in_fan_out": True, "lora_bias": True}, UnsupportedLayerError, "lora_bias"),
        ({"something_new": 7}, UnsupportedLayerError, "something_new"),
        ({"r": "2"}, MalformedMessageError, "r"),
        ({"r": True}, MalformedMessageError, "r"),
        ({"r": 0}, StateMismatchError, "rank 0"),
        ({"lora_alpha": None}, MalformedMessageError, "lora_alpha"),
        ({"lora_alpha": -1}, AdapterError, "not possible"),
        ({"lora_dropout": ...}, MalformedMessageError, "lora_dropout"),
        ({"use_rslora": 1}, MalformedMessageError, "use_rslora"),
        ({"fan_in_fan_out": ...}, MalformedMessageError, "fan_in_fan_out"),
        ({"task_type": "CAUSAL_LM"}, StateMismatchError, "head"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_ours_is_refused(
    files: dict[str, bytes], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_peft_files(configured(files, **change))


_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
_B = _A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({_A: ...}, _B),
        ({_B: ...}, _A),
        ({_A: np.zeros((3, 32), np.float32)}, _A),
        ({_A: np.zeros(2, np.float32)}, _A),
        ({_A: np.zeros((2, 32))}, _A),
        ({_A: np.full((2, 32), np.nan, np.float32)}, _A),
        ({_A.replace("lora_A", "lora_E"): np.zeros((2, 32), np.float32)}, _A.replace("lora_A", "lora_E")),
        ({"base_model.model.x.lora_A.weight": np.zeros((2, 3), np.float32)}, "base_model.model.x.lora_A.weight"),
        ({"model.layers.0.x.lora_A.weight": np.zeros((2, 3), np.float32)}, "model.layers.0.x.lora_A.weight"),
        ({"base_model.model.score.weight": ...}, "head"),
    ],
    ids=["no-a", "no-b", "rank", "vector", "float64", "nan", "lora-e", "no-block", "no-prefix", "no-head"],
)
def test_tensors_that_are_not_the_configurations_are_named(
    files: dict[str, bytes], change: dict[str, Any], key: str
) -> None:
    with pytest.raises(StateMismatchError) as caught:
        parse_peft_files(weighted(files, **change))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_virtual_tokens": 3}, StateMismatchError),
        ({"num_layers": "3"}, MalformedMessageError),
        ({"token_dim": ...}, MalformedMessageError),
        ({"num_virtual_tokens": 0}, AdapterError),
        ({"num_transformer_submodules": 2}, UnsupportedLayerError),
        ({"prefix_projection": True}, UnsupportedLayerError),
    ],
    ids=str,
)
def test_a_prefix_that_does_not_fit_is_refused(
    prefix_files: dict[str, bytes], change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        parse_peft_files(configured(prefix_files, **change))


@pytest.mark.parametrize("blob", [b"", b"[]", b"{", b"[" * 100_000, b"7", b"{}"], ids=lambda b: b[:3].decode())
def test_a_configuration_that_is_no_object_is_refused(files: dict[str, bytes], blob: bytes) -> None:
    with pytest.raises((WireError, UnsupportedLayerError)):
        parse_peft_files(files | {CONFIG_FILE: blob})


def test_limits(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitExceededError, match="adapter_config"):
        parse_peft_files(files | {CONFIG_FILE: bytes((1 << 20) + 1)})
    monkeypatch.setattr("cloister.adapters._peft_files.MAX_STATE_BYTES", 10)
    with pytest.raises(LimitExceededError, match="adapter_model"):
        parse_peft_files(files)


def test_weights_that_are_missing_are_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(MalformedMessageError):
        parse_peft_files({CONFIG_FILE: files[CONFIG_FILE]})


def test_a_folder_that_is_not_there_or_cannot_be_made(tmp_path: Path, files: dict[str, bytes], load: Load) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        load_peft(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be made"):
        save_peft(parse_peft_files(files), tmp_path / "file" / "folder")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_configuration_gives_a_state_or_a_refusal(
    files: dict[str, bytes], prefix_files: dict[str, bytes], data: st.DataObject
) -> None:
    chosen = data.draw(st.sampled_from([files, prefix_files]))
    keys = st.sampled_from(sorted(json.loads(chosen[CONFIG_FILE])))
    changes = data.draw(st.dictionaries(keys, _JSON, max_size=3))
    try:
        state = parse_peft_files(configured(chosen, **changes))
    except (WireError, AdapterError):
        return
    assert peft_files(state)[WEIGHTS_FILE] == chosen[WEIGHTS_FILE]
