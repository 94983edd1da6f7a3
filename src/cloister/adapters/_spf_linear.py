"""A linear of which some rows train: one dense product forwards, and gradients of those rows alone.

The permutation is folded in: the rows that train are moved to the front of their section of the weight, the rows of
biases and the columns of the next weight move along, so the block computes the same function. What trains is then one
contiguous run of rows (one for each section of a fused weight), a parameter that is a view into the whole weight: an
optimiser's step is seen by the next forward pass without a copy, and has state for these rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from cloister.adapters._spf_layout import Part, PlainLinear, dense_weight, unit_rows, unit_segments
from cloister.errors import AdapterError, StateMismatchError

ROW_ORDER, COLUMN_ORDER = "row_order", "column_order"
ORDERS = (ROW_ORDER, COLUMN_ORDER)
"""Buffers of folded linears: which old row or column each new one is."""

Segment = tuple[int, int]


class _SelectedRows(torch.autograd.Function):
    """y = x W^T + b; gradients of x, and of W's rows [start, stop) of each segment, and of nothing else.

    x [..., in], W [out, in], b [out]. Products are of autocast's type, else of the weight's; autograd rounds every
    gradient back to the type of what it is of.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, segments: tuple[Segment, ...], *rows: Tensor
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x2, weight = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        y = torch.mm(x2, weight.t()) if bias is None else torch.addmm(bias.to(dtype), x2, weight.t())
        ctx.save_for_backward(x2, weight)
        ctx.segments, ctx.shape = segments, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # a second derivative would miss that dx depends on the rows
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x2, weight = ctx.saved_tensors
        g = grads[0].reshape(-1, weight.shape[0])
        gx = torch.mm(g, weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        rows = [
            torch.mm(g[:, start:stop].t(), x2) if needed else None
            for (start, stop), needed in zip(ctx.segments, ctx.needs_input_grad[4:], strict=True)
        ]
        return gx, None, None, None, *rows


class SpfLinear(nn.Module):
    """A linear with folded rows, of which some train.

    What trains are views into the weight, and its `state_dict` has the weight once. They stay tied through `.to()`,
    copies, pickling and `load_state_dict`. Where something else has put another tensor in their place, the next forward
    pass says so, because it would otherwise go unnoticed that nothing is learnt.

    After `round_frozen` the weight is of a smaller type than what trains. Then the rows are tensors of their own, and
    every forward pass rounds them into the weight.

    Args:
        weight: [out, in], folded; owned from now on.
        bias: [out], folded, stays frozen; or None.
        row_order: which old row each new one is.
        segments: the runs of rows that train.
        is_transposed: the plain linear is a `Conv1D`.
    """

    weight: Tensor
    row_order: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        row_order: Int[Tensor, " out"],
        segments: tuple[Segment, ...],
        *,
        is_transposed: bool,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.segments = segments
        self.is_transposed = is_transposed
        self.register_buffer("weight", weight)
        self.register_buffer(ROW_ORDER, row_order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._names = tuple(f"rows_{i}" for i in range(len(segments)))
        for name, (start, stop) in zip(self._names, segments, strict=True):
            self.register_parameter(name, nn.Parameter(weight[start:stop]))
        self.register_load_state_dict_pre_hook(_refuse_other_order)

    @property
    def rows(self) -> tuple[nn.Parameter, ...]:
        """What trains: one parameter a segment."""
        return tuple(cast("nn.Parameter", self._parameters[name]) for name in self._names)

    @property
    def is_rounded(self) -> bool:
        """Whether the weight is of another type than what trains."""
        return self.rows[0].dtype != self.weight.dtype

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The whole product.

        Raises:
            AdapterError: a parameter is no longer a part of the weight.
        """
        if self.is_rounded:
            self._round_rows()
        elif not torch.compiler.is_compiling():
            self._check_ties()
        return _SelectedRows.apply(x, self.weight, self.bias, self.segments, *self.rows)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        n_rows = sum(stop - start for start, stop in self.segments)
        return f"in_features={self.in_features}, out_features={self.out_features}, {n_rows} rows train"

    @torch.no_grad()
    def round_frozen(self, dtype: torch.dtype) -> None:
        """Stores the weight in this type from now on, and computes in it; what trains keeps its own."""
        for row in self.rows:
            row.data = row.data.clone()
        self.weight = self.weight.to(dtype)

    @torch.no_grad()
    def whole_weight(self) -> Float[Tensor, "out in"]:
        """The weight as it is now, still folded, with the trained rows in their own precision. *Secret* once tuned."""
        if not self.is_rounded:
            return self.weight
        whole = self.weight.to(self.rows[0].dtype)
        for row, (start, stop) in zip(self.rows, self.segments, strict=True):
            whole[start:stop] = row
        return whole

    def _check_ties(self) -> None:
        row_bytes = self.weight.stride(0) * self.weight.element_size()
        for row, (start, _) in zip(self.rows, self.segments, strict=True):
            if row.data_ptr() != self.weight.data_ptr() + start * row_bytes:
                raise AdapterError(
                    "trained rows of an SPF layer are no longer a part of its weight",
                    hint="change parameters in place, as optimisers do; do not assign `.data` or replace them",
                )

    @torch.no_grad()
    def _round_rows(self) -> None:
        """At every call: fused optimisers change a parameter without counting up its version.

        Through `.data`, so that a second forward pass before the backward pass of the first is no error.
        """
        for row, (start, stop) in zip(self.rows, self.segments, strict=True):
            self.weight.data[start:stop] = row

    @torch.no_grad()
    def _retie(self) -> None:
        """Makes the rows views again, of a weight that takes their numbers; of another type they stay apart."""
        if self.is_rounded:
            return
        for row, (start, stop) in zip(self.rows, self.segments, strict=True):
            if row.data_ptr() != self.weight[start:stop].data_ptr():
                self.weight[start:stop] = row
                row.data = self.weight[start:stop]

    # --- what copies or replaces tensors one by one -------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._retie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and pickles
        super().__setstate__(state)
        self._retie()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names if not self.is_rounded else ():
            del destination[prefix + name]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        tied = {} if self.is_rounded else {name: self._parameters.pop(name) for name in self._names}
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            self._parameters.update(tied)
            for row, (start, stop) in zip(self.rows if tied else (), self.segments, strict=False):
                row.data = self.weight[start:stop]  # the same memory, unless `assign` has put another weight here


def _refuse_other_order(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A weight in another order has the same shape, and would be another function."""
    if f"{prefix}weight" not in state_dict:
        return
    name = next(name for name in ORDERS if hasattr(module, name))
    own, found = cast("Tensor", getattr(module, name)), state_dict.get(prefix + name)
    if found is None or not torch.equal(found.cpu(), own.cpu()):
        raise StateMismatchError(
            f"{prefix}weight is of another SPF support, or of a model without SPF",
            key=f"{prefix}weight",
            hint="load plain weights before SPF is attached, or attach it with the support that the weights have",
        )


# --- folding and unfolding --------------------------------------------------------------------------------------------


def fold_rows(linear: PlainLinear, part: Part, widths: tuple[int, ...], order: Tensor, n_chosen: int) -> SpfLinear:
    """The same linear with its units in this order, of which the first train."""
    dense = dense_weight(linear).detach()
    rows = unit_rows(order, widths).to(dense.device)
    bias = None if linear.bias is None else linear.bias.detach()[rows]
    segments = unit_segments(n_chosen, part.n_units, widths)
    is_transposed = isinstance(linear, Conv1D)
    return SpfLinear(dense[rows].contiguous(), bias, rows, segments, is_transposed=is_transposed)


def fold_columns(linear: PlainLinear, part: Part, order: Tensor) -> None:
    """Makes a linear read its units in this order, in place."""
    weight = linear.weight.detach()
    columns = unit_rows(order, (part.width,)).to(weight.device)
    linear.weight = nn.Parameter(weight.index_select(_column_dim(linear), columns), requires_grad=False)
    linear.register_buffer(COLUMN_ORDER, columns)
    linear.register_load_state_dict_pre_hook(_refuse_other_order)


def is_folded(module: nn.Module) -> bool:
    """Whether a module's rows or columns are in another order than the backbone's."""
    return isinstance(module, SpfLinear) or COLUMN_ORDER in module._buffers


def unfolded(module: nn.Module, leaf: str, value: Tensor) -> Tensor:
    """A weight or bias of a module in the backbone's own order and layout; as it is where nothing was folded.

    Args:
        module: the one that has it.
        leaf: "weight" or "bias".
        value: the tensor, or one that is derived from it.
    """
    if isinstance(module, SpfLinear):
        back = torch.empty_like(value).index_copy_(0, module.row_order, value)
        return back.t().contiguous() if leaf == "weight" and module.is_transposed else back
    columns = module._buffers.get(COLUMN_ORDER)
    if columns is None or leaf != "weight":
        return value
    return torch.empty_like(value).index_copy_(_column_dim(module), columns, value)


def plain(module: nn.Module) -> PlainLinear:
    """A folded linear as the class that it was, frozen, in the backbone's own order."""
    folded = cast("Any", module)
    is_conv1d = isinstance(module, Conv1D) or (isinstance(module, SpfLinear) and module.is_transposed)
    whole = module.whole_weight() if isinstance(module, SpfLinear) else folded.weight.detach()
    weight = unfolded(module, "weight", whole)
    n_out, n_in = weight.shape[::-1] if is_conv1d else weight.shape
    with torch.device("meta"):  # no memory, and no draw from the global generator, for numbers that are replaced
        made: Any = Conv1D(n_out, n_in) if is_conv1d else nn.Linear(n_in, n_out, bias=folded.bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if folded.bias is not None:
        made.bias = nn.Parameter(unfolded(module, "bias", folded.bias.detach()), requires_grad=False)
    return made.train(module.training)


def _column_dim(linear: nn.Module) -> int:
    return 0 if isinstance(linear, Conv1D) else 1
