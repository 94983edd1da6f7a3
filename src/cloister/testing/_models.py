"""Tiny random models, written as ordinary Hugging Face folders.

They have the structure of their family (grouped queries, sliding windows, tied heads, scaled embeddings ...) at a size
where a test takes milliseconds. torch and transformers are imported when a model is written, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TINY_FAMILIES = (
    "bert",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)

_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>")
_N_BYTES = 256
_WINDOW_TOKENS = 5  # shorter than the test texts, so that a sliding window is seen to slide


def write_tiny_model(
    folder: str | Path,
    family: str = "llama",
    *,
    n_layers: int = 4,
    hidden_size: int = 32,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    vocab_size: int = 288,
    max_length: int = 512,
    decoder: bool = False,
    tokenizer: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny random model of a family and a byte-level tokenizer, as `save_pretrained` would.

    Args:
        folder: where to write; made if it is not there.
        family: one of `TINY_FAMILIES`.
        n_layers: transformer blocks.
        hidden_size: features per token; a multiple of `n_heads`.
        n_heads: attention heads.
        n_kv_heads: key and value heads, where the family groups its queries.
        vocab_size: at least 261, for 256 bytes and five special tokens.
        max_length: positions.
        decoder: for BERT only: write a `BertLMHeadModel` with causal attention in place of an encoder.
        tokenizer: False leaves the tokenizer's files out.
        seed: of the weights.
        **overrides: fields of the family's configuration, for example `tie_word_embeddings=False`.

    Returns:
        The folder.

    Raises:
        ValueError: the family is not one of `TINY_FAMILIES`.
    """
    import torch

    if family not in TINY_FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(TINY_FAMILIES)}")
    config = _config(
        family,
        decoder=decoder,
        fields={
            "num_hidden_layers": n_layers,
            "hidden_size": hidden_size,
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads,
            "head_dim": hidden_size // n_heads,
            "intermediate_size": 2 * hidden_size,
            "vocab_size": vocab_size,
            "max_position_embeddings": max_length,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.15,
        },
        overrides=overrides,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(config)
        _move_off_the_identity(model)
    model.save_pretrained(folder)
    if tokenizer:
        _write_tokenizer(folder, max_length=max_length, pair=family == "bert" and not decoder)
    return folder


def _config(family: str, *, decoder: bool, fields: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    sliding = {"sliding_window": _WINDOW_TOKENS}
    alternating = ["sliding_attention", "full_attention"] * fields["num_hidden_layers"]
    alternating = alternating[: fields["num_hidden_layers"]]
    own: dict[str, dict[str, Any]] = {
        "bert": {"is_decoder": decoder},
        "gemma2": {**sliding, "layer_types": alternating, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        "gemma3_text": {**sliding, "layer_types": alternating, "query_pre_attn_scalar": 8},
        "gpt_neox": {"rotary_pct": 0.5},
        "mistral": sliding,
        "qwen2": {**sliding, "use_sliding_window": True, "layer_types": alternating},
    }
    not_grouped = {"bert", "gpt2", "gpt_neox"}
    kept = {
        k: v for k, v in fields.items() if family not in not_grouped or k not in {"num_key_value_heads", "head_dim"}
    }
    if family == "gpt2":
        kept["n_inner"] = kept.pop("intermediate_size")
    return CONFIG_MAPPING[family](**{**kept, **own.get(family, {}), **overrides})


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    from transformers import AutoModel, AutoModelForCausalLM

    is_encoder = config.model_type == "bert" and not config.is_decoder
    return (AutoModel if is_encoder else AutoModelForCausalLM).from_config(config)


def _move_off_the_identity(model: PreTrainedModel) -> None:
    """Norms start as the identity and biases at zero, so a test could not see one of them left out."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)


def _write_tokenizer(folder: Path, *, max_length: int, pair: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*_SPECIAL_TOKENS, *alphabet))}
    if len(vocab) != len(_SPECIAL_TOKENS) + _N_BYTES:
        raise AssertionError("the byte alphabet is not 256 characters")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))  # noqa: S106 - a token of a vocabulary
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    inputs = ["input_ids", "attention_mask"]
    if pair:
        names |= {"cls_token": "<bos>", "sep_token": "<eos>", "mask_token": "<mask>"}
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        template = {"single": "<bos> $A <eos>", "pair": "<bos> $A <eos> $B:1 <eos>:1"}
    else:
        template = {"single": "<bos> $A", "pair": "<bos> $A $B"}
    backend.post_processor = processors.TemplateProcessing(
        **template, special_tokens=[("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        padding_side="right",
        model_input_names=inputs,
        clean_up_tokenization_spaces=False,
        **names,
    )
    tokenizer.save_pretrained(folder)
