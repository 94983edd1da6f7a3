"""Adapters: parameters that train beside a frozen backbone. State in and out, no I/O; torch is imported on use."""

from __future__ import annotations

from cloister.adapters._adapter_state import AdapterState, AdapterUpdate, applied, difference
from cloister.adapters._attach import adapter_spec, adapter_state, attach_adapter, load_adapter_state
from cloister.adapters._lora import LoraSpec, add_lora
from cloister.adapters._peft_files import CONFIG_FILE, WEIGHTS_FILE, parse_peft_files, peft_files
from cloister.adapters._spec import MAX_STATE_BYTES, AdapterSpec, PrefixLayout, PrefixSpec, StateSpec
from cloister.adapters._state import load_trainable_state, n_frozen, n_trainable, trainable_state

__all__ = [
    "CONFIG_FILE",
    "MAX_STATE_BYTES",
    "WEIGHTS_FILE",
    "AdapterSpec",
    "AdapterState",
    "AdapterUpdate",
    "LoraSpec",
    "PrefixLayout",
    "PrefixSpec",
    "StateSpec",
    "adapter_spec",
    "adapter_state",
    "add_lora",
    "applied",
    "attach_adapter",
    "difference",
    "load_adapter_state",
    "load_trainable_state",
    "n_frozen",
    "n_trainable",
    "parse_peft_files",
    "peft_files",
    "trainable_state",
]
