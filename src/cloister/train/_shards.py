"""The body of a sealed shard: quantised boundary tensors with their labels, as one safetensors file.

Tensors, for N tokens of n examples:

    indices  [n] int64      Example.index, no two the same
    labels   [n] int64      class index, -1 where there is none (sequence-classification)
             [N] int64      token id, -100 where there is no loss (causal-lm)
    lengths  [n] int32      tokens of each example, at least 1, summing to N
    scales   [N] float32    boundary int8 only
    values   [N, H]         int8, bfloat16 or float32

They lie in this order (wide before narrow, so that each is aligned). Everything in a body is *secret*: it is seen by
the client's host and by the server enclave, and anywhere else only as ciphertext.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from cloister import wire
from cloister.errors import DataError, LimitExceededError, MalformedMessageError
from cloister.train._boundary import INT8_MAX, Boundary, BoundaryBlock, bytes_per_token, dequantize, quantize
from cloister.train._text import IGNORED

if TYPE_CHECKING:
    from cloister.train._data import TaskSpec

NO_LABEL = -1
MAX_SHARD_BYTES = 1 << 30
"""Largest body that is decoded: one example of 32 k tokens at H = 8192 in float32 fits."""

_HEADER_BYTES = 1024  # more than the safetensors header of five tensors takes
_DTYPE_NAMES = {
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
}
_VALUE_DTYPES: dict[torch.dtype, Boundary] = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Feature:
    """One example as the far side sees it. *secret*: the client's host and the server enclave.

    Attributes:
        index: `Example.index` at its client.
        hidden: boundary tensor, float32 [T, H], real tokens only.
        label: class index (sequence-classification), None for causal-lm or an unlabelled question.
        labels: int64 [T], the token id at each position and -100 where there is no loss (causal-lm; Hugging Face's
            convention: the shift by one is inside the loss), else None.
    """

    index: int
    hidden: torch.Tensor = field(repr=False)
    label: int | None = field(default=None, repr=False)
    labels: torch.Tensor | None = field(default=None, repr=False)


class ShardBuilder:
    """Collects quantised examples of one shard and writes its body without ever holding it as a second copy."""

    def __init__(self, boundary: Boundary, task: TaskSpec, hidden_size: int) -> None:
        self._boundary: Boundary = boundary
        self._is_causal = task.name == "causal-lm"
        self._hidden_size = hidden_size
        self._blocks: list[BoundaryBlock] = []
        self._indices: list[int] = []
        self._labels: list[torch.Tensor] = []
        self.n_tokens = 0

    @property
    def n_examples(self) -> int:
        return len(self._indices)

    def size_with(self, n_tokens: int) -> int:
        """Upper bound of the body's bytes with one more example of `n_tokens`."""
        n_examples, total = self.n_examples + 1, self.n_tokens + n_tokens
        n_labels = total if self._is_causal else n_examples
        return (
            _HEADER_BYTES + total * bytes_per_token(self._hidden_size, self._boundary) + 12 * n_examples + 8 * n_labels
        )

    def add(self, index: int, block: BoundaryBlock, label: int | None, labels: torch.Tensor | None) -> None:
        """Append one example of `block.n_tokens` tokens; `labels` [T] for causal-lm, `label` otherwise."""
        if block.boundary != self._boundary or block.values.shape[1] != self._hidden_size or block.n_tokens == 0:
            raise DataError("a boundary block does not fit its shard's boundary or hidden size")
        if self._is_causal:
            if labels is None or labels.shape != (block.n_tokens,):
                raise DataError("a causal-lm example needs one label per token")
            self._labels.append(labels.to(torch.int64))
        else:
            self._labels.append(torch.tensor([NO_LABEL if label is None else label], dtype=torch.int64))
        self._indices.append(index)
        self._blocks.append(block)
        self.n_tokens += block.n_tokens

    def write_to(self, write: Callable[[memoryview], Any]) -> None:
        """Pass the body to `write` piece by piece."""
        n, total = self.n_examples, self.n_tokens
        lengths = [block.n_tokens for block in self._blocks]
        parts: list[tuple[str, list[int], list[torch.Tensor]]] = [
            ("indices", [n], [torch.tensor(self._indices, dtype=torch.int64)]),
            ("labels", [total if self._is_causal else n], self._labels),
            ("lengths", [n], [torch.tensor(lengths, dtype=torch.int32)]),
        ]
        scales = [block.scales for block in self._blocks if block.scales is not None]
        if scales:
            parts.append(("scales", [total], scales))
        parts.append(("values", [total, self._hidden_size], [block.values for block in self._blocks]))
        write(memoryview(_header(parts)))
        for _, _, pieces in parts:
            for piece in pieces:
                write(_raw(piece))


def encode_shard(features: Sequence[Feature], *, boundary: Boundary, task: TaskSpec) -> bytes:
    """The body that holds `features`, quantised.

    Raises:
        DataError: no feature at all, a boundary tensor is not finite, or a label does not fit the task.
    """
    if not features:
        raise DataError("a shard needs at least one example")
    builder = ShardBuilder(boundary, task, int(features[0].hidden.shape[1]))
    for feature in features:
        builder.add(feature.index, quantize(feature.hidden, boundary), feature.label, feature.labels)
    out = io.BytesIO()
    builder.write_to(out.write)
    return out.getvalue()


class ShardBody:
    """A decoded, validated shard body. Still quantised: examples are dequantised one at a time.

    Attributes:
        boundary: its number format.
        hidden_size: H.
        indices: `Example.index` of each example.
        lengths: tokens of each example.
        n_bytes: bytes of the tensors that it holds in memory.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._values = tensors["values"]
        self._scales = tensors.get("scales")
        self._labels = tensors["labels"]
        self.indices: list[int] = tensors["indices"].tolist()
        self.lengths: list[int] = tensors["lengths"].tolist()
        self._starts = [0]
        for length in self.lengths:
            self._starts.append(self._starts[-1] + length)
        self._is_causal = False
        self.boundary: Boundary = _VALUE_DTYPES[self._values.dtype]
        self.hidden_size = int(self._values.shape[1])
        self.n_bytes = sum(tensor.nbytes for tensor in tensors.values())

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"ShardBody({len(self)} examples, {self.n_tokens} tokens, {self.boundary})"

    @property
    def n_tokens(self) -> int:
        return self._starts[-1]

    def label(self, i: int) -> int | None:
        """Class of example i, without dequantising it; None where it has none."""
        label = NO_LABEL if self._is_causal else int(self._labels[i])
        return None if label == NO_LABEL else label

    def example(self, i: int) -> Feature:
        """Example i of [0, len): `hidden` is a fresh float32 tensor that the caller may change."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self._starts[i], self._starts[i + 1]
        scales = None if self._scales is None else self._scales[start:end]
        hidden = dequantize(BoundaryBlock(self._values[start:end], scales))
        if self._is_causal:
            return Feature(self.indices[i], hidden, labels=self._labels[start:end].clone())
        return Feature(self.indices[i], hidden, label=self.label(i))


def decode_shard(
    blob: bytes | bytearray | memoryview,
    *,
    hidden_size: int,
    task: TaskSpec,
    labelled: bool = True,
    vocab_size: int | None = None,
) -> ShardBody:
    """Parse a shard body. Total: gives a wholly checked body or raises one of the two errors.

    Args:
        blob: what was inside the ciphertext. It came from a client, so nothing about it is believed.
        hidden_size: of the backbone.
        task: which labels there must be.
        labelled: False for a question (`PredictRequest`), whose classes are not known.
        vocab_size: of the backbone; token ids at or over it are refused (causal-lm).

    Raises:
        MalformedMessageError: not such a body, or inconsistent.
        LimitExceededError: over MAX_SHARD_BYTES.
    """
    if len(blob) > MAX_SHARD_BYTES:
        raise LimitExceededError(f"shard body of {len(blob)} bytes is over the limit of {MAX_SHARD_BYTES}")
    try:
        tensors = load_safetensors(bytes(blob))
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError):
        # The Rust parser's message quotes the input, which is secret.
        raise MalformedMessageError("shard body is not safetensors") from None
    _check_layout(tensors, hidden_size, is_causal=task.name == "causal-lm")
    _check_values(tensors)
    if task.name == "causal-lm":
        _check_range("label", tensors["labels"][tensors["labels"] != IGNORED], 0, vocab_size)
    else:
        _check_range("label", tensors["labels"], 0 if labelled else NO_LABEL, len(task.labels))
    body = ShardBody(tensors)
    body._is_causal = task.name == "causal-lm"
    return body


def shard_context(run_id: str, client: str, split: str, index: int) -> bytes:
    """Context under which shard `index` (from 0 within its split) is sealed: binds it to its run, client and place."""
    return wire.enc(
        b"cloister-channel/v1", b"shard", run_id.encode(), client.encode(), split.encode(), struct.pack(">I", index)
    )


def shard_entries(manifest: wire.Manifest) -> list[tuple[wire.ShardEntry, bytes]]:
    """Every shard of a manifest, in order, with the context under which it was sealed."""
    seen: dict[str, int] = {}
    found: list[tuple[wire.ShardEntry, bytes]] = []
    for entry in manifest.shards:
        index = seen.get(entry.split, 0)
        seen[entry.split] = index + 1
        found.append((entry, shard_context(manifest.run_id, manifest.client, entry.split, index)))
    return found


def _header(parts: list[tuple[str, list[int], list[torch.Tensor]]]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, shape, pieces in parts:
        size = sum(piece.nbytes for piece in pieces)
        dtype = _DTYPE_NAMES[pieces[0].dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy; safetensors is little-endian, as is every machine that runs this."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _check_layout(tensors: dict[str, torch.Tensor], hidden_size: int, *, is_causal: bool) -> None:
    values = tensors.get("values")
    if values is None or values.dtype not in _VALUE_DTYPES or values.dim() != 2 or values.shape[1] != hidden_size:
        raise MalformedMessageError("shard values are not [n_tokens, hidden_size] of a known boundary")
    n_tokens, n_examples = int(values.shape[0]), tensors["indices"].numel() if "indices" in tensors else 0
    expected: dict[str, tuple[torch.dtype, int]] = {
        "indices": (torch.int64, n_examples),
        "labels": (torch.int64, n_tokens if is_causal else n_examples),
        "lengths": (torch.int32, n_examples),
    }
    if values.dtype is torch.int8:
        expected["scales"] = (torch.float32, n_tokens)
    if tensors.keys() != expected.keys() | {"values"} or n_examples == 0:
        raise MalformedMessageError("shard body holds other tensors than its task and boundary need")
    for name, (dtype, length) in expected.items():
        if tensors[name].dtype != dtype or tensors[name].shape != (length,):
            raise MalformedMessageError(f"shard {name} are of another type or shape than they must be")


def _check_values(tensors: dict[str, torch.Tensor]) -> None:
    values, lengths, indices = tensors["values"], tensors["lengths"], tensors["indices"]
    if int(lengths.min()) < 1 or int(lengths.to(torch.int64).sum()) != values.shape[0]:
        raise MalformedMessageError("shard lengths do not sum to its tokens")
    if int(indices.min()) < 0 or indices.unique().numel() != indices.numel():
        raise MalformedMessageError("shard indices are negative or name one example twice")
    if values.dtype is torch.int8:
        scales = tensors["scales"]
        # Times 127, because a scale may be finite and what it makes of a value not.
        if not bool(torch.isfinite(scales * INT8_MAX).all()) or bool((scales < 0).any()):
            raise MalformedMessageError("shard scales are outside the int8 code")
        if bool((values < -INT8_MAX).any()):
            raise MalformedMessageError("shard values are outside the int8 code")
    elif not bool(torch.isfinite(values).all()):
        raise MalformedMessageError("shard values are not finite")


def _check_range(what: str, found: torch.Tensor, least: int, end: int | None) -> None:
    if found.numel() and (int(found.min()) < least or (end is not None and int(found.max()) >= end)):
        raise MalformedMessageError(f"shard {what} is out of range")
