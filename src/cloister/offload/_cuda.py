"""The accelerator on a GPU: weights stay there as int8, tokens pass in pieces, so that copies and products overlap."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Int8, Int16, Int32, UInt8, UInt32
from torch import Tensor

from cloister.errors import OffloadError
from cloister.offload._compute import Device, DeviceWeight, combine
from cloister.pad import Direction
from cloister.ring import FORMATS, RingFormat, product
from cloister.ring._products import check_kernel

_PIECE_TOKENS = 256  # fewer leave most of a large GPU idle
_MAX_PIECES = 8
_EXTREMES = (0, 1, -1, 127, 128, 250, 251, 255, 256, -251, -256, 2**24, 2**31 - 1, -(2**31))

Combine = Callable[[Int32[Tensor, "planes tokens out"], RingFormat], Int32[Tensor, "tokens out"]]
_log = logging.getLogger(__name__)


class GpuRuntime(Protocol):
    """What a GPU's runtime does beside arithmetic, apart, so that the rest is tested where there is no GPU."""

    @property
    def device(self) -> torch.device:
        """Where tensors go."""
        ...

    @property
    def name(self) -> str:
        """What the device is."""
        ...

    def streams(self) -> list[Callable[[], AbstractContextManager[Any]]]:
        """Queues of work that overlap; what runs in the context of one is put there."""
        ...

    def finish(self) -> None:
        """Wait until every queue is empty."""
        ...

    def pinned(self, n_bytes: int) -> UInt8[np.ndarray, " bytes"]:
        """Memory of the host that is copied from and to without a stop in between."""
        ...

    def pin(self, memory: UInt8[np.ndarray, " bytes"]) -> Callable[[], None]:
        """Make memory so, where the system allows; returns what undoes it."""
        ...


class GpuDevice(Device):
    """Products on a GPU.

    Args:
        runtime: of the GPU.
        candidate: an epilogue that is faster than torch's, and is used if it gives the same bits.

    Raises:
        OffloadError: its int8 product is not exact, or the epilogue is wrong.
    """

    def __init__(self, runtime: GpuRuntime, candidate: Combine | None = None) -> None:
        check_kernel(str(runtime.device))
        self._runtime = runtime
        self._streams = runtime.streams()
        self.combine = choose_combine(candidate, runtime.device)
        self.name = runtime.name
        self.kernel = "int-mm, torch" if self.combine is combine else "int-mm, triton"

    def load(self, fmt: RingFormat, w_q: Int16[Tensor, "out in"]) -> DeviceWeight:
        """See `Device.load`."""
        weight = DeviceWeight(fmt, fmt.encode_weight(w_q.to(self._runtime.device)))
        self._runtime.finish()  # other streams than this one read it
        return weight

    def multiply(
        self,
        weight: DeviceWeight,
        direction: Direction,
        planes: Int8[np.ndarray, "planes tokens in"],
        answer: UInt32[np.ndarray, "tokens out"],
    ) -> None:
        """See `Device.multiply`."""
        by = weight.of(direction)
        host_x = torch.from_numpy(planes)  # pyright: ignore[reportUnknownMemberType]
        host_y = torch.from_numpy(answer.view(np.int32))  # pyright: ignore[reportUnknownMemberType]
        n_tokens = len(answer)
        piece = max(_PIECE_TOKENS, -(-n_tokens // _MAX_PIECES))
        for i, start in enumerate(range(0, n_tokens, piece)):
            part = slice(start, start + piece)
            with self._streams[i % len(self._streams)]():
                x = torch.empty_like(host_x[:, part], device=self._runtime.device)
                for plane, source in zip(x, host_x[:, part], strict=True):  # each is one piece of memory; all are not
                    plane.copy_(source, non_blocking=True)
                elements = self.combine(product(x, by, weight.format), weight.format)
                host_y[part].copy_(elements, non_blocking=True)
        self._runtime.finish()

    def memory(self, n_bytes: int) -> UInt8[np.ndarray, " bytes"]:
        """See `Device.memory`."""
        return self._runtime.pinned(n_bytes)

    def adopt(self, memory: UInt8[np.ndarray, " bytes"]) -> Callable[[], None]:
        """See `Device.adopt`."""
        return self._runtime.pin(memory)


def choose_combine(candidate: Combine | None, device: torch.device) -> Combine:
    """The candidate if it works on this device, else torch's.

    Raises:
        OffloadError: it works and gives other bits.
    """
    if candidate is None:
        return combine
    extremes = torch.tensor(_EXTREMES, dtype=torch.int32, device=device)
    for fmt in FORMATS.values():
        grids = torch.meshgrid(*([extremes] * fmt.n_planes), indexing="ij")
        accumulators = torch.stack([grid.reshape(len(extremes), -1) for grid in grids])
        try:
            found = candidate(accumulators, fmt)
        except Exception as error:  # whatever a compiler at run time may raise
            _log.warning("the fused epilogue does not run here (%s): torch's is used", type(error).__name__)
            return combine
        if not torch.equal(found, combine(accumulators, fmt)):
            raise OffloadError(f"the fused epilogue is wrong for the format {fmt.name} on this device")
    return candidate


class CudaRuntime:  # pragma: no cover  # tests/e2e/test_accelerator.py runs it where there is a CUDA device
    """See `GpuRuntime`."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)

    def streams(self) -> list[Callable[[], AbstractContextManager[Any]]]:
        """Two: while one computes, the other copies in or out."""
        found = [torch.cuda.Stream(self.device) for _ in range(2)]
        return [lambda stream=stream: torch.cuda.stream(stream) for stream in found]

    def finish(self) -> None:
        """See `GpuRuntime.finish`."""
        torch.cuda.synchronize(self.device)

    def pinned(self, n_bytes: int) -> UInt8[np.ndarray, " bytes"]:
        """See `GpuRuntime.pinned`."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy()

    def pin(self, memory: UInt8[np.ndarray, " bytes"]) -> Callable[[], None]:
        """See `GpuRuntime.pin`. Memory that cannot be pinned is copied through the driver's own, more slowly."""
        runtime = cast("Any", torch.cuda.cudart())
        place = memory.ctypes.data
        if int(runtime.cudaHostRegister(place, memory.nbytes, 0)) != 0:
            _log.warning("the shared memory could not be pinned")
            return lambda: None
        return lambda: runtime.cudaHostUnregister(place)


def open_cuda() -> Device:  # pragma: no cover  # as above
    """The CUDA device, with the Triton epilogue where Triton is."""
    try:
        from cloister.offload._triton import combine as candidate
    except ImportError:
        candidate = None
    return GpuDevice(CudaRuntime(), candidate)
