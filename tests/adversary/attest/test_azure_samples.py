"""Evidence recorded on Azure confidential VMs, as the `azure` verifier takes it."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest

from cloister.attest import INTEL_ROOT_SHA256, Policy, verify_evidence
from cloister.attest._verifiers import azure, tpm
from cloister.attest._verifiers.azure import AZURE_KIND, parse_hcl
from cloister.attest._verifiers.snp import AMD_ARK_SHA256
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.testing import shared_dir
from cloister.wire import Evidence, pack

NOW = 1_748_736_000  # 2025-06-01
SNP = {"genoa": "genoa", "v0": "milan", "v1": "milan", "v2": "milan"}
TDX = ("v0", "v1")


@pytest.fixture(scope="module")
def samples():
    shared = shared_dir()
    if shared is None:
        pytest.skip("the shared vectors are not here (set CLOISTER_SHARED)")
    return shared / "vectors" / "attestation"


def blob(value) -> bytes:
    """The three ways in which the recorded files write bytes."""
    if isinstance(value, list):
        return bytes(value)
    try:
        return bytes.fromhex(value)
    except ValueError:
        return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))


def pem(text: str) -> bytes:
    if text.startswith("-----"):
        return text.encode()
    body = base64.encodebytes(blob(text)).decode()
    return f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n".encode()


def fields_of(document: dict) -> dict[str, bytes]:
    quote = document.get("tpm_quote") or document["quote"]
    stored = blob(document.get("hcl_report") or document["report"])
    return {
        "hcl_report": stored[: int.from_bytes(stored[8:12], "little")],
        "td_quote": blob(document.get("td_quote", "")),
        "message": blob(quote["message"]),
        "signature": blob(quote["signature"]),
        "pcrs": b"".join(blob(value) for value in quote["pcrs"]),
        "report_data": b"",
    }


def evidence_of(fields: dict[str, bytes], aux: bytes) -> Evidence:
    return Evidence("azure", pack(AZURE_KIND, fields), aux)


def snp_sample(samples, name: str) -> tuple[dict[str, bytes], bytes]:
    document = json.loads((samples / "azure" / "az-snp-vtpm" / f"evidence-{name}.json").read_text())
    chain = (samples / "snp" / f"ask_ark_{SNP[name]}.pem").read_bytes()
    return fields_of(document), pem(document["vcek"]) + chain


def tdx_sample(samples, name: str) -> dict[str, bytes]:
    return fields_of(json.loads((samples / "azure" / "az-tdx-vtpm" / f"evidence-{name}.json").read_text()))


def policy_for(fields: dict[str, bytes], **changes: str) -> Policy:
    pcrs = [fields["pcrs"][at : at + 32].hex() for at in range(0, len(fields["pcrs"]), 32)]
    values = {
        "accept": "azure",
        "ak_source": "hcl",
        "measurement": fields["hcl_report"][32 + 0x90 : 32 + 0xC0].hex(),
        "mr_td": "0" * 96,
        "pcr4": pcrs[4],
        "pcr15": pcrs[15],
        "milan": AMD_ARK_SHA256["milan"],
        "genoa": AMD_ARK_SHA256["genoa"],
    } | changes
    text = """
version = 1
accept = ["{accept}"]
[roots]
intel_sha256 = ["%s"]
amd_ark_sha256 = {{ milan = ["{milan}"], genoa = ["{genoa}"] }}
[snp]
guest_policy = {{ smt = true }}
[vtpm]
ak_source = ["{ak_source}"]
pcr4 = ["{pcr4}"]
[roles.server.snp]
measurement = ["{measurement}"]
[roles.server.tdx]
mr_td = ["{mr_td}"]
[roles.server.vtpm]
pcr15 = ["{pcr15}"]
"""
    return Policy.parse((text % INTEL_ROOT_SHA256).format(**values).encode())


def verify(fields, aux, *, policy: Policy | None = None, now: int = NOW, report_data: bytes | None = None):
    nonce = tpm.parse_quote(fields["message"]).extra_data if report_data is None else report_data
    chosen = policy or policy_for(fields)
    return verify_evidence(evidence_of(fields, aux), chosen, role="server", report_data=nonce, now=now)


@pytest.mark.parametrize("name", SNP)
def test_recorded_evidence_is_accepted(samples, name):
    fields, aux = snp_sample(samples, name)
    decision = verify(fields, aux)
    claims, below = decision.claims, decision.claims.parts[0]
    assert (claims.tee, claims.evidence_type, claims.simulated, claims.platform_id) == ("vtpm", "azure", False, "")
    assert claims.root_sha256 == below.root_sha256 == AMD_ARK_SHA256[SNP[name]]
    assert claims.details["root"] == "snp below the vTPM"
    assert claims.details["vm_secure-boot"] == "True"
    assert claims.collateral_expires == below.collateral_expires > NOW
    assert (below.tee, below.details["vmpl"], len(below.platform_id)) == ("snp", "0", 128)
    assert any("paravisor" in limit for limit in decision.limits)
    json.dumps(decision.to_dict())


def test_another_nonce(samples):
    fields, aux = snp_sample(samples, "v2")
    with pytest.raises(MeasurementMismatchError, match="not of this session"):
        verify(fields, aux, report_data=bytes(48))


@pytest.mark.parametrize(("key", "named"), [("measurement", 96), ("pcr4", 64), ("pcr15", 64)])
def test_other_reference_values(samples, key, named):
    fields, aux = snp_sample(samples, "genoa")
    with pytest.raises(MeasurementMismatchError, match=f"{key} is"):
        verify(fields, aux, policy=policy_for(fields, **{key: "11" * (named // 2)}))


def test_root_that_is_not_pinned(samples):
    fields, aux = snp_sample(samples, "v1")
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        verify(fields, aux, policy=policy_for(fields, milan="00" * 32))


def test_certificates_of_another_product(samples):
    fields, _ = snp_sample(samples, "v1")
    _, other = snp_sample(samples, "genoa")
    with pytest.raises(PolicyRejectedError, match=r"not pinned in .*milan"):
        verify(fields, other)


def test_after_the_certificates_have_expired(samples):
    fields, aux = snp_sample(samples, "v0")
    with pytest.raises(StaleEvidenceError):
        verify(fields, aux, now=NOW + 30 * 365 * 86400)


@pytest.mark.parametrize("name", SNP)
@pytest.mark.parametrize("field", ["message", "signature", "pcrs", "hcl_report"])
def test_bit_flips(samples, name, field):
    fields, aux = snp_sample(samples, name)
    policy, nonce = policy_for(fields), tpm.parse_quote(fields["message"]).extra_data
    size = len(fields[field])
    # What the CPU's report signs is in front of its signature, which has padding behind it.
    places = [*range(40, 32 + 0x2A0, 61), *range(1240, size, 97)] if field == "hcl_report" else range(0, size, 29)
    for at in places:
        flipped = bytearray(fields[field])
        flipped[at] ^= 0x04
        changed = {**fields, field: bytes(flipped)}
        with pytest.raises((EvidenceSignatureError, MalformedEvidenceError, PolicyRejectedError)):
            verify(changed, aux, policy=policy, report_data=nonce)


def test_quote_of_another_machine(samples):
    fields, aux = snp_sample(samples, "v1")
    other, _ = snp_sample(samples, "v2")
    mixed = {**other, "hcl_report": fields["hcl_report"]}
    with pytest.raises(EvidenceSignatureError, match="not signed by its attestation key"):
        verify(mixed, aux, policy=policy_for(mixed))


def test_runtime_claims_of_another_machine(samples):
    """The one report's CPU part before the other's claims: an attestation key that this CPU does not vouch for."""
    fields, aux = snp_sample(samples, "v1")
    other, _ = snp_sample(samples, "v2")
    mixed = {**other, "hcl_report": fields["hcl_report"][:1216] + other["hcl_report"][1216:]}
    assert len(mixed["hcl_report"]) == len(fields["hcl_report"])
    with pytest.raises(EvidenceSignatureError, match="hash of the runtime claims"):
        verify(mixed, aux, policy=policy_for(mixed))


def test_the_lone_quote_of_the_lone_report(samples):
    folder = samples / "azure" / "az-snp-vtpm"
    document = {"tpm_quote": json.loads((folder / "tpm-quote-v1.json").read_text())}
    fields = fields_of(document | {"hcl_report": list((folder / "hcl-report.bin").read_bytes())})
    verify(fields, (folder / "vcek.pem").read_bytes())


def test_the_lone_quote_of_another_machine(samples):
    folder = samples / "azure" / "az-snp-vtpm"
    fields, _ = snp_sample(samples, "v0")
    stored = (folder / "hcl-report.bin").read_bytes()
    fields |= {
        "hcl_report": stored[: int.from_bytes(stored[8:12], "little")],
        "message": (folder / "tpm-quote.msg").read_bytes(),
        "signature": (folder / "tpm-quote.sig").read_bytes(),
    }
    with pytest.raises(EvidenceSignatureError, match="not signed by its attestation key"):
        verify(fields, (folder / "vcek.pem").read_bytes())


@pytest.mark.parametrize("name", TDX)
def test_tdx_samples_come_without_collateral(samples, name):
    fields = tdx_sample(samples, name)
    with pytest.raises(MalformedEvidenceError, match="collateral is missing"):
        verify(fields, b"")


@pytest.mark.parametrize("name", TDX)
def test_tdx_samples_under_the_collateral_of_another_platform(samples, name):
    aux = (samples / "dcap" / "tdx_quote_collateral.json").read_bytes()
    with pytest.raises((EvidenceSignatureError, PolicyRejectedError, StaleEvidenceError)):
        verify(tdx_sample(samples, name), aux, now=1_750_332_747)


@pytest.mark.parametrize("name", TDX)
def test_what_tdx_samples_prove_without_collateral(samples, name):
    """The part above the CPU: the TD quote carries the hash of the claims, whose key signed quote and PCR values."""
    fields = tdx_sample(samples, name)
    report = parse_hcl(fields["hcl_report"])
    assert report.tee == "tdx"
    assert fields["td_quote"][568:632] == hashlib.sha256(report.runtime).digest() + bytes(32)
    key = azure._attestation_key(azure._parse_runtime(report.runtime))
    proof = tpm.verify_quote(fields, key)
    assert proof.report_data == b"challenge"
    assert len(proof.measurements) == 24


def test_a_hardware_tpms_quote(samples):
    """Not of Azure: a quote of 64 bytes of nonce under a listed key, with zeros in every PCR."""
    document = json.loads((samples / "azure" / "tpm_evidence.json").read_text())
    quote = document["tpm_quote"]
    fields = {
        "message": base64.b64decode(quote["message"]),
        "signature": base64.b64decode(quote["signature"]),
        "pcrs": b"".join(bytes.fromhex(value) for value in quote["pcrs"]),
        "report_data": b"",
    }
    proof = tpm.verify_quote(fields, tpm.load_attestation_key(base64.b64decode(document["ak_public"])))
    assert len(proof.report_data) == 64
