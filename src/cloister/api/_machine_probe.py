"""`--machine this`: the constants of an estimate, measured here in a few seconds with the code that a run uses."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

from cloister.offload import least_seconds, measure_kernels
from cloister.pad import Direction

from ._machine import TEES, THIS, AcceleratorSpec, EnclaveSpec, KernelSpec, LinkSpec, Machine

if TYPE_CHECKING:
    from cloister.offload import LocalAccelerator
    from cloister.ring import RingFormat

_TOKENS = 256
_LAYER = "measure"
_WIDTH = 1024
_STREAM_FLOATS = 1 << 24  # 64 MiB: larger than caches
_SHARED_GB_S = 1000.0  # next to nothing, for memory that is not copied
_GIGA = 1e9


class Clock(Protocol):
    """Seconds, of the wall or of processors. `pid` is the accelerator's process where it works too."""

    def __call__(self, pid: int | None = None) -> float: ...


def _wall(pid: int | None = None) -> float:
    return time.perf_counter()


def measure_machine(*, seconds: float = 0.15, clock: Clock = _wall) -> Machine:
    """Measure this machine. Starts an accelerator on it, and ends it.

    What runs in a TEE must be measured in it: elsewhere the rates are those of the same processor without one.

    Args:
        seconds: to spend on each of some thirty constants; the accelerator takes a few more to start.
        clock: another one than the wall's, on a machine that is busy.

    Raises:
        OffloadError: the accelerator does not start, or has no exact int8 product.
    """
    import torch

    from cloister.offload import LocalAccelerator
    from cloister.ring import FORMATS

    timing = _Timing(seconds, clock)
    with LocalAccelerator("cpu") as device:
        enclave = EnclaveSpec(
            tee=_tee(),
            cores=torch.get_num_threads(),
            kernel_threads=1,
            fp32_gflop_s=_float_gflop_s("float32", timing),
            bf16_gflop_s=_float_gflop_s("bfloat16", timing),
            int8_gop_s=_int8_gop_s(timing),
            memory_gb_s=_stream_gb_s(timing),
            memory_bytes=psutil.virtual_memory().total,
            # The accelerator has loaded what an enclave loads, and no model yet.
            runtime_bytes=psutil.Process(device.pid).memory_info().rss,
        )
        accelerator, link = _measure_accelerator(device, enclave, timing)
    return Machine(
        name=THIS,
        about=f"this machine: {_processor()}, {enclave.cores:.0f} threads; the accelerator is a process on it",
        network_mbit_s=1000,
        enclave=enclave,
        accelerator=accelerator,
        link=link,
        helper_link=LinkSpec(gb_s=0.125, latency_us=200),
        kernels={name: _kernels(fmt, timing) for name, fmt in FORMATS.items()},
        sources=_sources(),
    )


@dataclass(frozen=True)
class _Timing:
    seconds: float
    clock: Clock

    def least(self, run: Callable[[], object], pid: int | None = None) -> float:
        return least_seconds(run, seconds=self.seconds, clock=lambda: self.clock(pid))


def _float_gflop_s(dtype: str, timing: _Timing) -> float:
    import torch

    x = torch.ones((_TOKENS, _WIDTH), dtype=getattr(torch, dtype))
    weight = torch.ones((_WIDTH, _WIDTH), dtype=x.dtype)
    return 2 * _TOKENS * _WIDTH**2 / timing.least(lambda: x @ weight.T) / _GIGA


def _int8_gop_s(timing: _Timing) -> float:
    """Of the products that the mode otp makes inside."""
    import torch

    from cloister.ring import FAST, product

    x = torch.ones((FAST.n_planes, _TOKENS, _WIDTH), dtype=torch.int8)
    weight = torch.ones((1, _WIDTH, _WIDTH), dtype=torch.int8)
    out = torch.empty(x.shape, dtype=torch.int32)
    operations = FAST.n_planes * 2 * _TOKENS * _WIDTH**2
    return operations / timing.least(lambda: product(x, weight, FAST, out=out)) / _GIGA


def _stream_gb_s(timing: _Timing) -> float:
    """Of element-wise steps on tensors that no cache holds."""
    import torch

    a, b = torch.ones(_STREAM_FLOATS), torch.ones(_STREAM_FLOATS)
    return 3 * a.nbytes / timing.least(lambda: torch.add(a, b, out=b)) / _GIGA


def _measure_accelerator(
    device: LocalAccelerator, enclave: EnclaveSpec, timing: _Timing
) -> tuple[AcceleratorSpec, LinkSpec]:
    """Its products at two widths give its rate and what an element costs; one of next to nothing gives the latency.

    The planes stand in memory that both share, so what is left of the link is in the elements' cost.
    """
    latency = _product_seconds(device, 1, 32, timing)
    half, whole = (_product_seconds(device, _TOKENS, width, timing) - latency for width in (_WIDTH // 2, _WIDTH))
    rate, combine = fit_product(half, whole, width=_WIDTH // 2, n_tokens=_TOKENS, n_planes=3)
    spec = AcceleratorSpec(
        shares_cpu=True,
        bf16_tflop_s=enclave.bf16_gflop_s / 1e3,
        int8_top_s=rate / 1e12,
        attained=1.0,
        combine_ns=combine * 1e9,
        memory_gb_s=enclave.memory_gb_s,
        memory_bytes=enclave.memory_bytes,
        confidential=False,
        confidential_share=1.0,
    )
    return spec, LinkSpec(gb_s=_SHARED_GB_S, latency_us=latency * 1e6)


def fit_product(half: float, whole: float, *, width: int, n_tokens: int, n_planes: int) -> tuple[float, float]:
    """Operations a second, and seconds an output element, of square products that took `half` at a width and `whole` at
    twice that: each is n_planes * 2 * T * width^2 / rate + T * width * c. Noise must not make either negative."""
    square = max((whole - 2 * half) / 2, whole / 8)
    rate = n_planes * 2.0 * n_tokens * width**2 / square
    return rate, max(half - square, 0.0) / (n_tokens * width)


def _product_seconds(device: LocalAccelerator, n_tokens: int, width: int, timing: _Timing) -> float:
    import torch

    from cloister.ring import FAST, quantize_weight

    device.load(_LAYER, quantize_weight(torch.ones((width, width)), FAST, layer=_LAYER))

    def multiply() -> None:
        with device.call(_LAYER, Direction.FORWARD, n_tokens) as call:
            call.multiply()

    return timing.least(multiply, device.pid)


def _kernels(fmt: RingFormat, timing: _Timing) -> KernelSpec:
    found = measure_kernels(fmt, seconds=timing.seconds, clock=timing.clock)
    return KernelSpec(
        otp_ns=found.otp,
        encode_ns=found.encode,
        combine_ns=found.combine,
        lattice_ns=found.lattice,
        mask_ns=found.mask,
        unmask_ns=found.unmask,
    )


def _tee() -> str:
    from cloister.attest import detect_backends

    found = [backend.type for backend in detect_backends() if backend.found]
    return next((tee for tee in TEES if tee in found), "none")


def _processor() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return names[0] if names else platform.machine()


def _sources() -> dict[str, str]:
    measured = f"measured: here, on {date.today().isoformat()}"
    return {
        "network_mbit_s": "assumed: an institution's",
        "enclave": measured,
        "enclave.tee": "measured: what `cloister doctor` finds",
        "enclave.kernel_threads": "measured: this release makes pads and masks on the thread that calls",
        "enclave.memory_bytes": "assumed: all memory of the machine",
        "accelerator": measured,
        "accelerator.memory_bytes": "assumed: all memory of the machine",
        "accelerator.confidential": "assumed: a process has no confidential mode",
        "accelerator.confidential_share": "assumed: not used",
        "link": measured,
        "link.gb_s": "assumed: shared memory is not copied; what reading it costs is in accelerator.combine_ns",
        "helper_link": "assumed: the same network",
        "kernels": measured,
    }
