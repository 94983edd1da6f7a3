"""Adapters: parameters that train beside a frozen backbone. State in and out, no I/O; torch is imported on use.

SPF + LoRA for any transformers model, in ordinary Python; the result is a plain model again:

    from transformers import AutoModelForCausalLM
    from cloister.adapters import SpfSpec, attach_spf, merge_spf

    model = attach_spf(AutoModelForCausalLM.from_pretrained("gpt2"), SpfSpec(heads=0.5, neurons=0.25))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merge_spf(model).save_pretrained("tuned")

Rows by their gradients on your own examples: `RowScores`. Keep the adapter alone: `trainable_state(model)` and
`placed_support(model).tensors()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports
from cloister.adapters._adapter_state import AdapterState, AdapterUpdate, applied, difference
from cloister.adapters._attach import adapter_spec, adapter_state, attach_adapter, load_adapter_state
from cloister.adapters._lora import LoraSpec, add_lora
from cloister.adapters._peft_files import CONFIG_FILE, WEIGHTS_FILE, parse_peft_files, peft_files
from cloister.adapters._spec import MAX_STATE_BYTES, AdapterSpec, PrefixLayout, PrefixSpec, StateSpec
from cloister.adapters._spf_spec import FarAdapterSpec, PartName, SpfSpec, SpfSupport
from cloister.adapters._state import load_trainable_state, n_frozen, n_trainable, trainable_state

if TYPE_CHECKING:
    from cloister.adapters._merged import merged_tensors
    from cloister.adapters._spf import (
        add_spf,
        attach_spf,
        check_spf,
        choose_support,
        merge_spf,
        placed_support,
        spf_facts,
        spf_units,
    )
    from cloister.adapters._spf_linear import SpfLinear
    from cloister.adapters._spf_scores import BlockScores, RowScores

# These import torch.
_HOME = {
    "BlockScores": "_spf_scores",
    "RowScores": "_spf_scores",
    "SpfLinear": "_spf_linear",
    "add_spf": "_spf",
    "attach_spf": "_spf",
    "check_spf": "_spf",
    "choose_support": "_spf",
    "merge_spf": "_spf",
    "merged_tensors": "_merged",
    "placed_support": "_spf",
    "spf_facts": "_spf",
    "spf_units": "_spf",
}

__all__ = [
    "CONFIG_FILE",
    "MAX_STATE_BYTES",
    "WEIGHTS_FILE",
    "AdapterSpec",
    "AdapterState",
    "AdapterUpdate",
    "BlockScores",
    "FarAdapterSpec",
    "LoraSpec",
    "PartName",
    "PrefixLayout",
    "PrefixSpec",
    "RowScores",
    "SpfLinear",
    "SpfSpec",
    "SpfSupport",
    "StateSpec",
    "adapter_spec",
    "adapter_state",
    "add_lora",
    "add_spf",
    "applied",
    "attach_adapter",
    "attach_spf",
    "check_spf",
    "choose_support",
    "difference",
    "load_adapter_state",
    "load_trainable_state",
    "merge_spf",
    "merged_tensors",
    "n_frozen",
    "n_trainable",
    "parse_peft_files",
    "peft_files",
    "placed_support",
    "spf_facts",
    "spf_units",
    "trainable_state",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
