"""What a device computes: products in [0, m), on the CPU and with the logic of the GPU run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from tests.oracle import slow_ring
from tests.unit.offload._links import make_weight

from cloister.errors import OffloadError
from cloister.offload import _compute, _cuda
from cloister.offload._compute import CpuDevice, Device, combine, open_device
from cloister.offload._cuda import GpuDevice, choose_combine
from cloister.pad import Direction
from cloister.ring import FAITHFUL, FAST, RingFormat

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
WAYS = pytest.mark.parametrize("direction", list(Direction), ids=str)
EDGES = [0, 1, -1, 255, 256, -256, 2**23, 2**31 - 1, -(2**31)]


class CpuRuntime:
    """Stands for a GPU's runtime, and counts."""

    device = torch.device("cpu")
    name = "not a GPU"

    def __init__(self) -> None:
        self.used: list[int] = []
        self.pinned_bytes: list[int] = []
        self.n_pinned = self.n_finished = 0

    def streams(self) -> list[Callable[[], AbstractContextManager[Any]]]:
        return [lambda i=i: nullcontext(self.used.append(i)) for i in range(2)]

    def finish(self) -> None:
        self.n_finished += 1

    def pinned(self, n_bytes: int) -> np.ndarray:
        self.pinned_bytes.append(n_bytes)
        return np.empty(n_bytes, dtype=np.uint8)

    def pin(self, memory: np.ndarray) -> Callable[[], None]:
        self.n_pinned += 1

        def undo() -> None:
            self.n_pinned -= 1

        return undo


def multiply(device: Device, fmt: RingFormat, direction: Direction, n_tokens: int) -> None:
    """A product by `device`, compared with Python's integers."""
    weight = make_weight(fmt)
    integers = weight.w_q.tolist()
    if direction is Direction.BACKWARD:
        integers = slow_ring.transpose(integers)
    generator = torch.Generator().manual_seed(n_tokens)
    n_in = len(integers[0])
    x = torch.randint(0, fmt.modulus, (n_tokens, n_in), generator=generator)
    answer = np.full((n_tokens, len(integers)), 7, dtype=np.uint32)
    loaded = device.load(fmt, weight.w_q)
    assert loaded.sizes(direction) == (n_in, len(integers))
    device.multiply(loaded, direction, fmt.encode(x).numpy(), answer)
    expected = slow_ring.integer_product(x.tolist(), integers)
    assert answer.tolist() == [[value % fmt.modulus for value in row] for row in expected]


@BOTH
@WAYS
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_cpu(fmt: RingFormat, direction: Direction, n_tokens: int) -> None:
    multiply(CpuDevice(), fmt, direction, n_tokens)


@BOTH
@WAYS
def test_cpu_in_tiles(fmt: RingFormat, direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compute, "_TILE_ELEMENTS", 1)
    monkeypatch.setattr(_compute, "_MIN_TILE_TOKENS", 4)
    multiply(CpuDevice(), fmt, direction, 11)


def test_accumulators_are_kept_and_grown() -> None:
    device = CpuDevice()
    first = device._accumulators(3, 4, 5)
    assert device._accumulators(3, 2, 5).data_ptr() == first.data_ptr()
    assert device._accumulators(4, 4, 5).numel() == 80


@BOTH
def test_the_epilogue_of_torch(fmt: RingFormat) -> None:
    accumulators = torch.tensor([EDGES[i:] + EDGES[:i] for i in range(fmt.n_planes)], dtype=torch.int32)
    found = combine(accumulators.unsqueeze(1), fmt)
    assert found.dtype == torch.int32
    columns = zip(*accumulators.tolist(), strict=True)
    assert found.numpy().view(np.uint32).tolist() == [[slow_ring.decode(list(c), fmt.name) for c in columns]]


@BOTH
def test_the_epilogue_of_the_kernels_is_the_same(fmt: RingFormat) -> None:
    generator = torch.Generator().manual_seed(3)
    accumulators = torch.randint(-(2**31), 2**31, (fmt.n_planes, 3, 700), generator=generator).to(torch.int32)
    found = np.empty(3 * 700, dtype=np.uint32)
    _compute._native.combine(accumulators.view(fmt.n_planes, -1).numpy(), fmt.CODE, found)
    assert np.array_equal(found.reshape(3, 700), combine(accumulators, fmt).numpy().view(np.uint32))


def test_memory_of_the_cpu() -> None:
    device = CpuDevice()
    memory = device.memory(10)
    assert memory.dtype == np.uint8 and len(memory) == 10
    device.adopt(memory)()
    assert device.name.startswith("cpu, ") and device.kernel == "int-mm"


# --- the GPU's logic --------------------------------------------------------------------------------------------------


@BOTH
@WAYS
@pytest.mark.parametrize("n_tokens", [1, 9, 40])
def test_gpu_in_pieces(fmt: RingFormat, direction: Direction, n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_PIECE_TOKENS", 4)
    runtime = CpuRuntime()
    multiply(GpuDevice(runtime), fmt, direction, n_tokens)
    assert runtime.n_finished == 2  # after the load, and before the answer is anybody's
    n_pieces = {1: 1, 9: 3, 40: 8}[n_tokens]
    assert runtime.used == [i % 2 for i in range(n_pieces)]


def test_memory_of_the_gpu() -> None:
    runtime = CpuRuntime()
    device = GpuDevice(runtime)
    assert len(device.memory(10)) == 10 and runtime.pinned_bytes == [10]
    undo = device.adopt(np.empty(4, dtype=np.uint8))
    assert runtime.n_pinned == 1
    undo()
    assert runtime.n_pinned == 0


def test_an_epilogue_that_works_is_taken() -> None:
    def candidate(accumulators: torch.Tensor, fmt: RingFormat) -> torch.Tensor:
        return combine(accumulators, fmt).clone()

    assert choose_combine(candidate, torch.device("cpu")) is candidate
    assert GpuDevice(CpuRuntime(), candidate).kernel == "int-mm, triton"


def test_an_epilogue_that_does_not_run_is_not() -> None:
    def candidate(accumulators: torch.Tensor, fmt: RingFormat) -> torch.Tensor:
        raise RuntimeError("no compiler")

    device = GpuDevice(CpuRuntime(), candidate)
    assert device.kernel == "int-mm, torch" and device.name == "not a GPU"


@pytest.mark.parametrize("wrong", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
def test_an_epilogue_that_is_wrong_ends_the_process(wrong: RingFormat) -> None:
    def candidate(accumulators: torch.Tensor, fmt: RingFormat) -> torch.Tensor:
        found = combine(accumulators, fmt)
        found[-1, -1] += fmt is wrong
        return found

    with pytest.raises(OffloadError, match=f"wrong for the format {wrong.name}"):
        GpuDevice(CpuRuntime(), candidate)


# --- which device -----------------------------------------------------------------------------------------------------


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device("auto"), CpuDevice)
    with pytest.raises(OffloadError, match="no CUDA device"):
        open_device("cuda")


def test_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = GpuDevice(CpuRuntime())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda, "open_cuda", lambda: opened)
    assert open_device("auto") is open_device("cuda") is opened
    assert isinstance(open_device("cpu"), CpuDevice)
