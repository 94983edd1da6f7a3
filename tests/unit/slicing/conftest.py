"""Tiny random models of every family and of the variants that change what a block computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from cloister.slicing import BackboneInfo, inspect_backbone
from cloister.testing import write_tiny_model


@dataclass(frozen=True)
class Variant:
    family: str
    label: str = ""
    decoder: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family}-{self.label}" if self.label else self.family


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

VARIANTS = (
    Variant("bert", "encoder"),
    Variant("bert", "decoder", decoder=True),
    Variant("bert", "decoder-untied", decoder=True, overrides={"tie_word_embeddings": False}),
    Variant("gemma"),
    Variant("gemma2"),
    Variant("gemma3_text"),
    Variant("gpt2"),
    Variant("gpt2", "scaled-by-layer", overrides={"scale_attn_by_inverse_layer_idx": True}),
    Variant("gpt_neox"),
    Variant("gpt_neox", "serial", overrides={"use_parallel_residual": False}),
    Variant("llama"),
    Variant("llama", "tied", overrides={"tie_word_embeddings": True}),
    Variant("llama", "rope-scaled", overrides={"rope_parameters": _LLAMA3_ROPE}),
    Variant("llama", "biased", overrides={"attention_bias": True, "mlp_bias": True}),
    Variant("mistral"),
    Variant("mistral", "not-sliding", overrides={"sliding_window": None}),
    Variant("qwen2"),
    Variant("qwen2", "not-sliding", overrides={"use_sliding_window": False, "layer_types": None}),
    Variant("qwen3"),
)


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {
        str(v): write_tiny_model(root / str(v), v.family, decoder=v.decoder, seed=i, **v.overrides)
        for i, v in enumerate(VARIANTS)
    }


@pytest.fixture(params=[str(v) for v in VARIANTS])
def info(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> BackboneInfo:
    return inspect_backbone(tiny_folders[request.param])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of three texts of 17, 9 and 3 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(5, 261, (3, 17), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    attention_mask[2, 3:] = 0
    return input_ids * attention_mask, attention_mask
