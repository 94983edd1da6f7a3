"""Text to boundary blocks through the near side, batch by batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from cloister.errors import DataError, ModelError
from cloister.train._boundary import Boundary, BoundaryBlock, quantize
from cloister.train._data import Example, TaskSpec
from cloister.train._shards import ShardBuilder
from cloister.train._text import IGNORED, TextEncoder, Tokenised

NearCallable = Callable[..., torch.Tensor]
"""(input_ids [B, T], attention_mask [B, T]) -> [B, T, H]; a third argument, token_type_ids, only for BERT's pairs."""


class NearEncoder:
    """Text to boundary blocks, batch by batch. Shared by the training run and by later questions.

    Attributes:
        text: the tokenising half.
        boundary: number format of what comes out.
    """

    def __init__(
        self,
        near: NearCallable,
        tokenizer: Any,
        task: TaskSpec,
        *,
        boundary: Boundary = "int8",
        batch_size: int = 32,
        model_max_length: int | None = None,
    ) -> None:
        self._near = near
        self.text = TextEncoder(tokenizer, task, model_max_length=model_max_length)
        self.task = task
        self.boundary: Boundary = boundary
        self.batch_size = batch_size

    def window(self, examples: Sequence[Example], place: Callable[[Example], str]) -> list[list[Tokenised]]:
        """The batches of one window: sorted by length, so that little is padding. The same window, the same batches."""
        items = sorted(self.text.encode(examples, place=place), key=lambda item: (len(item), item.index))
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]

    def blocks(self, batch: Sequence[Tokenised]) -> list[BoundaryBlock]:
        """The boundary block of each example of a batch; padding is gone.

        Raises:
            ModelError: the near side gives something that is no boundary tensor, or a value that is not finite.
        """
        lengths = [len(item) for item in batch]
        ids = _padded([item.input_ids for item in batch], self.text.pad_id)
        mask = (torch.arange(ids.shape[1])[None, :] < torch.tensor(lengths)[:, None]).to(torch.int64)
        types = [item.type_ids for item in batch if item.type_ids is not None]
        more = (_padded(types, 0),) if len(types) == len(batch) else ()
        with torch.inference_mode():
            hidden = self._near(ids, mask, *more)
            if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
                raise ModelError(f"the near side gives {list(hidden.shape)} for a batch of {list(ids.shape)}")
            try:
                block = quantize(hidden[mask.bool()].cpu(), self.boundary)
            except DataError as error:
                number = next(i for i, end in enumerate(itertools.accumulate(lengths)) if (error.row or 0) < end)
                raise ModelError(
                    f"the boundary tensor of example {batch[number].index} is not finite or overflows", hint=error.hint
                ) from None
        return _split(block, lengths)

    def question(self, texts: Sequence[str | tuple[str, str]]) -> bytes:
        """The body of a `PredictRequest` for texts (or pairs, or prompts), in the order given.

        *Secret*: this client and the server enclave.

        Raises:
            DataError: no text, an empty one, or one over the limit; its number counts from 1.
        """
        examples = [as_question(i, text, self.task) for i, text in enumerate(texts)]
        if not examples:
            raise DataError("there is no text to predict for", hint="give at least one")
        return self._body(self.text.encode(examples, place=lambda example: f"text {example.row}"))

    def continued(self, prompt: str, made: Sequence[int]) -> bytes | None:
        """The question for the token after `prompt` and the tokens `made` so far; None at the length limit."""
        (item,) = self.text.encode([as_question(0, prompt, self.task)], place=lambda _: "the prompt")
        ids = [*item.input_ids, *made]
        if self.text.limit is not None and len(ids) >= self.text.limit:
            return None
        return self._body([replace(item, input_ids=ids, labels=[IGNORED] * len(ids))])

    def _body(self, items: Sequence[Tokenised]) -> bytes:
        builder: ShardBuilder | None = None
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            for item, block in zip(batch, self.blocks(batch), strict=True):
                builder = builder or ShardBuilder(self.boundary, self.task, int(block.values.shape[1]))
                builder.add(item.index, block, None, label_tensor(item))
        pieces = bytearray()
        if builder is not None:
            builder.write_to(pieces.extend)
        return bytes(pieces)


def label_tensor(item: Tokenised) -> torch.Tensor | None:
    """Labels as a shard takes them: int64 [T], None for classification."""
    return None if item.labels is None else torch.tensor(item.labels, dtype=torch.int64)


def _padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def _split(block: BoundaryBlock, lengths: Sequence[int]) -> list[BoundaryBlock]:
    values = block.values.split(list(lengths))
    scales = [None] * len(lengths) if block.scales is None else block.scales.split(list(lengths))
    return [BoundaryBlock(*pair) for pair in zip(values, scales, strict=True)]


def as_question(index: int, text: str | tuple[str, str], task: TaskSpec) -> Example:
    """A text, a pair or a prompt as an example without label. Raises `DataError` where it is empty."""
    first, second = (text, None) if isinstance(text, str) else text
    if not first.strip() or (second is not None and not second.strip()):
        raise DataError(f"text {index + 1} is empty", row=index + 1, hint="leave it out")
    if task.name == "causal-lm":
        return Example(index, index + 1, prompt=first)
    return Example(index, index + 1, text=first, text_b=second)
