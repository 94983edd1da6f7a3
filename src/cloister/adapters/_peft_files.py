"""PEFT's own folder format as bytes: adapter_config.json and adapter_model.safetensors. Reading and writing is train's.

What is aggregated is not always what is released. A prefix with an MLP is aggregated as its embedding and MLP, which
are what trains; released is the prefix that they make, as PEFT does it, so that the files are a plain prefix. FFA-LoRA
is aggregated as B alone and released with the A that the seed gives, as plain LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from safetensors.numpy import save as save_safetensors

from cloister.adapters._adapter_state import AdapterState, Array, parse_tensors
from cloister.adapters._attach import HEADS, PEFT_TASKS, fixed_tensors, lora_spec
from cloister.adapters._lora import LoraSpec, lora_fields
from cloister.adapters._spec import MAX_STATE_BYTES, PrefixLayout, PrefixSpec, StateSpec, Task
from cloister.errors import LimitExceededError, MalformedMessageError, StateMismatchError, UnsupportedLayerError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 1 << 20
_PREFIX_FILE_NAME = "prompt_embeddings"
_PREFIX = "prompt_encoder.embedding.weight"
_MLP = "prompt_encoder.transform."
_LORA_PREFIX = "base_model.model."

# What may differ in a file of PEFT's without changing what the adapter computes here.
_FREE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}
_FREE |= {"encoder_hidden_size", "init_lora_weights", "init_weights", "modules_to_save", "target_modules"}


def peft_files(state: AdapterState, *, base_model: str = "") -> dict[str, bytes]:
    """The two files that `PeftModel.from_pretrained` loads. *Secret* until the job's policy releases them.

    Args:
        state: the adapter.
        base_model: the backbone's public name or folder, for PEFT's configuration; may stay empty.
    """
    from peft import LoraConfig, PrefixTuningConfig

    spec = state.spec
    tensors: dict[str, Array] = dict(state.tensors)
    common: dict[str, Any] = {"task_type": PEFT_TASKS[spec.task], "base_model_name_or_path": base_model or None}
    common |= {"inference_mode": True}
    if isinstance(spec.adapter, PrefixSpec):
        layout = cast("PrefixLayout", spec.layout)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("prompt_encoder.")}
        tensors[_PREFIX_FILE_NAME] = _prefix(state)
        config = PrefixTuningConfig(
            **common,
            num_virtual_tokens=spec.adapter.n_tokens,
            num_layers=layout.n_layers,
            num_attention_heads=layout.n_heads,
            token_dim=layout.width,
            num_transformer_submodules=1,
            encoder_hidden_size=layout.width,
        )
    else:
        tensors |= fixed_tensors(spec)
        config = LoraConfig(
            **common,
            **lora_fields(spec.adapter),
            target_modules=_modules(tensors),
            fan_in_fan_out=spec.is_transposed,
            modules_to_save=list(HEADS) if spec.task == "sequence-classification" else None,
        )
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {
        CONFIG_FILE: json.dumps(fields, indent=2, sort_keys=True).encode(),
        WEIGHTS_FILE: save_safetensors(tensors, metadata={"format": "pt"}),
    }


def parse_peft_files(files: Mapping[str, bytes]) -> AdapterState:
    """The state in files of PEFT's format, for example one to continue from. The bytes are untrusted.

    Success means that the files hold a plain LoRA or a plain prefix, with at most a classification head, in float32.
    The caller must still compare the spec with that of its own model (`load_adapter_state` does).

    Raises:
        MalformedMessageError, LimitExceededError: a file is missing, does not parse, or is too long.
        UnsupportedLayerError: an adapter of another kind or with an option that is not ours; names it.
        StateMismatchError: configuration and tensors do not fit; names the tensor.
    """
    config = _parse_config(files.get(CONFIG_FILE, b""))
    weights = files.get(WEIGHTS_FILE, b"")
    if len(weights) > MAX_STATE_BYTES:
        raise LimitExceededError(f"{WEIGHTS_FILE} is over the limit of {MAX_STATE_BYTES} bytes")
    tensors = parse_tensors(weights)
    if config["peft_type"] == "PREFIX_TUNING":
        tensors = {_PREFIX if name == _PREFIX_FILE_NAME else name: tensor for name, tensor in tensors.items()}
    state = AdapterState(_spec_of(config, tensors), tensors)
    _refuse_options(config, json.loads(peft_files(state)[CONFIG_FILE]))
    return state


def _prefix(state: AdapterState) -> Array:
    """The keys and values of every layer: what is trained, or what the MLP makes of the embedding."""
    own = state.tensors
    if _MLP + "0.weight" not in own:
        return own[_PREFIX]
    hidden = np.tanh(own[_PREFIX] @ own[_MLP + "0.weight"].T + own[_MLP + "0.bias"])
    return hidden @ own[_MLP + "2.weight"].T + own[_MLP + "2.bias"]


def _modules(tensors: Mapping[str, Array]) -> list[str]:
    return sorted({n.partition(".lora_A.")[0].removeprefix(_LORA_PREFIX) for n in tensors if ".lora_A." in n})


def _parse_config(blob: bytes) -> dict[str, Any]:
    if len(blob) > _MAX_CONFIG_BYTES:
        raise LimitExceededError(f"{CONFIG_FILE} is over the limit of {_MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(blob)
    except (ValueError, RecursionError):
        raise MalformedMessageError(f"{CONFIG_FILE} is missing or not JSON") from None
    if not isinstance(config, dict):
        raise MalformedMessageError(f"{CONFIG_FILE} is not an object")
    if config.get("peft_type") not in ("LORA", "PREFIX_TUNING"):
        raise UnsupportedLayerError(f"peft_type is {_short(config, 'peft_type')}", hint="LORA or PREFIX_TUNING is read")
    return cast("dict[str, Any]", config)


class _Fields:
    """A configuration file's fields as attributes, typed on reading."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def number(self, key: str, kinds: type | tuple[type, ...] = int) -> Any:
        value: Any = self._config.get(key)
        # Whole numbers beyond 2^31 are none of ours, and one beyond 2^1024 is no float.
        if (
            not isinstance(value, kinds)
            or (isinstance(value, bool) and kinds is not bool)
            or not -(1 << 31) < value < 1 << 31
        ):
            raise MalformedMessageError(f"{CONFIG_FILE} has no usable {key}")
        return value

    r = property(lambda self: self.number("r"))
    lora_alpha = property(lambda self: float(self.number("lora_alpha", (int, float))))
    lora_dropout = property(lambda self: float(self.number("lora_dropout", (int, float))))
    use_rslora = property(lambda self: self.number("use_rslora", bool))


def _spec_of(config: dict[str, Any], tensors: Mapping[str, Array]) -> StateSpec:
    """The spec that the configuration and the tensors' names give; `AdapterState` then compares every shape."""
    tasks: dict[str, Task] = {peft: task for task, peft in PEFT_TASKS.items()}
    fields = _Fields(config)
    task = tasks.get(str(config.get("task_type")))
    if task is None:
        raise UnsupportedLayerError(f"task_type is {_short(config, 'task_type')}", hint=f"one of {', '.join(tasks)}")
    heads = {name: tensor.shape for name, tensor in tensors.items() if _is_head(name)}
    if (task == "sequence-classification") != bool(heads):
        raise StateMismatchError("a classifier has a head, and nothing else has one", key=next(iter(heads), "head"))
    if config["peft_type"] == "PREFIX_TUNING":
        layout = PrefixLayout(*(fields.number(key) for key in ("num_layers", "num_attention_heads", "token_dim")))
        spec = PrefixSpec(fields.number("num_virtual_tokens"))
        shape = (spec.n_tokens, 2 * layout.n_layers * layout.width)
        return StateSpec(spec, task, {**heads, _PREFIX: shape}, {}, layout=layout)
    pairs = {name: tensor.shape for name, tensor in tensors.items() if name not in heads}
    spec = _lora_of(fields, pairs)
    return StateSpec(spec, task, {**heads, **pairs}, {}, is_transposed=fields.number("fan_in_fan_out", bool))


def _lora_of(fields: _Fields, pairs: Mapping[str, tuple[int, ...]]) -> LoraSpec:
    for name, shape in pairs.items():
        head, _, tail = name.rpartition(".lora_")
        in_block = any(part.isdigit() for part in head.split("."))
        if tail not in ("A.weight", "B.weight") or not in_block or not head.startswith(_LORA_PREFIX):
            raise StateMismatchError(f"{name} is no LoRA matrix of a block", key=name)
        other = f"{head}.lora_{'B' if tail == 'A.weight' else 'A'}.weight"
        rank = shape[0 if tail == "A.weight" else 1] if len(shape) == 2 else 0
        if rank != fields.r or rank < 1 or other not in pairs:
            raise StateMismatchError(f"{name} is {shape}, which is no half of a pair of rank {fields.r}", key=name)
    return lora_spec(fields, tuple(pairs))


def _is_head(name: str) -> bool:
    path = name.split(".")
    return path[0] == "base_model" and len(path) >= 3 and path[-2] in HEADS and path[-1] in ("weight", "bias")


def _refuse_options(config: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """An option that `plain` does not have changes what the adapter computes, so it must not be dropped."""
    for key, value in config.items():
        if key not in _FREE and value != plain.get(key) and (value or plain.get(key)):
            raise UnsupportedLayerError(f"{key[:40]} = {_short(config, key)} in {CONFIG_FILE} is not supported")


def _short(config: Mapping[str, Any], key: str) -> str:
    return repr(config.get(key))[:40]
