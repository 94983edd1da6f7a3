"""Real quotes of real machines, at the time when their collateral was valid: the production path without a TEE."""

from __future__ import annotations

import dcap_qvl
import pytest

from cloister.attest import INTEL_ROOT_SHA256, Policy, verify_evidence
from cloister.errors import (
    AttestationError,
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

TDX_NOW = 1750332747
SGX_NOW = 1750334171
OUTDATED_NOW = 1771419600
REPORT_DATA = bytes.fromhex(
    "9a9d48e7f6799642d3d1b34e1e5e1742d4bb02dd6ddd551862c1211d35c304f9"
    "eca3efdbb481601c163cf52493d6e44aed55d51ec39b7e518fadb92c2b523f20"
)
POLICY = f"""
version = 1
accept = ["tdx"]
[roots]
intel_sha256 = ["{INTEL_ROOT_SHA256}"]
[tdx]
mr_td = ["91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27428b2538873118b7"]
rtmr1 = ["0084452c01668329d4bc06acdf58a7205c26743304509973949e5619bf81a6a7aea8c323c173019b3093d54e579e9378"]
rtmr2 = ["d833feef2cd945148aa38ead2c53e9b7f138190aaaebfc551dccd829fc207aa3ba80b70870d7330733642e01d48c3132"]
allow = {{ dynamic = true, cached_keys = true, smt = true }}
[roles.server.tdx]
rtmr3 = ["{"0" * 96}"]
"""


def verify(evidence: Evidence, text: str = POLICY, *, now: int = TDX_NOW, report_data: bytes = REPORT_DATA):
    return verify_evidence(evidence, Policy.parse(text.encode()), role="server", report_data=report_data, now=now)


def sample(folder, name: str, *, declared: str = "tdx", collateral: str | None = None) -> Evidence:
    aux = (folder / (collateral or f"{name}_collateral.json")).read_bytes()
    return Evidence(declared, (folder / name).read_bytes(), aux)


def test_real_quote_is_accepted_at_its_time(samples):
    decision = verify(sample(samples, "tdx_quote"))
    assert not decision.claims.simulated
    assert decision.claims.root_sha256 == INTEL_ROOT_SHA256
    assert decision.claims.tcb_status == "UpToDate"
    assert decision.claims.layers == ()
    assert not any("SIMULATED" in reason for reason in decision.reasons)


def test_real_quote_declared_simulated(samples):
    text = POLICY.replace('accept = ["tdx"]', 'accept = ["tdx", "simulated"]\nallow_simulated = true')
    with pytest.raises(PolicyRejectedError, match='declared "simulated"'):
        verify(sample(samples, "tdx_quote", declared="simulated"), text)


@pytest.mark.parametrize("name", ["dynamic", "cached_keys", "smt"])
def test_platform_property_that_is_not_allowed(samples, name):
    with pytest.raises(PolicyRejectedError):
        verify(sample(samples, "tdx_quote"), POLICY.replace(f"{name} = true", f"{name} = false"))


def test_real_quote_today(samples):
    with pytest.raises(StaleEvidenceError):
        verify(sample(samples, "tdx_quote"), now=1_800_000_000)


def test_real_quote_before_its_collateral(samples):
    with pytest.raises(StaleEvidenceError):
        verify(sample(samples, "tdx_quote"), now=TDX_NOW - 7 * 86400)


def test_real_evidence_under_a_policy_of_other_measurements(samples):
    with pytest.raises(MeasurementMismatchError, match="mr_td"):
        verify(sample(samples, "tdx_quote"), POLICY.replace("91eb2b44", "00000000"))


def test_real_evidence_of_another_session(samples):
    with pytest.raises(MeasurementMismatchError):
        verify(sample(samples, "tdx_quote"), report_data=bytes(64))


def test_intel_root_not_pinned(samples):
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        verify(sample(samples, "tdx_quote"), POLICY.replace(INTEL_ROOT_SHA256, "00" * 32))


def test_outdated_platform_without_a_matching_level(samples):
    evidence = sample(samples, "tdx_quote_outdated")
    with pytest.raises(PolicyRejectedError, match="TCB level"):
        verify(evidence, now=OUTDATED_NOW)


def test_sgx_quote_as_tdx(samples):
    with pytest.raises(MalformedEvidenceError, match=r"not of a TDX 1\.0"):
        verify(sample(samples, "sgx_quote"), now=SGX_NOW)


@pytest.mark.parametrize("name", ["occlum_quote.dat", "tdx_quote_4.dat", "tdx_quote_5.dat", "tdx_quote_6.dat"])
def test_quotes_of_other_machines_behind_this_collateral(samples, name):
    """Debug enclaves and domains among them; none belongs to this collateral."""
    with pytest.raises(AttestationError):
        verify(sample(samples, f"trustee/{name}", collateral="tdx_quote_collateral.json"))


@pytest.mark.parametrize("name", ["tdx-quote.hex", "quote-from-tappd.hex"])
def test_quotes_of_machines_that_this_collateral_calls_unpatched(samples, name):
    """Same processors as those of the collateral, and a TCB below every level that it knows."""
    quote = bytes.fromhex((samples / name).read_text().strip().removeprefix("0x"))
    assert dcap_qvl.parse_quote(quote).is_tdx()
    with pytest.raises(PolicyRejectedError, match="TCB level"):
        verify(Evidence("tdx", quote, (samples / "tdx_quote_collateral.json").read_bytes()))


# The samples have no collateral, so all that can be said of them is that they parse, and what they state.
@pytest.mark.parametrize(
    ("name", "version", "debug"),
    [("tdx_quote_4.dat", 4, True), ("tdx_quote_5.dat", 5, False), ("tdx_quote_6.dat", 4, False)],
)
def test_quotes_without_collateral(samples, name, version, debug):
    quote = (samples / "trustee" / name).read_bytes()
    parsed = dcap_qvl.parse_quote(quote)
    assert parsed.header.version == version
    assert bool(bytes(parsed.report.td_attributes)[0] & 1) is debug
    with pytest.raises(MalformedEvidenceError, match="collateral is missing"):
        verify(Evidence("tdx", quote, b""))


def test_bit_flip_in_a_real_quote(samples):
    evidence = sample(samples, "tdx_quote")
    for at in range(0, 632, 13):
        blob = bytearray(evidence.blob)
        blob[at] ^= 0x80
        with pytest.raises((EvidenceSignatureError, MalformedEvidenceError)):
            verify(Evidence("tdx", bytes(blob), evidence.aux))
