"""What the accelerator does with a device: hold the planes of public weights, multiply masked planes by them.

Runs outside of the enclave. Nothing here is secret, and nothing of it is trusted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int8, Int16, Int32, UInt8, UInt32
from torch import Tensor

from cloister.errors import OffloadError
from cloister.kernels import _native
from cloister.pad import Direction
from cloister.ring import RingFormat, product
from cloister.ring._products import check_kernel

_TILE_ELEMENTS = 1 << 22  # of an answer: its accumulators are then at most 64 MiB, which are kept and not made anew
_MIN_TILE_TOKENS = 256  # fewer, and packing the weight at each product costs more than the accumulators do


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """The integers of a layer as planes on a device, *public*; backward takes their transposed view."""

    format: RingFormat
    planes: Int8[Tensor, "weight_planes out in"] = field(repr=False)

    def of(self, direction: Direction) -> Int8[Tensor, "weight_planes rows columns"]:
        """What is multiplied by."""
        return self.planes if direction is Direction.FORWARD else self.planes.transpose(1, 2)

    def sizes(self, direction: Direction) -> tuple[int, int]:
        """Features that go in and come out, a token."""
        _, rows, columns = self.of(direction).shape
        return columns, rows


class Device(ABC):
    """A device and how it multiplies.

    Attributes:
        name: what it is, for reports; the enclave believes none of it.
        kernel: which implementation.
    """

    name: str
    kernel: str

    @abstractmethod
    def load(self, fmt: RingFormat, w_q: Int16[Tensor, "out in"]) -> DeviceWeight:
        """The planes of an integer weight, on the device."""

    @abstractmethod
    def multiply(
        self,
        weight: DeviceWeight,
        direction: Direction,
        planes: Int8[np.ndarray, "planes tokens in"],
        answer: UInt32[np.ndarray, "tokens out"],
    ) -> None:
        """Write the product's elements in [0, m) into `answer`, C-contiguous like `planes`."""

    @abstractmethod
    def memory(self, n_bytes: int) -> UInt8[np.ndarray, " bytes"]:
        """Memory of the host that the device reads and writes quickly."""

    @abstractmethod
    def adopt(self, memory: UInt8[np.ndarray, " bytes"]) -> Callable[[], None]:
        """Make memory that somebody else owns quick to read and write, if that can be done. Returns what undoes it."""


class CpuDevice(Device):
    """All threads that torch has.

    Raises:
        OffloadError: the processor's int8 product is not exact.
    """

    def __init__(self) -> None:
        check_kernel("cpu")
        self.kernel = "int-mm"
        self.name = f"cpu, {torch.get_num_threads()} threads, {_native.level()}"
        self._scratch = torch.empty(0, dtype=torch.int32)

    def load(self, fmt: RingFormat, w_q: Int16[Tensor, "out in"]) -> DeviceWeight:
        """See `Device.load`."""
        return DeviceWeight(fmt, fmt.encode_weight(w_q))

    def multiply(
        self,
        weight: DeviceWeight,
        direction: Direction,
        planes: Int8[np.ndarray, "planes tokens in"],
        answer: UInt32[np.ndarray, "tokens out"],
    ) -> None:
        """See `Device.multiply`."""
        by, x = weight.of(direction), torch.from_numpy(planes)  # pyright: ignore[reportUnknownMemberType]
        n_planes, n_tokens, n_out = len(planes), *answer.shape
        tile = max(_MIN_TILE_TOKENS, _TILE_ELEMENTS // n_out)
        for start in range(0, n_tokens, tile):
            part = answer[start : start + tile]
            out = self._accumulators(n_planes, len(part), n_out)
            product(x[:, start : start + tile], by, weight.format, out=out)
            _native.combine(out.view(n_planes, -1).numpy(), weight.format.CODE, part.reshape(-1))

    def memory(self, n_bytes: int) -> UInt8[np.ndarray, " bytes"]:
        """See `Device.memory`."""
        return np.empty(n_bytes, dtype=np.uint8)

    def adopt(self, memory: UInt8[np.ndarray, " bytes"]) -> Callable[[], None]:
        """See `Device.adopt`. All memory is the same to a processor."""
        return lambda: None

    def _accumulators(self, *shape: int) -> Int32[Tensor, "planes tokens out"]:
        size = shape[0] * shape[1] * shape[2]
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.int32)
        return self._scratch[:size].view(shape)


def combine(accumulators: Int32[Tensor, "planes tokens out"], fmt: RingFormat) -> Int32[Tensor, "tokens out"]:
    """The elements in [0, m) as the bits of a uint32, for which torch has next to no arithmetic; on any device."""
    element = fmt.decode_product(accumulators)
    return (element - ((element >> 31) << 32)).to(torch.int32)


def open_device(name: str) -> Device:
    """The device of that name: "cpu", "cuda", or "auto" for CUDA where there is one.

    Raises:
        OffloadError: there is none, or its int8 product is not exact.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice()
    if not torch.cuda.is_available():
        raise OffloadError("there is no CUDA device here", hint="--device cpu, or a torch that was built for CUDA")
    from cloister.offload._cuda import open_cuda

    return open_cuda()
