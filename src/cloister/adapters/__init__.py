"""Adapters: parameters that train beside a frozen backbone. State in and out, no I/O; torch is imported on use."""

from __future__ import annotations

from cloister.adapters._lora import LoraSpec, add_lora
from cloister.adapters._state import load_trainable_state, n_frozen, n_trainable, trainable_state

__all__ = ["LoraSpec", "add_lora", "load_trainable_state", "n_frozen", "n_trainable", "trainable_state"]
