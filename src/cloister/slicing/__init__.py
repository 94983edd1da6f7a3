"""Which parts of a Hugging Face model run where: the near side, the far side, and the cut between them.

For every family here a test proves that near then far equals the whole model, forwards and for the far side's
gradients. What only reads a configuration (`inspect_backbone`, `resolve_cut`) does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports
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
    "FarSide": "_far",
    "NearSide": "_near",
    "load_far": "_far",
    "load_near": "_near",
    "pool": "_far",
}

__getattr__, __dir__ = lazy_exports(__name__, _NEEDS_TORCH)
