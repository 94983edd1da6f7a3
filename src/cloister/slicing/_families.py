"""The model families that slicing has been proven on, and where each keeps its parts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """Where the parts of one family are, as paths inside its base model (`LlamaModel`, `BertModel`, ...).

    Attributes:
        name: the `model_type` of its configuration.
        embeddings: paths of the modules that turn tokens into the first block's input.
        blocks: path of the list of blocks.
        norm: path of the norm after the last block; empty where the blocks end with their own.
        head: path, in the causal language model, of the module that makes logits.
        rotary: path of the rotary position module; empty where positions are learned.
        rotary_per_layer_type: whether full and sliding layers turn by different frequencies.
        config_keys: where the configuration of this family uses other names than most.
    """

    name: str
    embeddings: tuple[str, ...] = ("embed_tokens",)
    blocks: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    rotary: str = "rotary_emb"
    rotary_per_layer_type: bool = False
    config_keys: Mapping[str, str] | None = None

    def config_key(self, key: str) -> str:
        """The name that this family's configuration file uses for a common key."""
        return (self.config_keys or {}).get(key, key)


_GPT2_KEYS = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("bert", embeddings=("embeddings",), blocks="encoder.layer", norm="", head="cls", rotary=""),
        Family("gemma"),
        Family("gemma2"),
        Family("gemma3_text", rotary_per_layer_type=True),
        Family("gpt2", embeddings=("wte", "wpe"), blocks="h", norm="ln_f", rotary="", config_keys=_GPT2_KEYS),
        Family("gpt_neox", embeddings=("embed_in",), norm="final_layer_norm"),
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
    )
}

LayerType = Literal["bidirectional", "full_attention", "sliding_attention"]


def unproven_variant(family: str, config: Mapping[str, Any]) -> str:
    """Why a configuration of a known family is a variant that slicing has not been proven on; empty if it is not.

    Each of these changes what a block computes, or where a weight comes from. Loading such a model would give
    plausible and wrong features, so it is refused.
    """
    if config.get("quantization_config"):
        return "its weights are quantised"
    if config.get("use_bidirectional_attention"):
        return "its decoder attends in both directions (use_bidirectional_attention)"
    if config.get("add_cross_attention"):
        return "it attends to another model (add_cross_attention)"
    if family == "bert" and config.get("position_embedding_type", "absolute") != "absolute":
        return f"its positions are {config['position_embedding_type']!r}, not absolute"
    return ""
