"""The real tokens of a padded batch: masked layers send these alone, one after another.

The accelerator then sees the sum of a batch's lengths, filled up to the session's bucket, in place of the number of
texts times the longest. Rows that stand for no token get zeros, forwards and backwards: nothing may read them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Bool, Float, Int
from torch import Tensor


class RealRows:
    """Where the real tokens of one padded batch stand. *Secret*, but for how many there are, up to the bucket.

    Args:
        mask: [batch, tokens], not 0 at real tokens.
    """

    __slots__ = ("_rows", "_shape")

    def __init__(self, mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"]) -> None:
        self._shape = tuple(mask.shape)
        self._rows = mask.reshape(-1).nonzero()[:, 0]

    def fit(self, x: Tensor) -> bool:
        """Whether `x` has a row for every place of the batch."""
        return tuple(x.shape[:-1]) == self._shape

    def pack(self, x: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "real features"]:
        """The rows of the real tokens. *Secret*."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self._rows)

    def unpack(self, packed: Float[Tensor, "real features"]) -> Float[Tensor, "batch tokens features"]:
        """The rows where they stand in the batch, zeros elsewhere, in memory of its own. *Secret*."""
        whole = packed.new_zeros((*self._shape, packed.shape[-1]))  # no view: those could not be changed in place
        whole.view(-1, packed.shape[-1]).index_copy_(0, self._rows, packed)
        return whole


_now: ContextVar[RealRows | None] = ContextVar("real rows", default=None)


@contextmanager
def only_real_rows(mask: Int[Tensor, "batch tokens"]) -> Generator[None, None, None]:
    """Within it, masked layers of this thread send the real tokens of every tensor of this batch, and no padding.

    Their outputs, and the gradients of their inputs, are the same at real tokens as without it, and zero at padding.
    The caller must see to it that nothing reads padding. Tensors of another leading shape are sent whole, and so is a
    batch without padding. A layer that runs again in backward, outside of it, sends the whole batch.

    Args:
        mask: *secret*; not 0 at real tokens.
    """
    rows = None if bool(mask.all()) else RealRows(mask)
    token = _now.set(rows)
    try:
        yield
    finally:
        _now.reset(token)


def real_rows_of(x: Tensor) -> RealRows | None:
    """The rows of `x` to send; None for all."""
    rows = _now.get()
    return rows if rows is not None and rows.fit(x) else None
