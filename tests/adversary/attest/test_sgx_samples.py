"""Real SGX quotes at the time when their collateral was valid: the production path without a TEE."""

from __future__ import annotations

import dcap_qvl
import pytest

from cloister.attest import INTEL_ROOT_SHA256, Policy, verify_evidence
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

SGX_NOW = 1750334171
TDX_NOW = 1750332747
REPORT_DATA = b"Hello, world!".ljust(64, b"\0")
STATUS = "ConfigurationAndSWHardeningNeeded"
POLICY = f"""
version = 1
accept = ["sgx"]
[roots]
intel_sha256 = ["{INTEL_ROOT_SHA256}"]
[sgx]
tcb_status = ["UpToDate", "{STATUS}"]
mr_signer = ["815f42f11cf64430c30bab7816ba596a1da0130c3b028b673133a66cf9a3e0e6"]
prod_id = 0
[roles.server.sgx]
mr_enclave = ["33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"]
"""


def verify(evidence: Evidence, text: str = POLICY, *, now: int = SGX_NOW, report_data: bytes = REPORT_DATA):
    return verify_evidence(evidence, Policy.parse(text.encode()), role="server", report_data=report_data, now=now)


def sample(folder, name: str = "sgx_quote", *, declared: str = "sgx", collateral: str = "sgx_quote") -> Evidence:
    return Evidence(declared, (folder / name).read_bytes(), (folder / f"{collateral}_collateral.json").read_bytes())


def test_real_quote_is_accepted_at_its_time(samples):
    decision = verify(sample(samples))
    assert not decision.claims.simulated
    assert decision.claims.root_sha256 == INTEL_ROOT_SHA256
    assert decision.claims.tcb_status == STATUS
    assert decision.claims.advisories == ("INTEL-SA-00289", "INTEL-SA-00615")
    assert decision.claims.platform_id == ""
    assert not any("SIMULATED" in reason for reason in decision.reasons)


def test_default_patch_level_refuses_it(samples):
    line = next(line for line in POLICY.splitlines() if line.startswith("tcb_status"))
    with pytest.raises(PolicyRejectedError, match=STATUS):
        verify(sample(samples), POLICY.replace(line, ""))


@pytest.mark.parametrize("advisory", ["INTEL-SA-00289", "INTEL-SA-00615"])
def test_rejected_advisory(samples, advisory):
    with pytest.raises(PolicyRejectedError, match=advisory):
        verify(sample(samples), POLICY.replace("prod_id", f'reject_advisories = ["{advisory}"]\nprod_id'))


def test_other_enclave(samples):
    with pytest.raises(MeasurementMismatchError, match="mr_enclave"):
        verify(sample(samples), POLICY.replace("33d8736d", "00000000"))


def test_other_session(samples):
    with pytest.raises(MeasurementMismatchError, match="report_data"):
        verify(sample(samples), report_data=bytes(64))


@pytest.mark.parametrize("now", [SGX_NOW - 30 * 86400, 1_800_000_000])
def test_out_of_its_time(samples, now):
    with pytest.raises(StaleEvidenceError):
        verify(sample(samples), now=now)


def test_declared_simulated(samples):
    text = POLICY.replace('["sgx"]', '["sgx", "simulated-sgx"]\nallow_simulated = true')
    with pytest.raises(PolicyRejectedError, match='declared "simulated-sgx", and its root is Intel'):
        verify(sample(samples, declared="simulated-sgx"), text)


def test_tdx_quote_as_sgx(samples):
    text = POLICY.replace("prod_id", "allow = { dynamic = true, cached_keys = true, smt = true }\nprod_id")
    with pytest.raises(MalformedEvidenceError, match="not of an SGX enclave"):
        verify(sample(samples, "tdx_quote", collateral="tdx_quote"), text, now=TDX_NOW)


def test_debug_enclave_without_collateral(samples):
    blob = (samples / "trustee/occlum_quote.dat").read_bytes()
    with pytest.raises(MalformedEvidenceError, match="collateral is missing"):
        verify(Evidence("sgx", blob, b""))
    # Its collateral is not among the samples, so all that can be said is that it parses, and is a debug enclave.
    assert bytes(dcap_qvl.parse_quote(blob).report.attributes)[0] & 0x02


def test_debug_enclave_behind_the_collateral_of_another_machine(samples):
    with pytest.raises(EvidenceSignatureError):
        verify(sample(samples, "trustee/occlum_quote.dat"))


def test_bit_flip_in_a_real_quote(samples):
    evidence = sample(samples)
    for at in range(0, 432, 13):
        blob = bytearray(evidence.blob)
        blob[at] ^= 0x80
        with pytest.raises((EvidenceSignatureError, MalformedEvidenceError)):
            verify(Evidence("sgx", bytes(blob), evidence.aux))
