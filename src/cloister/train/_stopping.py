"""Early stopping: which epoch's state is kept, and when more epochs are not worth it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloister.errors import AdapterError, DataError
from cloister.train._features import HELD_OUT

if TYPE_CHECKING:
    from cloister.train._features import Features
    from cloister.train._schedule import TrainSpec


@dataclass
class EarlyStopping:
    """Held-out losses by epoch, and what follows from them. *secret*, as the losses are.

    Attributes:
        patience: training stops after so many epochs in a row without a new lowest loss; None for never.
        losses: of the epochs so far.
    """

    patience: int | None
    losses: list[float] = field(default_factory=list, repr=False)

    def add(self, loss: float) -> bool:
        """Takes the next epoch's loss; whether it is lower than all before, so that its state is to be kept.

        Raises:
            AdapterError: it is not finite.
        """
        if not math.isfinite(loss):
            epoch = len(self.losses) + 1
            raise AdapterError(f"the held-out loss is {loss} after epoch {epoch}", hint="lower training.lr")
        self.losses.append(loss)
        return self.best_epoch == len(self.losses)

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the lowest loss, counted from 1; of equal ones the first. None before the first epoch's end."""
        return self.losses.index(min(self.losses)) + 1 if self.losses else None

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        best = self.best_epoch
        return self.patience is not None and best is not None and len(self.losses) - best >= self.patience


def trained_features(source: Features, spec: TrainSpec) -> Features:
    """The features as training with this specification divides them: with `patience`, a share is held out.

    Raises:
        DataError: with `patience`, no client has enough training examples for one to be held out.
    """
    if spec.patience is None:
        return source
    divided = source.hold_out(spec.held_out, spec.seed)
    if not divided.split(HELD_OUT):
        raise DataError(
            f"no client has enough training examples for a share of {spec.held_out} to be held out",
            hint="raise training.held_out, or train without training.patience",
        )
    return divided
