"""Real reports of NVIDIA H100 GPUs, under NVIDIA's own root: the production path without a GPU."""

from __future__ import annotations

import base64
import json

import pytest

from cloister.attest import Policy
from cloister.attest._verifiers.gpu import NVIDIA_ROOT_SHA256, verify_gpu
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

NOW = 1780272000  # 2026-06-01
MEASUREMENT_2 = "8048dfd18fe229bf16eb9d30cca0f11a24dafe6eb731de1462984645a0b189b77c4e4e17de727a5e19e3d07de51da338"
POLICY = f"""
version = 1
accept = ["with-gpu"]
[roots]
nvidia_sha256 = ["{NVIDIA_ROOT_SHA256}"]
[gpu]
driver = ["550.90.07", "580.95.05", "590.12"]
vbios = ["96.00.9f.00.01", "96.00.74.00.1a", "96.00.A5.00.01"]
measurements.2 = ["{MEASUREMENT_2}"]
"""
PPCIE = POLICY.replace("measurements.2", 'cc_mode = ["protected_pcie"]\n#')


@pytest.fixture(scope="module")
def folder(samples):
    return samples.parent / "nvidia"


@pytest.fixture
def h100(folder) -> Evidence:
    report = bytes.fromhex((folder / "nvtrust/hopperAttestationReport.txt").read_text())
    return Evidence("gpu", report, (folder / "nvtrust/hopperCertChain.txt").read_bytes())


def verify(evidence: Evidence, text: str = POLICY, *, now: int = NOW):
    return verify_gpu(evidence, Policy.parse(text.encode()), now=now)


def refusals(proven) -> list[type]:
    return [finding.error for finding in proven.findings.refused]


def test_h100_verifies(h100, folder):
    proven = verify(h100)
    claims = proven.claims
    assert refusals(proven) == []
    assert not claims.simulated
    assert claims.root_sha256 == NVIDIA_ROOT_SHA256
    assert claims.report_data.hex() == "931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb"
    expected = json.loads((folder / "trustee/hopperAttestationReport-claims.txt").read_text())
    assert dict(claims.measurements) == expected["measurements"]
    config, details = expected["config"], claims.details
    for ours, theirs in (("driver", "driver_version"), ("vbios", "vbios_version"), ("fwid", "fwid")):
        assert details[ours] == config[theirs]
    assert (details["chip_sku"], details["project"], details["project_sku"]) == ("882", "1010", "0200")
    assert details["cc_mode"] == "on"
    assert any("RIM" in limit for limit in proven.limits)


def test_chain_is_good_in_case_1(h100, folder):
    chain = (folder / "trustee/hopper_cert_chain_case1.txt").read_bytes()
    assert refusals(verify(Evidence("gpu", h100.blob, chain))) == []


@pytest.mark.parametrize(
    ("case", "error", "match"),
    [
        (2, MalformedEvidenceError, "chain has 1 certificates"),  # the root alone
        (3, EvidenceSignatureError, "no chain"),  # an intermediate is missing
        (4, EvidenceSignatureError, "not for signing reports"),  # the leaf is missing
    ],
)
def test_broken_chains(h100, folder, case, error, match):
    chain = (folder / f"trustee/hopper_cert_chain_case{case}.txt").read_bytes()
    with pytest.raises(error, match=match):
        verify(Evidence("gpu", h100.blob, chain))


def test_report_with_a_byte_after_its_end(folder):
    report = bytes.fromhex((folder / "trustee/hopper_coco_report1.txt").read_text())
    chain = (folder / "trustee/hopper_coco_certs1.txt").read_bytes()
    with pytest.raises(MalformedEvidenceError, match="1 bytes are left over"):
        verify(Evidence("gpu", report, chain))
    proven = verify(Evidence("gpu", report[:-1], chain), POLICY.replace("measurements.2", "#"))
    assert refusals(proven) == []
    assert proven.claims.details["driver"] == "580.95.05"


def test_eight_gpus_of_one_machine(folder):
    stored = json.loads((folder / "nvtrust/gpu_evidence.json").read_text())
    seen = set()
    for entry in stored:
        evidence = Evidence("gpu", base64.b64decode(entry["evidence"]), base64.b64decode(entry["certificate"]))
        proven = verify(evidence, PPCIE)
        assert refusals(proven) == []
        assert proven.claims.report_data.hex() == entry["nonce"]
        assert proven.claims.details["driver"] == entry["driver_version"]
        assert proven.claims.details["vbios"] == entry["vbios_version"].lower()
        assert proven.claims.details["cc_mode"] == "protected_pcie"
        seen.add(proven.claims.platform_id)
    assert len(seen) == len(stored) == 8


def test_another_gpus_certificates(h100, folder):
    chain = (folder / "trustee/hopper_coco_certs1.txt").read_bytes()
    with pytest.raises(EvidenceSignatureError, match="report does not verify"):
        verify(Evidence("gpu", h100.blob, chain))


def test_mode_that_is_not_allowed(h100):
    assert refusals(verify(h100, PPCIE)) == [PolicyRejectedError]


def test_measurement_that_is_not_a_reference_value(h100):
    assert refusals(verify(h100, POLICY.replace("8048dfd1", "00000000"))) == [MeasurementMismatchError]


def test_before_the_certificates(h100):
    with pytest.raises(StaleEvidenceError):
        verify(h100, now=1_500_000_000)


def test_root_that_is_not_pinned(h100):
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        verify(h100, POLICY.replace(NVIDIA_ROOT_SHA256, "00" * 32))


def test_declared_simulated(h100):
    text = POLICY.replace("[roots]", "allow_simulated = true\n[roots]")
    with pytest.raises(PolicyRejectedError, match='declared "simulated-gpu", and its root is NVIDIA'):
        verify(Evidence("simulated-gpu", h100.blob, h100.aux), text)


def test_bit_flip_in_a_real_report(h100):
    for at in (*range(0, 4117, 101), 4116):
        blob = bytearray(h100.blob)
        blob[at] ^= 0x80
        with pytest.raises((EvidenceSignatureError, MalformedEvidenceError)):
            verify(Evidence("gpu", bytes(blob), h100.aux))
