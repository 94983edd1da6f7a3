"""What SPF trains: the share of attention heads and feed-forward neurons, the criterion, and what was chosen by it.

SPF (Sparsification Parameter Fine-tuning) as architecture.md section 2 defines it: in every block the best heads' rows
of the query, key and value weights train, and the best neurons' rows of the first feed-forward weights. The rest of
these weights is frozen. The attention's output projection gets LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

from cloister.adapters._lora import LoraSpec
from cloister.errors import AdapterError, StateMismatchError

if TYPE_CHECKING:
    from torch import Tensor

Criterion = Literal["l1", "gradient", "fisher", "random"]
PartName = Literal["heads", "neurons"]

PARTS: tuple[PartName, ...] = get_args(PartName)
NEED_SCORES = ("gradient", "fisher")


@dataclass(frozen=True)
class SpfSpec:
    """Which rows SPF trains, and the LoRA beside them. *Public*.

    A share is of each block's head groups or neurons, and counts them to the nearest whole one (a half goes up). A head
    group is a key and value head with all the query heads that read it; without grouped queries it is one head.

    Attributes:
        heads: share of the head groups, from 0 to 1; 0 leaves query, key and value weights frozen.
        neurons: share of the neurons of the feed-forward part, from 0 to 1.
        criterion: what ranks them, largest first. "l1": the sum of |W| over their rows. "gradient", "fisher": the norm
            of an example's gradient of each row, or its square, summed over rows and examples (`RowScores`).
            "random": a seeded choice.
        r, alpha, dropout, use_rslora: of LoRA on the attention's output projection, as `LoraSpec`.
        criterion_examples: how many training examples "gradient" and "fisher" look at where a far side is trained;
            without effect in ordinary Python, where the caller makes the scores.

    Raises:
        AdapterError: a number is out of its range, or both shares are 0.
    """

    heads: float = 0.5
    neurons: float = 0.5
    criterion: Criterion = "l1"
    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    use_rslora: bool = False
    criterion_examples: int = 256

    def __post_init__(self) -> None:
        if not (0 <= self.heads <= 1 and 0 <= self.neurons <= 1):
            raise AdapterError(
                f"SPF with heads = {self.heads}, neurons = {self.neurons} is not possible",
                hint="both are shares, from 0 to 1",
            )
        if self.heads == self.neurons == 0:
            raise AdapterError(
                "SPF with heads = 0 and neurons = 0 selects nothing",
                hint="raise one of them, or use LoRA alone",
            )
        if self.criterion not in get_args(Criterion):
            raise AdapterError(
                f"SPF has no criterion {self.criterion!r}", hint=f"one of {', '.join(get_args(Criterion))}"
            )
        if self.criterion_examples < 1:
            raise AdapterError(f"criterion_examples is {self.criterion_examples}", hint="at least 1")
        _ = self.lora  # refuses what LoRA refuses

    @property
    def lora(self) -> LoraSpec:
        """LoRA of the output projection, without its targets, which the backbone's family decides."""
        return LoraSpec(r=self.r, alpha=self.alpha, dropout=self.dropout, use_rslora=self.use_rslora)

    @property
    def needs_scores(self) -> bool:
        """Whether the criterion looks at training examples."""
        return self.criterion in NEED_SCORES

    def n_chosen(self, part: PartName, n_units: int) -> int:
        """How many of a block's head groups or neurons train.

        Raises:
            AdapterError: the share is above 0 and selects none of them; the hint has the least share that selects one.
        """
        share: float = getattr(self, part)
        n = math.floor(share * n_units + 0.5)
        if share > 0 and n == 0:
            what = "head groups" if part == "heads" else "neurons"
            raise AdapterError(
                f"adapter.{part} = {share} selects none of a block's {n_units} {what}",
                hint=f"the least share that selects one is {_least_share(n_units)}",
            )
        return n


FarAdapterSpec = LoraSpec | SpfSpec
"""What a far side may be tuned with."""


@dataclass(frozen=True)
class SpfSupport:
    """Which head groups and neurons of each block train.

    *Secret* where the criterion looks at training examples (gradient, fisher): what is chosen depends on them. *Public*
    with l1 and random, which look at the public backbone or the seed alone. Only counts are shown.

    Attributes:
        heads: indices of head groups, by block, sorted.
        neurons: indices of neurons, by block, sorted.

    Raises:
        StateMismatchError: blocks differ in number, or indices are not sorted, negative or not of their own.
    """

    heads: tuple[tuple[int, ...], ...] = field(repr=False)
    neurons: tuple[tuple[int, ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.neurons):
            raise StateMismatchError("an SPF support has as many lists of heads as of neurons", key="support")
        for part in PARTS:
            for chosen in getattr(self, part):
                if any(i < 0 for i in chosen) or any(a >= b for a, b in pairwise(chosen)):
                    raise StateMismatchError(f"an SPF support's {part} are not sorted indices", key=part)

    def __repr__(self) -> str:
        n = {part: sum(map(len, getattr(self, part))) for part in PARTS}
        return f"{type(self).__name__}({len(self.heads)} blocks, {n['heads']} head groups, {n['neurons']} neurons)"

    def tensors(self) -> dict[str, Tensor]:
        """As int64 tensors, `heads.0`, `neurons.0`, `heads.1` ...: for a checkpoint. As *secret* as the support."""
        import torch

        return {
            f"{part}.{i}": torch.tensor(chosen, dtype=torch.int64)
            for part in PARTS
            for i, chosen in enumerate(getattr(self, part))
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SpfSupport:
        """What `tensors` gave.

        Raises:
            StateMismatchError: a name is missing or unknown, or a tensor is no sorted list of indices.
        """
        import torch

        n_blocks = len(tensors) // len(PARTS)
        names = {part: [f"{part}.{i}" for i in range(n_blocks)] for part in PARTS}
        if set(tensors) != {name for found in names.values() for name in found}:
            raise StateMismatchError("the tensors are not those of an SPF support", key="support")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise StateMismatchError(f"{name} is no list of indices", key=name)
        return cls(**{part: tuple(tuple(tensors[name].tolist()) for name in found) for part, found in names.items()})


def _least_share(n_units: int) -> str:
    """The least share that selects one of so many, to three digits and not below it."""
    least = 0.5 / n_units
    text = f"{least:.3g}"
    return text if float(text) >= least else f"{1.01 * least:.3g}"
