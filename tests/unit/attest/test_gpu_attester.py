"""GPU evidence through a stand-in for NVML, and its way through the verifier."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from cloister.attest import Attester, Policy, SimulatedAttester, render_policy, verify_evidence
from cloister.attest._attesters.gpu import NvmlGpus, WithGpuAttester
from cloister.attest._simulated.gpu import SIMULATED_DRIVER, SIMULATED_VBIOS, SimulatedGpuRoot, SimulatedGpus
from cloister.attest._verifiers.gpu import gpu_nonce
from cloister.errors import AttestationError
from cloister.wire import Evidence

NOW = 1_800_000_000
NONCE = bytes(range(32))
REPORT_DATA = bytes(range(64))
RTMR3 = b"\x05" * 48


class NvmlError(Exception):
    pass


class FakeNvml:
    """The functions of pynvml that are used, over simulated GPUs; buffers are larger than what they hold."""

    NVMLError = NvmlError

    def __init__(self, count: int = 2, *, dev_tools: int = 0, driver: str | bytes = "590.12") -> None:
        root = SimulatedGpuRoot(now=NOW)
        self.gpus = [root.device() for _ in range(min(count, 2))]
        self.count = count
        self.dev_tools = dev_tools
        self.driver = driver
        self.open = 0
        self.nonce: bytes | None = None
        self.fail = False

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetConfComputeState(self):
        return SimpleNamespace(environment=2, ccFeature=1, devToolsMode=self.dev_tools)

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int):
        return self.gpus[index]

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, handle, nonce):
        if self.fail:
            raise NvmlError("Not Supported")
        report = handle.report(self.nonce or bytes(nonce))
        buffer = (ctypes.c_ubyte * 0x2000)(*report)
        return SimpleNamespace(attestationReport=buffer, attestationReportSize=len(report))

    def nvmlDeviceGetConfComputeGpuCertificate(self, handle):
        chain = handle.chain_pem() + b"\0"
        buffer = (ctypes.c_ubyte * 0x2000)(*chain)
        return SimpleNamespace(attestationCertChain=buffer, attestationCertChainSize=len(chain))


def test_one_report_from_each_gpu():
    nvml = FakeNvml()
    found = NvmlGpus(nvml).evidence(NONCE)
    assert [evidence.type for evidence in found] == ["gpu", "gpu"]
    assert all(evidence.blob[4:36] == NONCE for evidence in found)
    assert [evidence.aux for evidence in found] == [gpu.chain_pem() for gpu in nvml.gpus]
    assert nvml.open == 0


@pytest.mark.parametrize("driver", ["590.12", b"590.12"])
def test_claims(driver):
    told = NvmlGpus(FakeNvml(driver=driver)).claims()
    assert [claim["index"] for claim in told] == [0, 1]
    assert told[0] == {
        "tee": "gpu",
        "simulated": False,
        "driver": "590.12",
        "cc_feature": 1,
        "dev_tools": False,
        "index": 0,
    }


def test_nonce_of_the_wrong_size():
    with pytest.raises(AttestationError, match="nonce of a GPU report is 64 bytes"):
        NvmlGpus(FakeNvml()).evidence(REPORT_DATA)


def test_report_for_another_nonce():
    nvml = FakeNvml()
    nvml.nonce = bytes(32)
    with pytest.raises(AttestationError, match="not for the nonce"):
        NvmlGpus(nvml).evidence(NONCE)
    assert nvml.open == 0


def test_developer_mode():
    with pytest.raises(AttestationError, match="developer mode"):
        NvmlGpus(FakeNvml(dev_tools=1)).evidence(NONCE)


@pytest.mark.parametrize("count", [0, 17])
def test_number_of_gpus(count):
    with pytest.raises(AttestationError, match=f"has {count} NVIDIA GPUs"):
        NvmlGpus(FakeNvml(count)).evidence(NONCE)


def test_error_of_nvml():
    nvml = FakeNvml()
    nvml.fail = True
    with pytest.raises(AttestationError, match="Not Supported") as caught:
        NvmlGpus(nvml).evidence(NONCE)
    assert "confidential mode" in caught.value.hint
    assert nvml.open == 0


def test_old_package(monkeypatch):
    monkeypatch.delattr(FakeNvml, "nvmlSystemGetConfComputeState")
    with pytest.raises(AttestationError, match="this version of nvidia-ml-py"):
        NvmlGpus(FakeNvml()).evidence(NONCE)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(AttestationError, match="not installed") as caught:
        NvmlGpus().evidence(NONCE)
    assert "cloister[gpu]" in caught.value.hint


def test_package_is_loaded_at_first_use(monkeypatch):
    gpus = NvmlGpus()
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert len(gpus.evidence(NONCE)) == 2


@pytest.fixture
def attester(root) -> SimulatedAttester:
    root.refresh(NOW)
    return SimulatedAttester(root.provision(), rtmr3=RTMR3)


def test_evidence_of_both_is_accepted(root, attester):
    vendor = SimulatedGpuRoot(now=NOW)
    both: Attester = WithGpuAttester(attester, SimulatedGpus(vendor.device(), vendor.device()))
    text = render_policy(root_sha256=root.root_sha256, server_rtmr3=[RTMR3]).decode()
    text = text.replace('accept = ["simulated"]', 'accept = ["simulated", "with-gpu"]')
    text = text.replace("[roots]", f'[roots]\nnvidia_sha256 = ["{vendor.root_sha256}"]')
    text += f'\n[gpu]\nrequired = true\ndriver = ["{SIMULATED_DRIVER}"]\nvbios = ["{SIMULATED_VBIOS}"]\n'
    evidence = both.evidence(REPORT_DATA)
    assert evidence.type == both.type == "with-gpu"
    decision = verify_evidence(evidence, Policy.parse(text.encode()), role="server", report_data=REPORT_DATA, now=NOW)
    assert [part.report_data for part in decision.claims.parts] == [gpu_nonce(REPORT_DATA)] * 2


def test_the_rest_is_the_cpus(attester):
    both = WithGpuAttester(attester, SimulatedGpus(SimulatedGpuRoot(now=NOW).device()))
    assert both.sealing_key("x") == attester.sealing_key("x")
    assert both.binding.startswith(attester.binding)
    assert repr(attester) in repr(both)
    claims = both.claims()
    assert claims["evidence_type"] == "with-gpu"
    assert claims["rtmr3"] == RTMR3.hex()
    assert claims["gpus"] == [{"tee": "gpu", "simulated": True, "driver": SIMULATED_DRIVER}]


def test_too_large_together(attester):
    class Large:
        def evidence(self, nonce: bytes) -> list[Evidence]:
            return [Evidence("gpu", nonce, bytes(1 << 20))]

        def claims(self):
            return []

    with pytest.raises(AttestationError, match="CPU and GPUs together"):
        WithGpuAttester(attester, Large()).evidence(REPORT_DATA)
