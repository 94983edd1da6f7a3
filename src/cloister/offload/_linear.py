"""Frozen linears as torch modules whose product is a masked message of a session.

Linears that read the same tensor (q, k and v; gate and up) are one layer of the session with their rows one after
another: one message forward and one backward serve all of them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cloister.errors import OffloadError
from cloister.offload._real_rows import RealRows, real_rows_of
from cloister.ring import quantize_weight

if TYPE_CHECKING:
    from cloister.offload._session import OffloadSession

MAX_ROWS = 1 << 15
"""Rows of one layer of a session; longer ones (vocabularies) are cut into equal parts.

Rings allow up to 2^17 - 1, but one scale would then serve a whole token's gradient over the vocabulary, and its
rounding error grows with the number of rows that share it.
"""


class FrozenLinear(NamedTuple):
    """A linear to offload: `weight` [out, in] as `torch.nn.Linear` has it, and its bias. *Public*."""

    name: str
    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None


class OffloadedLinear(nn.Module):
    """A frozen linear that the accelerator multiplies. It holds no weight: the enclave needs none.

    Takes fp32, bf16 or fp16 on the CPU, of any leading shape, and returns the same type. Made by `OffloadedGroup`.

    Attributes:
        in_features: as `torch.nn.Linear` has it.
        out_features: as `torch.nn.Linear` has it.
    """

    def __init__(self, group: OffloadedGroup, index: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self._group = group
        self._index = index
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + bias. *Secret*, both. Raises as `OffloadSession.forward` does, and so does the backward pass."""
        return self._group.output(self._index, x)

    def extra_repr(self) -> str:
        """What stands in the parentheses of its `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, layer={self._group.name!r}"


class OffloadedGroup:
    """Linears that are given the very same tensor, as one layer of a session.

    The first member that is called with a tensor computes the outputs of all, which wait for the others until they
    are called with that tensor too: the same object, not changed in between, in the same gradient mode and with the
    same real rows (`only_real_rows`). Anything else is computed anew, which is always right and only costs more.
    What waits is *secret*, and is let go once all members have taken theirs, another tensor comes, or gradients are
    computed.

    Args:
        session: that multiplies.
        linears: one or more, of the same number of inputs.
        weight_bits: see `ring.quantize_weight`.

    Attributes:
        name: of the layer in errors and reports: those of the members, with what they share written once.
        members: the modules, in the order of `linears`.

    Raises:
        RingOverflowError: a weight is not finite, or does not fit the session's format.
        OffloadError: as `OffloadSession.add`, or the linears do not belong together.
    """

    def __init__(
        self, session: OffloadSession, linears: Sequence[FrozenLinear], *, weight_bits: int | None = None
    ) -> None:
        width = linears[0].weight.shape[1]
        if any(linear.weight.shape[1] != width for linear in linears):
            raise OffloadError("linears that share a product have the same number of inputs")
        self.name = joint_name([linear.name for linear in linears])
        self._session = session
        self._sizes = [len(linear.weight) for linear in linears]
        self._layers = _add_layers(session, self.name, linears, weight_bits)
        self._waiting: _Waiting | None = None
        self.members = tuple(OffloadedLinear(self, i, width, size) for i, size in enumerate(self._sizes))

    def output(self, index: int, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The output of member `index` for `x`."""
        waiting = self._waiting
        taken = None if waiting is None else waiting.take(index, x)
        if taken is None:
            outputs = dict(enumerate(_apply(x, self, real_rows_of(x))))
            taken = outputs.pop(index)
            # In inference mode torch does not count changes of a tensor, so it is not known to be the same later.
            waiting = None if x.is_inference() else _Waiting(x, outputs)
        self._waiting = waiting if waiting is not None and waiting.outputs else None
        return taken

    def forward(self, x: Float[Tensor, "*batch in"], rows: RealRows | None = None) -> tuple[Tensor, ...]:
        """Every member's output, each in memory of its own, in the type of `x`; of `rows` alone, if there are any."""
        sent = x if rows is None else rows.pack(x)
        whole = _join([self._session.forward(layer, sent) for layer in self._layers]).to(x.dtype)
        if len(self._sizes) == 1 and rows is None:
            return (whole,)
        # Views of one tensor could not be changed in place, as a linear's output can.
        own = _copy if rows is None else rows.unpack
        return tuple(map(own, torch.split(whole, self._sizes, dim=-1)))

    def backward(self, gradients: Sequence[Tensor | None], rows: RealRows | None = None) -> Tensor | None:
        """The input's gradient in float32. An output that nobody used has none, and counts as zeros.

        With `rows`, those of forward, gradients of other rows are not read, and these rows of the result are zero.
        """
        self._waiting = None
        if rows is not None:
            gradients = [None if gradient is None else rows.pack(gradient) for gradient in gradients]
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None:
            return None
        batch = given.shape[:-1]
        whole = _join(
            [
                given.new_zeros((*batch, size)) if gradient is None else gradient
                for gradient, size in zip(gradients, self._sizes, strict=True)
            ]
        )
        parts = torch.tensor_split(whole, len(self._layers), dim=-1)
        found = functools.reduce(operator.add, map(self._session.backward, self._layers, parts))
        return found if rows is None else rows.unpack(found)


class _Waiting:
    """Outputs of one tensor that their members have not taken yet. *Secret*."""

    __slots__ = ("_mode", "_x", "outputs")

    def __init__(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self._x = x
        self._mode = _mode(x)
        self.outputs = outputs

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The output, once; None if it is gone or of another tensor."""
        return self.outputs.pop(index, None) if x is self._x and _mode(x) == self._mode else None


def _mode(x: Tensor) -> tuple[int, bool, bool, RealRows | None]:
    """What must not have changed for an output to be still that of `x`, of the right kind and of the same rows."""
    return x._version, x.requires_grad, torch.is_grad_enabled(), real_rows_of(x)


class _Product(torch.autograd.Function):
    """A group's product. Nothing is saved for backward, which needs the gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: OffloadedGroup, rows: RealRows | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.dtype, ctx.rows = group, x.dtype, rows
        return group.forward(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # as torch documents it
        found = ctx.group.backward(gradients, ctx.rows)
        return None if found is None else found.to(ctx.dtype), None, None


def joint_name(names: Sequence[str]) -> str:
    """`a.b.q+k+v` of `a.b.q`, `a.b.k` and `a.b.v`."""
    parent = names[0].rpartition(".")[0] + "."
    if len(names) == 1 or not all(name.startswith(parent) for name in names):
        return "+".join(names)
    return parent + "+".join(name.removeprefix(parent) for name in names)


def _apply(x: Tensor, group: OffloadedGroup, rows: RealRows | None) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", _Product.apply(x, group, rows))  # pyright: ignore[reportUnknownMemberType]


def _copy(part: Tensor) -> Tensor:
    return torch.clone(part, memory_format=torch.contiguous_format)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _add_layers(
    session: OffloadSession, name: str, linears: Sequence[FrozenLinear], weight_bits: int | None
) -> list[str]:
    """The linears' rows one after another as layers of the session: one, or as many as `MAX_ROWS` makes of them."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases: list[Tensor] | None = None
    if any(linear.bias is not None for linear in linears):
        biases = [
            torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach().float()
            for linear in linears
        ]
    n_parts = -(-len(weight) // MAX_ROWS)
    names = [name] if n_parts == 1 else [f"{name}[{i}]" for i in range(n_parts)]
    parts = torch.tensor_split(weight, n_parts)
    bias_parts = [None] * n_parts if biases is None else torch.tensor_split(torch.cat(biases), n_parts)
    for layer, part, bias in zip(names, parts, bias_parts, strict=True):
        session.add(layer, quantize_weight(part, session.format, layer=layer, weight_bits=weight_bits), bias)
    return names
