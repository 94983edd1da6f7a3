"""How much each head group and neuron matters for some examples: the criteria gradient and fisher.

For a linear Y = X W^T, an example's gradient of W is dY^T X, [out, in]. Its rows' squared norms are the diagonal of
dY^T (X X^T) dY, so they follow from the example's Gram matrix [tokens, tokens]: the gradient itself, as large as the
frozen weight, is never built (Goodfellow, 2015, arXiv 1510.01799, has it for one token per example).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from cloister.adapters._spf_layout import (
    BlockParts,
    Part,
    block_parts,
    find_blocks,
    out_features,
    rows_of,
    unit_sums,
)
from cloister.adapters._spf_spec import NEED_SCORES, Criterion
from cloister.errors import AdapterError

Add = Callable[[Tensor, Tensor], None]


class BlockScores(NamedTuple):
    """What a block's units scored; the largest train. *Secret*: it depends on the examples."""

    heads: Float64[Tensor, " groups"]
    neurons: Float64[Tensor, " neurons"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.heads)} head groups, {len(self.neurons)} neurons)"


class _Tap(torch.autograd.Function):
    """y as it is; backwards it hands x and dy on. The anchor makes a graph where nothing trains."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.add(x, grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None


class RowScores:
    """Watches the linears that SPF may tune while losses are taken, and scores their heads and neurons.

        with RowScores(model, "fisher") as rows:
            for batch in batches:
                model(**batch).loss.backward()
        support = choose_support(blocks, spec, scores=rows.scores())

    "gradient" adds up, over the examples, the L2 norm of the example's gradient of each row; "fisher" its square, which
    is the diagonal of the empirical Fisher information, summed over the row. A unit scores what its rows score
    together. An example is one entry of a batch; the loss must be a sum over examples. A mean over batches of one size
    gives the same order. Padding must have no part in the loss.

    While it watches nothing of the model gets a gradient, and no gradient of a whole weight is built.

    Args:
        model: a far side, or a transformers model; without an adapter, dropout off.
        criterion: "gradient" or "fisher".

    Raises:
        AdapterError: the criterion looks at no examples.
        UnsupportedLayerError: a block's layout is not known.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        if criterion not in NEED_SCORES:
            raise AdapterError(f"the criterion {criterion} takes no scores", hint=f"one of {', '.join(NEED_SCORES)}")
        self._model = model
        self._criterion = criterion
        self._blocks = find_blocks(model)
        self._parts: list[BlockParts] = [block_parts(block) for block in self._blocks]
        self._totals: list[dict[str, Tensor]] = [{} for _ in self._parts]
        self._hooks: list[Any] = []
        self._trained: list[nn.Parameter] = []
        self.n_examples = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._criterion!r}, {self.n_examples} examples)"

    def __enter__(self) -> Self:
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for i, (block, parts) in enumerate(zip(self._blocks, self._parts, strict=True)):
            for _, path, linear in rows_of(block, parts):
                weight = linear.weight
                total = torch.zeros(out_features(linear), dtype=torch.float64, device=weight.device)
                self._totals[i].setdefault(path, total)
                counts = i == 0 and path == next(iter(parts.heads.rows))
                self._hooks.append(linear.register_forward_hook(self._tapped(self._totals[i][path], counts)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def scores(self) -> list[BlockScores]:
        """Of every block, from the examples so far. *Secret*.

        Raises:
            AdapterError: no loss was taken while it watched.
        """
        if not self.n_examples:
            raise AdapterError("no example was scored", hint="call backward() on a loss inside the `with`")
        return [
            BlockScores(*(self._of(part, totals) for part in parts))
            for parts, totals in zip(self._parts, self._totals, strict=True)
        ]

    def _of(self, part: Part, totals: dict[str, Tensor]) -> Tensor:
        found = [unit_sums(totals[path], part.n_units, widths) for path, widths in part.rows.items()]
        return torch.stack(found).sum(dim=0).cpu()

    def _tapped(self, total: Tensor, counts: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        anchor = torch.zeros((), requires_grad=True)

        def add(x: Tensor, dy: Tensor) -> None:
            if x.dim() != 3:
                raise AdapterError(f"scores need inputs [batch, tokens, features], not of {x.dim()} dimensions")
            total.add_(self._of_batch(x, dy))
            self.n_examples += len(x) if counts else 0

        return lambda _, inputs, y: cast("Tensor", _Tap.apply(y, anchor, inputs[0], add))

    def _of_batch(self, x: Tensor, dy: Tensor) -> Tensor:
        """Float64 [out]: what a batch adds. One example at a time bounds the memory of Gram matrices."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        squares = [_squared_norms(of_x.to(dtype), of_dy.to(dtype)) for of_x, of_dy in zip(x, dy, strict=True)]
        found = torch.stack(squares).double()
        return (found.sqrt() if self._criterion == "gradient" else found).sum(dim=0)


def _squared_norms(x: Tensor, dy: Tensor) -> Tensor:
    """Squared L2 norm of each row of dy^T x: x [tokens, in], dy [tokens, out]."""
    return (dy * torch.mm(torch.mm(x, x.t()), dy)).sum(dim=0).clamp_min(0)  # rounding may leave less than 0


def check_scores(scores: Sequence[BlockScores], parts: Sequence[BlockParts]) -> None:
    """Refuse scores that are of another model, or not finite.

    Raises:
        AdapterError: which they are.
    """
    sizes = [tuple(len(found) for found in block) for block in scores]
    if sizes != [tuple(part.n_units for part in block) for block in parts]:
        raise AdapterError("the scores are of another model: blocks, heads or neurons differ in number")
    if not all(torch.isfinite(found).all() for block in scores for found in block):
        raise AdapterError("a score is not a finite number", hint="look for a loss that is not")
