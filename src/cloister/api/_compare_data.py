"""The examples of a comparison: what is asked of every trained model, and the tokens that the plain peers train on.

Whoever runs a comparison plays every client, so all clients' data is read here. *Secret* of that person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister._files import write_whole
from cloister.slicing import inspect_backbone

if TYPE_CHECKING:
    from cloister.config import Job
    from cloister.train import Dataset, Example, Features


@dataclass(frozen=True)
class Question:
    """One held-out example.

    Attributes:
        client: whose.
        index: its place among the client's held-out examples.
        asked: the text, the pair of texts, or the prompt.
        label: class index; -1 for causal-lm.
        reference: the completion that is wanted; empty for classification.
    """

    client: str
    index: int
    asked: str | tuple[str, str] = field(repr=False)
    label: int = field(default=-1, repr=False)
    reference: str = field(default="", repr=False)

    @property
    def id(self) -> str:
        """The same for every method: what figures are paired by."""
        return f"{self.client}/{self.index}"


def client_datasets(job: Job, name: str) -> dict[str, Dataset]:
    """One client's data by split.

    Raises:
        DataError: a file is missing or lacks a column.
    """
    from cloister.train import open_dataset

    client, task = job.client(name), job.task_spec(is_encoder=inspect_backbone(job.model.path).is_encoder)
    return {
        split: open_dataset(
            data.path, columns=client.column_map(), task=task, split=data.split, where=data.where or None
        )
        for split, data in client.datasets.items()
    }


def held_out(job: Job, limit: int | None = None) -> list[Question]:
    """Every client's held-out examples; with a limit the first of each client in turn, as many in all.

    Raises:
        DataError: a row cannot be used.
    """
    found: dict[str, list[Question]] = {}
    for name in job.client_names:
        dataset = client_datasets(job, name).get("test")
        questions = found.setdefault(name, [])
        for example in dataset or ():
            if limit is not None and len(questions) >= limit:
                break
            questions.append(_question(name, example))
    if limit is None:
        return [question for questions in found.values() for question in questions]
    longest = max(map(len, found.values()), default=0)
    turns = [questions[i] for i in range(longest) for questions in found.values() if i < len(questions)]
    return turns[:limit]


def by_client(questions: list[Question]) -> dict[str, list[Question]]:
    """The same, by whose they are."""
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.client, []).append(question)
    return found


def data_digests(job: Job) -> dict[str, str]:
    """SHA-256 of every client's data by `client/split`. *Secret*: it would confirm a guess of the data."""
    return {
        f"{name}/{split}": dataset.fingerprint()
        for name in job.client_names
        for split, dataset in client_datasets(job, name).items()
    }


def _question(client: str, example: Example) -> Question:
    if example.prompt is not None:
        return Question(client, example.index, example.prompt, reference=example.completion or "")
    text = example.text or ""
    asked = text if example.text_b is None else (text, example.text_b)
    return Question(client, example.index, asked, label=-1 if example.label is None else example.label)


# --- tokens for the plain peers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFiles:
    """Every client's examples as tokens, made by cloister's own encoder, so that all methods read the same ones.

    Attributes:
        train, test: a file of each client that has that split, by its name, in the job's order.
        every_test: all tests together.
        n_train: examples of each client.
        text_bytes: of all clients' texts as UTF-8: what has to move where data is put in one place.
        max_length: most tokens of a text.
    """

    train: Mapping[str, Path]
    test: Mapping[str, Path]
    every_test: Path
    n_train: Mapping[str, int]
    text_bytes: int
    max_length: int


def write_tokens(job: Job, folder: Path) -> TokenFiles:
    """Tokenises every client's data into JSON lines in `folder`.

    Raises:
        DataError: a row cannot be used.
    """
    from cloister.slicing import load_tokenizer
    from cloister.train import token_features

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    info = inspect_backbone(job.model.path)
    task, tokenizer = job.task_spec(is_encoder=info.is_encoder), load_tokenizer(info)
    paths: dict[str, dict[str, Path]] = {"train": {}, "test": {}}
    n_train, every_test, text_bytes = {}, b"", 0
    for name in job.client_names:
        datasets = client_datasets(job, name)
        features, _ = token_features(name, datasets, tokenizer, task, model_max_length=info.max_length)
        for split in datasets:
            lines = _lines(features, split)
            paths[split][name] = folder / f"{name}-{split}.jsonl"
            write_whole(paths[split][name], lines)
            every_test += lines if split == "test" else b""
        n_train[name] = len(features.split("train"))
        text_bytes += sum(_text_bytes(example) for dataset in datasets.values() for example in dataset)
    write_whole(folder / "test.jsonl", every_test)
    max_length = task.max_length or info.max_length
    return TokenFiles(paths["train"], paths["test"], folder / "test.jsonl", n_train, text_bytes, max_length)


def _lines(features: Features, split: str) -> bytes:
    rows: list[dict[str, Any]] = []
    for key in features.split(split):
        feature = features.get(key)
        columns = feature.hidden.t().tolist()  # of ids, or of ids and token types
        row: dict[str, Any] = {"input_ids": columns}
        if feature.hidden.dim() == 2:
            row = dict(zip(("input_ids", "token_type_ids"), columns, strict=True))
        labels = {"label": feature.label} if feature.labels is None else {"labels": feature.labels.tolist()}
        rows.append({**row, **labels})
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def _text_bytes(example: Example) -> int:
    parts = (example.text, example.text_b, example.prompt, example.completion)
    return sum(len(part.encode()) for part in parts if part)
