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
    from cloister.slicing._frozen_linears import OffloadReport, check_offload, offload_model
    from cloister.slicing._near import NearSide, load_near
    from cloister.slicing._outline import LinearGroup, Outline, empty_blocks, outline_backbone
    from cloister.slicing._whole import WholeSide, load_whole

__all__ = [
    "FAMILIES",
    "BackboneInfo",
    "FarSide",
    "LinearGroup",
    "NearSide",
    "OffloadReport",
    "Outline",
    "WholeSide",
    "check_offload",
    "empty_blocks",
    "inspect_backbone",
    "load_far",
    "load_near",
    "load_tokenizer",
    "load_whole",
    "local_folder",
    "offload_model",
    "outline_backbone",
    "pool",
    "resolve_cut",
]

_NEEDS_TORCH = {
    "FarSide": "_far",
    "LinearGroup": "_outline",
    "NearSide": "_near",
    "OffloadReport": "_frozen_linears",
    "Outline": "_outline",
    "check_offload": "_frozen_linears",
    "empty_blocks": "_outline",
    "load_far": "_far",
    "load_near": "_near",
    "offload_model": "_frozen_linears",
    "outline_backbone": "_outline",
    "pool": "_far",
    "WholeSide": "_whole",
    "load_whole": "_whole",
}

__getattr__, __dir__ = lazy_exports(__name__, _NEEDS_TORCH)
