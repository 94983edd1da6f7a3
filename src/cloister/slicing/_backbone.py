"""What a backbone is, read from its configuration alone. Imports neither torch nor transformers unless it must."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.errors import ModelError, UnsupportedFamilyError
from cloister.slicing._families import FAMILIES, Family, unproven_variant

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
_CONFIG_PATTERNS = ["*.json", "*.txt", "*.model"]
_WEIGHT_PATTERNS = [*_CONFIG_PATTERNS, "*.safetensors"]
_TOKENIZER_HINT = "save the tokenizer beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"


@dataclass(frozen=True)
class BackboneInfo:
    """The public facts about a backbone that decide how it is cut.

    Attributes:
        path: a local folder, or the name of a model on the Hugging Face hub.
        family: `model_type`, a key of the proven families.
        n_layers: transformer blocks.
        hidden_size: features per token of the boundary tensor.
        vocab_size: rows of the embedding.
        max_length: positions a text may use, in tokens.
        is_encoder: whether a token sees the tokens after it. An encoder cannot do causal-lm.
        revision: the hub commit that the name stood for when it was inspected; empty for a folder.
    """

    path: str
    family: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    max_length: int
    is_encoder: bool
    revision: str = ""


def inspect_backbone(path_or_name: str | Path, *, needs_tokenizer: bool = True) -> BackboneInfo:
    """Read a backbone's configuration, without its weights.

    A name that is not a folder is looked up on the Hugging Face hub (or its local cache); only its configuration and
    tokenizer are fetched.

    Args:
        path_or_name: a local folder, or a name on the hub.
        needs_tokenizer: refuse a backbone without one, since no text can be run through it.

    Raises:
        UnsupportedFamilyError: slicing has not been proven on this family or variant.
        ModelError: there is no such folder, no usable configuration in it, or no tokenizer.
    """
    path = str(path_or_name)
    folder, revision = _config_folder(path)
    config = _read_config(folder, path)
    family = _family_of(config, path)
    if needs_tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{path} has no tokenizer", path=path, hint=_TOKENIZER_HINT)
    return BackboneInfo(
        path=path,
        family=family.name,
        n_layers=_positive(config, family, "num_hidden_layers", folder, path),
        hidden_size=_positive(config, family, "hidden_size", folder, path),
        vocab_size=_positive(config, family, "vocab_size", folder, path),
        max_length=_positive(config, family, "max_position_embeddings", folder, path),
        is_encoder=family.name == "bert" and not config.get("is_decoder", False),
        revision=revision,
    )


def resolve_cut(info: BackboneInfo, cut_layer: int | None) -> int:
    """The number of near-side blocks: `cut_layer`, or half of the blocks where it is None.

    0 leaves only the embeddings near. The last block is always far, for there would be nothing to tune otherwise.

    Raises:
        ModelError: the cut is outside the layers.
    """
    if cut_layer is None:
        return info.n_layers // 2
    if isinstance(cut_layer, bool) or not 0 <= cut_layer < info.n_layers:
        raise ModelError(
            f"cut_layer {cut_layer} is outside the {info.n_layers} layers of {info.path}",
            path=info.path,
            hint=f"choose cut_layer from 0 to {info.n_layers - 1}; leave it out for {info.n_layers // 2}",
        )
    return cut_layer


def local_folder(info: BackboneInfo) -> Path:
    """The local folder that holds the backbone's weights; fetches them where `info` names a hub model.

    The folder is public. What runs in an enclave must be measured from here, and before the network is closed.

    Raises:
        ModelError: the folder is gone, or the hub does not give the model.
    """
    folder = Path(info.path)
    return folder if folder.is_dir() else _from_hub(info.path, info.revision or None, _WEIGHT_PATTERNS)


def load_tokenizer(info: BackboneInfo) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, padding on the right, with a padding token.

    Raises:
        ModelError: the tokenizer's files do not load.
    """
    from transformers import AutoTokenizer

    folder = config_folder(info)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"the tokenizer of {info.path} does not load: {first_line(error)}", path=info.path, hint=_TOKENIZER_HINT
        ) from error
    if tokenizer.pad_token_id is None:
        # Padding never crosses the boundary and is never attended to, so any token can stand for it.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def config_folder(info: BackboneInfo) -> Path:
    """The local folder with the backbone's configuration and tokenizer; fetches these where `info` names a hub model.

    Raises:
        ModelError: the hub does not give them.
    """
    folder = Path(info.path)
    return folder if folder.is_dir() else _from_hub(info.path, info.revision or None, _CONFIG_PATTERNS)


def _config_folder(path: str) -> tuple[Path, str]:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{path} has no config.json", path=path, hint="give the folder that `save_pretrained` wrote"
            )
        return folder, ""
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or folder.exists():
        raise ModelError(
            f"{path} is not a folder", path=path, hint="give a local model folder, or a hub name like org/model"
        )
    snapshot = _from_hub(path, None, _CONFIG_PATTERNS)
    return snapshot, snapshot.name  # the hub cache names a snapshot's folder by its commit


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"{name} is neither a folder here nor a model that the hub gives",
            path=name,
            hint="check the path; without network access only local folders and cached models can be used",
        ) from error


def _read_config(folder: Path, path: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json of {path} does not parse: {first_line(error)}", path=path) from error
    if not isinstance(config, dict):
        raise ModelError(f"config.json of {path} is not an object", path=path)
    return config


def _family_of(config: dict[str, Any], path: str) -> Family:
    name = config.get("model_type")
    supported = ", ".join(sorted(FAMILIES))
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedFamilyError(
            f"{path} is of family {name!r}, which cloister cannot cut", path=path, hint=f"supported: {supported}"
        )
    if variant := unproven_variant(name, config):
        raise UnsupportedFamilyError(
            f"{path} cannot be cut: {variant}", path=path, hint=f"use a plain model of one of: {supported}"
        )
    return FAMILIES[name]


def _positive(config: dict[str, Any], family: Family, key: str, folder: Path, path: str) -> int:
    value = config.get(family.config_key(key), config.get(key))
    if value is None:
        # A hand-written configuration may rely on the family's defaults, which only transformers knows.
        value = getattr(load_config(folder, path), key, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json of {path} has no usable {family.config_key(key)}", path=path)
    return value


def load_config(folder: Path, path: str) -> PreTrainedConfig:
    """The configuration as transformers reads it, with its defaults and checks.

    Raises:
        ModelError: transformers refuses it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"config.json of {path} is refused: {first_line(error)}", path=path) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
