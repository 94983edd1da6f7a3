"""The numbers of an adapter apart from any model: what is sent, aggregated, sealed and, if the job says so, released.

Encoded as `enc(label, spec digest, safetensors)`: no pickle, and names and shapes are checked against a spec that the
reader has from its own job and backbone, never from the bytes (spec/wire.md, adapter states).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from cloister import wire
from cloister.adapters._spec import LABEL, StateSpec
from cloister.errors import MalformedMessageError, StateMismatchError

Array = Float32[np.ndarray, "..."]


class AdapterState:
    """Every trained tensor of one adapter, in the spec's order. *Secret*: it stays in enclaves until it is released.

    Args:
        spec: what the tensors must be.
        tensors: float32, finite, exactly the names and shapes of the spec; not copied, and not to be changed after.

    Raises:
        StateMismatchError: names the tensor that does not fit.
    """

    KIND: ClassVar[bytes] = b"state"

    def __init__(self, spec: StateSpec, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self.spec = spec
        for name in (*spec.shapes, *tensors):
            if name not in tensors or name not in spec.shapes:
                raise StateMismatchError(f"{name} is {'missing' if name in spec.shapes else 'unknown'}", key=name)
        self.tensors = {name: _checked(name, tensors[name], shape) for name, shape in spec.shapes.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec.kind}, {len(self.tensors)} tensors, {self.spec.n_numbers} numbers)"

    def norm(self) -> float:
        """The L2 norm over all numbers together, summed in float64."""
        return float(np.sqrt(sum(_squares(tensor) for tensor in self.tensors.values())))

    def to_bytes(self) -> bytes:
        """The encoding that `parse` reads."""
        return wire.enc(LABEL + b" " + self.KIND, self.spec.digest, save_safetensors(dict(self.tensors)))

    @classmethod
    def parse(cls, blob: bytes | bytearray | memoryview, spec: StateSpec) -> Self:
        """Types untrusted bytes.

        Success means that the tensors fit the spec and are finite. The caller must still know who sent them.

        Raises:
            LimitExceededError: more bytes than a state of this spec can have.
            MalformedMessageError: not such an encoding, or of the other kind (a state for an update).
            StateMismatchError: of another spec, or a tensor is missing, unknown, of another shape or type, or not
                finite; names it.
        """
        label, digest, body = wire.dec(blob, 3, max_bytes=spec.n_bytes)
        if label != LABEL + b" " + cls.KIND:
            raise MalformedMessageError(f"not an encoded adapter {cls.KIND.decode()}")
        if digest != spec.digest:
            raise StateMismatchError("the state is of another adapter: its spec has another digest", key="spec")
        return cls(spec, parse_tensors(body))


class AdapterUpdate(AdapterState):
    """What a client's round changed: its state after local steps less the global state before. *Secret*."""

    KIND: ClassVar[bytes] = b"update"


def difference(state: AdapterState, base: AdapterState) -> AdapterUpdate:
    """The update that leads from `base` to `state`, computed and rounded in float32.

    Raises:
        StateMismatchError: the two are of different specs, or a difference is beyond float32.
    """
    base.spec.require(state.spec)
    with np.errstate(over="ignore"):
        return AdapterUpdate(base.spec, {name: state.tensors[name] - base.tensors[name] for name in base.tensors})


def applied(base: AdapterState, update: AdapterUpdate) -> AdapterState:
    """The state that `update` leads to from `base`.

    Raises:
        StateMismatchError: the two are of different specs, or a sum is beyond float32.
    """
    base.spec.require(update.spec)
    with np.errstate(over="ignore"):
        return AdapterState(base.spec, {name: base.tensors[name] + update.tensors[name] for name in base.tensors})


def parse_tensors(body: bytes) -> dict[str, NDArray[np.float32]]:
    """Float32 tensors out of untrusted safetensors bytes.

    Raises:
        MalformedMessageError: they do not parse.
        StateMismatchError: a tensor is of another type than float32; names it.
    """
    try:
        found: dict[str, NDArray[np.float32]] = load_safetensors(body)
    except (SafetensorError, ValueError, TypeError, KeyError):
        # KeyError: a type that numpy has no name for
        raise MalformedMessageError("the tensors are not safetensors that numpy can read") from None
    for name, tensor in found.items():
        if tensor.dtype != np.float32:
            raise StateMismatchError(f"{name} is {tensor.dtype}, expected float32", key=name)
    return found


def _checked(name: str, tensor: NDArray[np.float32], shape: tuple[int, ...]) -> Array:
    if tensor.dtype != np.float32 or tensor.shape != shape:
        raise StateMismatchError(f"{name} is {tensor.shape} {tensor.dtype}, expected {shape} float32", key=name)
    if not np.isfinite(tensor).all():
        raise StateMismatchError(f"{name} holds numbers that are not finite", key=name)
    view = np.ascontiguousarray(tensor).view()
    view.flags.writeable = False
    return view


def _squares(tensor: Array) -> np.float64:
    """The sum of squares in float64, without a float64 copy of a whole tensor."""
    flat = tensor.reshape(-1)
    # No product of BLAS: its threads cost more than a piece is worth.
    pieces = (np.square(flat[at : at + _PIECE], dtype=np.float64) for at in range(0, flat.size, _PIECE))
    return np.float64(sum(piece.sum() for piece in pieces))


_PIECE = 1 << 16
