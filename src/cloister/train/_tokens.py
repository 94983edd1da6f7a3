"""One client's text as token ids in memory: what its own enclave trains on (Method 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cloister.errors import DataError
from cloister.train._encoder import label_tensor
from cloister.train._features import MemoryFeatures
from cloister.train._shards import Feature
from cloister.train._text import TextEncoder, Tokenised

if TYPE_CHECKING:
    from cloister.train._data import Dataset, Example, TaskSpec

_EXAMPLES_AT_ONCE = 512


def token_features(
    client: str, datasets: Mapping[str, Dataset], tokenizer: Any, task: TaskSpec, *, model_max_length: int | None
) -> tuple[MemoryFeatures, int]:
    """Tokenise a client's splits. *Secret*: they stay in its enclave.

    Args:
        client: its name, *public*.
        datasets: by split; "train" must be among them.
        tokenizer: of transformers.
        model_max_length: positions that the backbone has, less those of a prefix.

    Returns:
        Features whose `hidden` are ids int64 [tokens], or ids and types [tokens, 2] where the model tells the texts of
        a pair apart; and how many examples were cut to the limit.

    Raises:
        DataError: a row cannot be used, or the client has no training data.
    """
    if "train" not in datasets:
        raise DataError(f"client {client} has no training data")
    encoder = TextEncoder(tokenizer, task, model_max_length=model_max_length)
    parts: dict[str, list[Feature]] = {}
    n_truncated = 0
    for split, dataset in datasets.items():
        features = parts.setdefault(split, [])
        window: list[Example] = []
        for example in dataset:
            window.append(example)
            if len(window) == _EXAMPLES_AT_ONCE:
                n_truncated += _add(encoder, dataset, window, features)
                window = []
        n_truncated += _add(encoder, dataset, window, features)
    if not parts["train"]:
        raise DataError(
            f"client {client} has no training examples (clients.train)", hint="look at its file and `where`"
        )
    return MemoryFeatures({client: parts}), n_truncated


def question_features(texts: list[Any], tokenizer: Any, task: TaskSpec, *, model_max_length: int | None) -> list[Any]:
    """Questions as features without labels, in their order. *Secret*."""
    from cloister.train._encoder import as_question

    encoder = TextEncoder(tokenizer, task, model_max_length=model_max_length)
    examples = [as_question(i, text, task) for i, text in enumerate(texts)]
    if not examples:
        raise DataError("there is no text to predict for", hint="give at least one")
    return [_feature(item) for item in encoder.encode(examples, place=lambda example: f"text {example.row}")]


def _add(encoder: TextEncoder, dataset: Dataset, window: list[Example], features: list[Feature]) -> int:
    items = encoder.encode(window, place=dataset.place)
    features += [_feature(item) for item in items]
    return sum(item.truncated for item in items)


def _feature(item: Tokenised) -> Feature:
    ids = torch.tensor(item.input_ids, dtype=torch.int64)
    if item.type_ids is not None:
        ids = torch.stack((ids, torch.tensor(item.type_ids, dtype=torch.int64)), dim=-1)
    return Feature(item.index, ids, item.label, label_tensor(item))
