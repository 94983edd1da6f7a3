"""Parts of a GPU report, and the nonce that binds it."""

from __future__ import annotations

import hashlib

import pytest

from cloister.attest._simulated.gpu import SIMULATED_DRIVER, SIMULATED_VBIOS, SimulatedGpuRoot, simulated_measurement
from cloister.attest._verifiers import gpu_report
from cloister.attest._verifiers.composite import COMPOSITE_TYPE, MAX_GPUS, pack_composite
from cloister.attest._verifiers.gpu import gpu_nonce
from cloister.attest._verifiers.gpu_report import GpuReport, parse_report
from cloister.errors import LimitExceededError
from cloister.wire import Evidence, unpack

NOW = 1_800_000_000


def test_nonce_is_that_of_the_specification():
    report_data = bytes(range(64))
    label = b"cloister-gpu-nonce/v1"
    expected = hashlib.sha256(
        len(label).to_bytes(4, "big") + label + len(report_data).to_bytes(4, "big") + report_data
    ).digest()
    assert gpu_nonce(report_data) == expected


def test_honest_report_parses():
    nonce = bytes(range(32))
    blob = SimulatedGpuRoot(now=NOW).device().report(nonce)
    report = parse_report(blob)
    assert report.nonce == nonce
    assert report.signed + report.signature == blob
    assert dict(report.measurements) == {i: simulated_measurement(i) for i in range(1, 5)}
    assert report.text(gpu_report.DRIVER) == SIMULATED_DRIVER
    assert report.vbios == SIMULATED_VBIOS


def test_fields_that_are_missing_are_empty():
    report = GpuReport(bytes(32), {}, {}, b"", b"")
    assert report.text(gpu_report.DRIVER) == ""
    assert report.vbios == ""


@pytest.mark.parametrize(
    ("stored", "version"),
    [("009f009601000000", "96.00.9f.00.01"), ("007400961a000000", "96.00.74.00.1a")],
)
def test_vbios_as_nvidia_writes_it(stored, version):
    fields = {gpu_report.VBIOS: bytes.fromhex(stored)}
    assert GpuReport(bytes(32), {}, fields, b"", b"").vbios == version


def test_packed_parts_stay_what_they_are():
    cpu, gpu = Evidence("tdx", b"quote", b"collateral"), Evidence("gpu", b"report", b"chain")
    packed = pack_composite(cpu, [gpu] * MAX_GPUS)
    assert packed.type == COMPOSITE_TYPE
    assert packed.aux == b""
    body = unpack(packed.blob, "attest.with-gpu")
    assert body["cpu"] == {"type": "tdx", "blob": b"quote", "aux": b"collateral"}
    assert len(body["gpus"]) == MAX_GPUS


def test_parts_that_are_too_large_together():
    half = Evidence("tdx", bytes(1 << 19), bytes(1 << 19))
    with pytest.raises(LimitExceededError):
        pack_composite(half, [half])
