"""Which parts of a Hugging Face model run where: the near side, the far side, and the cut between them.

For every family here a test proves that near then far equals the whole model, forwards and for the far side's
gradients. What only reads a configuration (`inspect_backbone`, `resolve_cut`) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cloister.slicing._backbone import BackboneInfo, inspect_backbone, load_tokenizer, local_folder, resolve_cut
from cloister.slicing._families import FAMILIES

if TYPE_CHECKING:
    from cloister.slicing._far import FarSide, load_far, pool
    from cloister.slicing._near import NearSide, load_near

__all__ = [
    "FAMILIES",
    "BackboneInfo",
    "FarSide",
    "NearSide",
    "inspect_backbone",
    "load_far",
    "load_near",
    "load_tokenizer",
    "local_folder",
    "pool",
    "resolve_cut",
]

_NEEDS_TORCH = {
    "FarSide": "cloister.slicing._far",
    "NearSide": "cloister.slicing._near",
    "load_far": "cloister.slicing._far",
    "load_near": "cloister.slicing._near",
    "pool": "cloister.slicing._far",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
