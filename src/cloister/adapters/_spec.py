"""What an adapter's state looks like, so that another shape is refused before it is loaded or added to anything."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cloister.adapters._lora import LoraSpec
from cloister.errors import AdapterError, StateMismatchError
from cloister.wire import enc

MAX_STATE_BYTES = 1 << 30
"""Numbers and header of one state (spec/wire.md, adapter states)."""

LABEL = b"cloister-adapter/v1"

Task = Literal["causal-lm", "sequence-classification"]


@dataclass(frozen=True)
class PrefixSpec:
    """P-tuning v2 (Liu et al., 2021, arXiv 2110.07602): trained keys and values before the text, at every layer.

    The prefix takes part in attention like `n_tokens` tokens in front, also in positions: a text may be that much
    shorter where the backbone's positions are learned, and a sliding window slides past the prefix.

    Attributes:
        n_tokens: length of the prefix.
        projection: train a small embedding and a two-layer MLP that makes the prefix out of it, in place of the prefix.
        hidden_size: of that MLP; None takes the backbone's width of keys.
    """

    n_tokens: int = 16
    projection: bool = False
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or (self.hidden_size is not None and self.hidden_size < 1):
            raise AdapterError(
                f"a prefix of {self.n_tokens} tokens and hidden size {self.hidden_size} is not possible",
                hint="both are at least 1",
            )


AdapterSpec = LoraSpec | PrefixSpec


@dataclass(frozen=True)
class PrefixLayout:
    """What a prefix must know of its backbone: layers, key and value heads, and their width together."""

    n_layers: int
    n_heads: int
    width: int


@dataclass(frozen=True, eq=False)
class StateSpec:
    """Names and shapes of a state's tensors, and what kind of adapter they are. *Public*.

    Attributes:
        adapter: what was attached; LoRA's targets as paths in the blocks.
        task: of the model; a classification head is part of the state.
        shapes: of every tensor that trains, by name, sorted by name. Names are PEFT's without its adapter name.
        fixed: of the tensors that belong to the adapter, do not train and are never sent: FFA-LoRA's A, in the
            model's order.
        seed: what `fixed` is drawn from; None without.
        layout: of a prefix; None for LoRA.
        is_transposed: the backbone stores its linears as GPT-2 does.
    """

    adapter: AdapterSpec
    task: Task
    shapes: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, tuple[int, ...]]
    seed: int | None = None
    layout: PrefixLayout | None = None
    is_transposed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", dict(sorted(self.shapes.items())))
        object.__setattr__(self, "fixed", dict(self.fixed))
        if self.n_bytes > MAX_STATE_BYTES:
            raise AdapterError(
                f"an adapter of {self.n_bytes} bytes is over the limit of {MAX_STATE_BYTES}",
                hint="lower the rank or the number of targets, or the prefix's hidden size",
            )

    @property
    def kind(self) -> str:
        """`lora`, `ffa-lora` or `prefix`."""
        if isinstance(self.adapter, PrefixSpec):
            return "prefix"
        return "ffa-lora" if self.adapter.freeze_a else "lora"

    @property
    def n_numbers(self) -> int:
        """How many numbers train."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def n_bytes(self) -> int:
        """The most that an encoded state may have: numbers in float32, a header, and framing."""
        return 4 * self.n_numbers + sum(len(name) + 256 for name in self.shapes) + 4096

    @cached_property
    def digest(self) -> bytes:
        """SHA-384 over kind, task, scale and every name and shape: equal where states can be added (spec/wire.md).

        What does not change the meaning of the numbers, LoRA's dropout, is not in it.
        """
        return hashlib.sha384(enc(LABEL, b"spec", json.dumps(self._facts(), separators=(",", ":")).encode())).digest()

    def _facts(self) -> list[object]:
        adapter = self.adapter
        own = [adapter.n_tokens, adapter.projection] if isinstance(adapter, PrefixSpec) else [adapter.r, adapter.scale]
        layout = [self.layout.n_layers, self.layout.n_heads, self.layout.width] if self.layout else []
        fixed = [[name, list(shape)] for name, shape in self.fixed.items()]
        shapes = [[name, list(shape)] for name, shape in self.shapes.items()]
        return [self.kind, self.task, own, layout, self.is_transposed, self.seed, fixed, shapes]

    def require(self, other: StateSpec) -> None:
        """Refuse states of another spec.

        Raises:
            StateMismatchError: names what differs first.
        """
        if self.digest == other.digest:
            return
        for name in (*self.shapes, *other.shapes):
            expected, found = self.shapes.get(name), other.shapes.get(name)
            if expected != found:
                raise StateMismatchError(f"{name} is {found or 'missing'}, expected {expected or 'none'}", key=name)
        ours, theirs = f"{self.kind} for {self.task}", f"{other.kind} for {other.task}"
        raise StateMismatchError(f"the state is of another adapter ({theirs}, expected {ours})", key="adapter")

    def lora_pairs(self) -> tuple[tuple[str, str], ...]:
        """The names (A, B) of every adapted linear; of FFA-LoRA and of a prefix there are none that both train."""
        return tuple((a, b) for a in self.shapes if (b := b_of(a)) in self.shapes and a != b)


def b_of(a: str) -> str:
    """The name of the B that an A belongs to; a name that is no A's comes back as it is."""
    head, found, tail = a.rpartition(".lora_A.")
    return f"{head}.lora_B.{tail}" if found else a
