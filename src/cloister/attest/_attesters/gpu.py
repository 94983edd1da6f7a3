"""GPU evidence beside that of a CPU: reports of NVIDIA GPUs through NVML, bound to the CPU's session by their nonce.

Played through in tests with a stand-in for NVML; not yet run on a GPU in confidential mode.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator
from typing import Any, Protocol

from cloister.attest._types import Attester, MonotonicCounter
from cloister.attest._verifiers.composite import COMPOSITE_TYPE, MAX_GPUS, pack_composite
from cloister.attest._verifiers.gpu import gpu_nonce
from cloister.attest._verifiers.gpu_report import NONCE_BYTES, REQUEST_START
from cloister.errors import AttestationError, WireError
from cloister.wire import Evidence

_NONCE = slice(len(REQUEST_START), len(REQUEST_START) + NONCE_BYTES)
_MODE_HINT = "turn the GPU's confidential mode on from the host, then pass it to the confidential VM"


class GpuSource(Protocol):
    """Where the reports of a machine's GPUs come from."""

    def evidence(self, nonce: bytes) -> list[Evidence]:
        """One report for `nonce` (32 bytes, public) from each GPU, with its certificates."""
        ...

    def claims(self) -> list[dict[str, Any]]:
        """What the GPUs would claim; unproven, JSON types only."""
        ...


class NvmlGpus:
    """The NVIDIA GPUs of this machine, all of them: a workload could use any.

    Args:
        nvml: the module `pynvml`; loaded at first use where it is not given.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml

    def evidence(self, nonce: bytes) -> list[Evidence]:
        """One report for `nonce` (32 bytes, public) from each GPU, with its certificates.

        Raises:
            AttestationError: NVML or its Python package is missing, there is no GPU or more than 16, they are in
                developer mode, or one makes no report for this nonce.
        """
        if len(nonce) != NONCE_BYTES:
            raise AttestationError(f"the nonce of a GPU report is {len(nonce)} bytes, not {NONCE_BYTES}")
        with self._session() as nvml:
            if nvml.nvmlSystemGetConfComputeState().devToolsMode:
                raise AttestationError("the GPUs are in developer mode, which protects nothing", hint=_MODE_HINT)
            return [self._report(nvml, handle, nonce) for handle in _handles(nvml)]

    def claims(self) -> list[dict[str, Any]]:
        """Driver and state of each GPU as NVML tells them; unproven, JSON types only.

        Raises:
            AttestationError: as `evidence`.
        """
        with self._session() as nvml:
            state = nvml.nvmlSystemGetConfComputeState()
            driver = nvml.nvmlSystemGetDriverVersion()
            told: dict[str, Any] = {
                "tee": "gpu",
                "simulated": False,
                "driver": driver.decode() if isinstance(driver, bytes) else str(driver),
                "cc_feature": int(state.ccFeature),
                "dev_tools": bool(state.devToolsMode),
            }
            return [dict(told, index=i) for i, _ in enumerate(_handles(nvml))]

    def _report(self, nvml: Any, handle: Any, nonce: bytes) -> Evidence:
        found = nvml.nvmlDeviceGetConfComputeGpuAttestationReport(handle, nonce)
        report = bytes(found.attestationReport[: found.attestationReportSize])
        if report[_NONCE] != nonce:
            raise AttestationError("a GPU's report is not for the nonce that it was asked with")
        found = nvml.nvmlDeviceGetConfComputeGpuCertificate(handle)
        chain = bytes(found.attestationCertChain[: found.attestationCertChainSize])
        return Evidence("gpu", report, chain.rstrip(b"\0"))

    @contextlib.contextmanager
    def _session(self) -> Generator[Any]:
        """NVML from initialisation to shutdown, with its errors turned into ours."""
        nvml = self._nvml or _load_nvml()
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            try:
                yield nvml
            finally:
                nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            raise AttestationError(f"NVML cannot attest this machine's GPUs: {error}", hint=_MODE_HINT) from None
        except AttributeError as error:
            raise AttestationError(
                f"this version of nvidia-ml-py cannot attest GPUs: {error}", hint="pip install -U 'cloister[gpu]'"
            ) from None


class WithGpuAttester:
    """An attester of a CPU whose evidence carries that of the machine's GPUs along.

    Args:
        cpu_attester: makes the evidence that is bound to the session.
        gpu: whose reports are bound to that evidence, by the nonce derived from the same report data.
    """

    type = COMPOSITE_TYPE

    def __init__(self, cpu_attester: Attester, gpu: GpuSource) -> None:
        self._cpu = cpu_attester
        self._gpu = gpu

    def __repr__(self) -> str:
        return f"WithGpuAttester({self._cpu!r})"

    @property
    def binding(self) -> str:
        """Where the 64 bytes land in the CPU's evidence; the GPUs' nonces are derived from them."""
        return f"{self._cpu.binding}; GPU reports: nonce = SHA-256 over it"

    def evidence(self, report_data: bytes) -> Evidence:
        """Fresh evidence of the CPU over `report_data` (64 bytes, public), and of each GPU for the same session.

        Raises:
            AttestationError: the CPU's attester or the GPUs cannot make theirs, or it is too large together.
        """
        # The CPU's first: it says what is wrong with `report_data`.
        cpu = self._cpu.evidence(report_data)
        gpus = self._gpu.evidence(gpu_nonce(report_data))
        try:
            return pack_composite(cpu, gpus)
        except WireError as error:
            raise AttestationError(f"evidence of CPU and GPUs together: {error.cause}") from None

    def sealing_key(self, label: str) -> bytes:
        """The CPU's: a GPU derives no keys."""
        return self._cpu.sealing_key(label)

    def counter(self) -> MonotonicCounter | None:
        """That of the CPU's attester."""
        return self._cpu.counter()

    def claims(self) -> dict[str, Any]:
        """What the CPU's attester would claim, with the GPUs' under "gpus"; unproven, JSON types only."""
        return {**self._cpu.claims(), "evidence_type": self.type, "gpus": self._gpu.claims()}


def _handles(nvml: Any) -> list[Any]:
    count = nvml.nvmlDeviceGetCount()
    if not 1 <= count <= MAX_GPUS:
        raise AttestationError(f"this machine has {count} NVIDIA GPUs, and evidence is of 1 to {MAX_GPUS}")
    return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]


def _load_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise AttestationError(
            "GPU evidence needs the package nvidia-ml-py, which is not installed", hint="pip install 'cloister[gpu]'"
        ) from None
