"""Text of one example to token ids and labels, the same for training and for a later question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloister.errors import DataError
from cloister.train._data import Example, TaskSpec

IGNORED = -100
"""Label of a position without loss, as Hugging Face has it."""

MIN_CAUSAL_TOKENS = 2
"""The loss predicts the next token, so there must be one to read and one to predict."""


@dataclass(frozen=True)
class Tokenised:
    """One example as token ids. *secret*: the client's host.

    Attributes:
        index: `Example.index`.
        input_ids: real tokens only.
        label: class index (sequence-classification).
        labels: as long as `input_ids`; the id at each completion position, -100 on the prompt (causal-lm).
        type_ids: as long as `input_ids`; which text of a pair a token is of, where the model tells them apart (BERT).
        truncated: whether it was cut to the limit.
    """

    index: int
    input_ids: list[int] = field(repr=False)
    label: int | None = field(default=None, repr=False)
    labels: list[int] | None = field(default=None, repr=False)
    type_ids: list[int] | None = field(default=None, repr=False)
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class TextEncoder:
    """Tokenises examples for a task, within the length limit.

    sequence-classification: what the tokenizer makes of the text or the pair, special tokens included. Where it has no
    separator for pairs, a line break is put between the two.

    causal-lm: prefix + prompt + completion + end. Prefix is what the tokenizer puts before a text (a BOS or CLS token,
    or nothing), end its EOS, else SEP, else nothing. Prompt and completion are tokenised apart, so a later question
    has the very tokens that were trained on.

    Attributes:
        limit: most tokens of an example; None where neither the task nor the model sets one.
    """

    def __init__(self, tokenizer: Any, task: TaskSpec, *, model_max_length: int | None = None) -> None:
        """Prepare.

        Args:
            tokenizer: of transformers.
            task: labels, limit, and what to do over it.
            model_max_length: positions that the backbone has.

        Raises:
            DataError: the task's limit is over the model's, or too small to hold any text.
        """
        self.task = task
        self._tokenizer = tokenizer
        self.limit = _limit(task.max_length, model_max_length)
        empty = list(tokenizer("", add_special_tokens=True, verbose=False)["input_ids"])
        if self.limit is not None and self.limit < len(empty) + MIN_CAUSAL_TOKENS:
            raise DataError(
                f"task.max_length is {self.limit}, which leaves no room for text", hint="128 is a usual value"
            )
        self._prefix = _prefix(tokenizer)
        ends = (getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id"))
        self._end = next(([int(i)] for i in ends if i is not None), [])
        self._has_pairs = _has_separator(tokenizer)
        self._has_types = self._has_pairs and "token_type_ids" in tokenizer.model_input_names
        self.pad_id = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0

    def encode(self, examples: Sequence[Example], *, place: Callable[[Example], str]) -> list[Tokenised]:
        """One Tokenised per example, in their order.

        Args:
            examples: with labels, or without for a question (then a causal-lm example has an empty completion).
            place: names an example in a message ("train.jsonl, line 17").

        Raises:
            DataError: a text has no tokens, or is over the limit and the task says "error".
        """
        if not examples:
            return []
        build = self._causal if self.task.name == "causal-lm" else self._classification
        found = build(examples)
        for example, item in zip(examples, found, strict=True):
            self._check(example, item, place)
        return found

    def _ids(self, texts: Sequence[Any], **options: Any) -> Any:
        # verbose=False: the length is checked here, and transformers would warn about the same.
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False, **options}
        return self._tokenizer(list(texts), **options)

    def _classification(self, examples: Sequence[Example]) -> list[Tokenised]:
        cuts = self.task.on_too_long == "truncate"
        found: list[Tokenised] = []
        typed = self._has_types and any(e.text_b is not None for e in examples)
        texts = [self._one_text(example) for example in examples]
        out = self._ids(texts, return_token_type_ids=typed)
        types = out["token_type_ids"] if typed else [None] * len(texts)
        for example, text, ids, type_ids in zip(examples, texts, out["input_ids"], types, strict=True):
            if over := cuts and self._is_over(len(ids)):
                # For a pair the longer of the two is cut.
                cut = self._ids([text], truncation=True, max_length=self.limit, return_token_type_ids=typed)
                ids, type_ids = cut["input_ids"][0], cut["token_type_ids"][0] if typed else None  # noqa: PLW2901
            found.append(Tokenised(example.index, ids, label=example.label, type_ids=type_ids, truncated=over))
        return found

    def _one_text(self, example: Example) -> str | tuple[str, str]:
        text = example.text or ""
        if example.text_b is None:
            return text
        return (text, example.text_b) if self._has_pairs else f"{text}\n{example.text_b}"

    def _causal(self, examples: Sequence[Example]) -> list[Tokenised]:
        prompts = self._ids([e.prompt or "" for e in examples], add_special_tokens=False)["input_ids"]
        completions = self._ids([e.completion or "" for e in examples], add_special_tokens=False)["input_ids"]
        return [self._join(*parts) for parts in zip(examples, prompts, completions, strict=True)]

    def _join(self, example: Example, prompt: list[int], completion: list[int]) -> Tokenised:
        is_question = not example.completion
        head, tail = self._prefix + prompt, ([] if is_question else completion + self._end)
        truncated = self._is_over(len(head) + len(tail)) and self.task.on_too_long == "truncate"
        if truncated and self.limit is not None:
            # The completion gets at least half; what a prompt loses is its beginning, a completion its end.
            room = max(self.limit - len(tail), (self.limit + 1) // 2 if tail else self.limit)
            kept = max(room - len(self._prefix), 1)
            head = self._prefix + prompt[-kept:] if len(head) > room else head
            tail = tail[: self.limit - len(head)]
        labels = [IGNORED] * len(head) + tail
        return Tokenised(example.index, head + tail, labels=labels, truncated=truncated)

    def _is_over(self, length: int) -> bool:
        return self.limit is not None and length > self.limit

    def _check(self, example: Example, item: Tokenised, place: Callable[[Example], str]) -> None:
        if self._is_over(len(item)):
            raise DataError(
                f"{place(example)}: {len(item)} tokens, and the limit is {self.limit}",
                row=example.row,
                hint='shorten it, or set on_too_long = "truncate" under [task]',
            )
        least = MIN_CAUSAL_TOKENS if example.completion else 1
        if len(item) < least:
            raise DataError(
                f"{place(example)}: the tokenizer finds no tokens in it", row=example.row, hint="leave it out"
            )


def _limit(task_limit: int | None, model_limit: int | None) -> int | None:
    if task_limit is not None and model_limit is not None and task_limit > model_limit:
        raise DataError(
            f"task.max_length is {task_limit}, and the model's limit is {model_limit} tokens",
            hint=f"set max_length = {model_limit} or less",
        )
    return task_limit if task_limit is not None else model_limit


def _has_separator(tokenizer: Any) -> bool:
    """Whether something ends the first text of a pair; a BOS before each of the two does not count."""
    ids = list(tokenizer("a", "b", return_attention_mask=False, return_token_type_ids=False)["input_ids"])
    ends = {getattr(tokenizer, name, None) for name in ("sep_token_id", "eos_token_id")} - {None}
    return any(i in ends for i in ids[:-1])


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, found by looking."""
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    plain = list(tokenizer("a", add_special_tokens=False, **options)["input_ids"])
    special = list(tokenizer("a", add_special_tokens=True, **options)["input_ids"])
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return [int(i) for i in special[:start]]
    return []
