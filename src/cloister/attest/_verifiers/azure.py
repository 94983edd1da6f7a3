"""Verifies Azure confidential VMs: type "azure", a vTPM quote whose key the report of the CPU below vouches for.

On these machines the host's paravisor (the "HCL") keeps the CPU's report and a vTPM. `report_data` of the CPU's report
is the SHA-256 of a JSON text, the runtime claims, which name the vTPM's attestation key; our 64 bytes are in the quote
by that key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import struct
from dataclasses import dataclass
from typing import Any, cast

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.attest._finding import Findings, Proven, check_registers
from cloister.attest._policy import Policy
from cloister.attest._policy_rules import RUNTIME_PCR
from cloister.attest._types import Claims
from cloister.attest._verifiers import tpm
from cloister.attest._verifiers.snp import prove_snp
from cloister.attest._verifiers.tdx import verify_tdx
from cloister.attest._verifiers.vtpm import VTPM_LIMITS
from cloister.errors import EvidenceSignatureError, MalformedEvidenceError, PolicyRejectedError
from cloister.wire import Evidence

AZURE_KIND = "evidence.azure"
AZURE_FIELDS = ("hcl_report", "td_quote", *tpm.QUOTE_FIELDS)
HEADER_BYTES, HARDWARE_BYTES, RUNTIME_HEADER_BYTES = 32, 1184, 20
MAX_HCL_BYTES = 16 << 10
MAX_AZURE_BYTES = 128 << 10
# The CPU measures the paravisor with its firmware; what runs above is in the PCRs alone: boot loader and run-time code.
AZURE_REQUIRED = ("pcr4", RUNTIME_PCR)
_HARDWARE_REQUIRED = {"snp": ("measurement",), "tdx": ("mr_td",)}
_TEE_BY_TYPE = {2: "snp", 4: "tdx"}
_SIGNATURE = b"HCLA"
_VERSIONS = (1, 2)
_RUNTIME_VERSION, _HASH_SHA256 = 1, 1
_AK_NAME = "HCLAkPub"
_EXPONENT = "AQAB"  # 65537
_BASE64URL = re.compile(r"[A-Za-z0-9_-]{1,700}")
_CONFIGURATION = ("console-enabled", "secure-boot", "tpm-enabled", "tpm-persisted", "vmUniqueId")
_MAX_DETAIL_CHARS = 64
_LIMITS = ("not proven: that the paravisor, which is the vTPM, does what its measurement was pinned for",)


@dataclass(frozen=True)
class HclReport:
    """A parsed HCL report. Unproven: only its two inner parts are covered by signatures.

    Attributes:
        tee: "snp" or "tdx".
        hardware: the CPU's report, 1184 bytes; on TDX it is no quote and proves nothing.
        runtime: the JSON text whose hash the CPU's report carries.
    """

    tee: str
    hardware: bytes
    runtime: bytes


def verify_azure(evidence: Evidence, policy: Policy, *, role: str, now: int) -> Proven:
    """Prove an Azure confidential VM: the CPU's report, the vTPM key in it, and the quote by that key, in this order.

    Success means: the report verifies under AMD's or Intel's genuine root with the measurements that the policy names;
    it carries the hash of the runtime claims, which name the attestation key; that key signed the PCR values and the
    report data. The caller must still refuse when the result has findings, and compare the report data.

    Args:
        evidence: untrusted; `blob` is `AZURE_FIELDS` packed, `aux` what the CPU's report needs: the VCEK, ASK and ARK
            in PEM (SNP), the collateral in JSON (TDX).
        policy: this party's own; "hcl" must be in [vtpm].ak_source.
        role: "server" or "client".
        now: Unix seconds.

    Raises:
        MalformedEvidenceError, EvidenceSignatureError, StaleEvidenceError, PolicyRejectedError: as the verifiers of the
            CPU's report and of the quote.
    """
    fields = tpm.unpack_evidence(evidence.blob, AZURE_KIND, AZURE_FIELDS, max_bytes=MAX_AZURE_BYTES)
    if "hcl" not in policy.vtpm.ak_source:
        raise PolicyRejectedError('[vtpm].ak_source does not name "hcl", which vouches for the keys of Azure\'s vTPMs')
    report = parse_hcl(fields["hcl_report"])
    below = _verify_hardware(report, fields["td_quote"], evidence.aux, policy, role=role, now=now)
    bound = hashlib.sha256(report.runtime).digest().ljust(len(below.claims.report_data), b"\0")
    if not hmac.compare_digest(below.claims.report_data, bound):
        raise EvidenceSignatureError("the CPU's report does not carry the hash of the runtime claims")
    runtime = _parse_runtime(report.runtime)
    key = _attestation_key(runtime)
    proof = tpm.verify_quote(fields, key)
    findings = Findings([f"below the vTPM: {line}" for line in below.findings.passed], list(below.findings.refused))
    findings.passed.append("the CPU's report vouches for the vTPM's attestation key, which signed quote and PCR values")
    claims = _claims(evidence.type, below.claims, proof, {**_configuration(runtime), "ak_sha256": _key_sha256(key)})
    check_registers(claims, policy.registers_for(role, "vtpm"), findings, role=role, required=AZURE_REQUIRED)
    return Proven(claims, findings, (*below.limits, *VTPM_LIMITS, *_LIMITS))


def parse_hcl(blob: bytes) -> HclReport:
    """Parse an HCL report without the padding behind it. Total.

    Raises:
        MalformedEvidenceError: another layout, version or kind, or a length that does not add up.
    """
    fixed = HEADER_BYTES + HARDWARE_BYTES + RUNTIME_HEADER_BYTES
    if not fixed < len(blob) <= MAX_HCL_BYTES:
        raise MalformedEvidenceError(f"the HCL report is {len(blob)} bytes, not {fixed + 1} to {MAX_HCL_BYTES}")
    signature, version, size = struct.unpack_from("<4sII", blob)
    if signature != _SIGNATURE or version not in _VERSIONS:
        raise MalformedEvidenceError("not an HCL report of version 1 or 2")
    at = HEADER_BYTES + HARDWARE_BYTES
    data_size, runtime_version, kind, hash_type, runtime_size = struct.unpack_from("<5I", blob, at)
    if not (len(blob) == size == at + data_size == fixed + runtime_size):
        raise MalformedEvidenceError("the lengths inside of the HCL report do not add up")
    if runtime_version != _RUNTIME_VERSION or hash_type != _HASH_SHA256:
        raise MalformedEvidenceError("the HCL report's runtime claims are not of version 1 with SHA-256")
    if kind not in _TEE_BY_TYPE:
        raise MalformedEvidenceError(f"the HCL report is of type {kind}, neither SNP nor TDX")
    return HclReport(_TEE_BY_TYPE[kind], blob[HEADER_BYTES:at], blob[fixed:])


def _verify_hardware(report: HclReport, td_quote: bytes, aux: bytes, policy: Policy, *, role: str, now: int) -> Proven:
    """The CPU's own evidence, under the vendor's genuine roots: the inner types are never the simulated ones."""
    required = _HARDWARE_REQUIRED[report.tee]
    if report.tee == "tdx":
        if not td_quote:
            raise MalformedEvidenceError("the evidence of a TDX machine comes without its TD quote")
        return verify_tdx(Evidence("tdx", td_quote, aux), policy, role=role, now=now, required=required)
    if td_quote:
        raise MalformedEvidenceError("the evidence of an SNP machine comes with a TD quote")
    proof = prove_snp(Evidence("snp", report.hardware, aux), policy, now=now)
    # Only the paravisor runs at level 0. At any other the guest itself could have had claims of its own signed.
    vmpl = proof.claims.details["vmpl"]
    proof.findings.check(vmpl == "0", "", f"the report was asked for at VMPL {vmpl}, so not by the paravisor")
    check_registers(proof.claims, policy.registers_for(role, "snp"), proof.findings, role=role, required=required)
    return Proven(proof.claims, proof.findings, proof.limits)


def _parse_runtime(text: bytes) -> dict[str, Any]:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedEvidenceError("the HCL report's runtime claims are no JSON") from None
    if not isinstance(value, dict):
        raise MalformedEvidenceError("the HCL report's runtime claims are no JSON object")
    return cast("dict[str, Any]", value)


def _attestation_key(runtime: dict[str, Any]) -> tpm.AttestationKey:
    """The one key named HCLAkPub, an RSA JWK (RFC 7517, RFC 7518 section 6.3)."""
    listed: object = runtime.get("keys")
    keys = cast("list[object]", listed) if isinstance(listed, list) else []
    found = [cast("dict[str, object]", key) for key in keys if isinstance(key, dict)]
    found = [key for key in found if key.get("kid") == _AK_NAME]
    if len(found) != 1:
        raise MalformedEvidenceError(f"the runtime claims name {len(found)} keys {_AK_NAME}, not one")
    modulus = found[0].get("n")
    usable = found[0].get("kty") == "RSA" and found[0].get("e") == _EXPONENT
    if not usable or not isinstance(modulus, str) or not _BASE64URL.fullmatch(modulus):
        raise MalformedEvidenceError(f"{_AK_NAME} is no RSA key with the exponent 65537")
    try:
        n = int.from_bytes(base64.urlsafe_b64decode(modulus + "=" * (-len(modulus) % 4)), "big")
        key = rsa.RSAPublicNumbers(65537, n).public_key()
    except ValueError:
        raise MalformedEvidenceError(f"{_AK_NAME} does not parse") from None
    return tpm.check_attestation_key(key)


def _key_sha256(key: tpm.AttestationKey) -> str:
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _configuration(runtime: dict[str, Any]) -> dict[str, str]:
    """What the paravisor says of the virtual machine; as good as its measurement, and short enough to print."""
    listed: object = runtime.get("vm-configuration")
    table = cast("dict[str, object]", listed) if isinstance(listed, dict) else {}
    texts = {name: str(value) for name in _CONFIGURATION if isinstance(value := table.get(name), bool | str)}
    return {f"vm_{name}": text[:_MAX_DETAIL_CHARS] for name, text in texts.items() if text.isprintable()}


def _claims(declared: str, below: Claims, proof: tpm.QuoteProof, details: dict[str, str]) -> Claims:
    return Claims(
        tee="vtpm",
        evidence_type=declared,
        simulated=below.simulated,
        root_sha256=below.root_sha256,
        measurements=proof.measurements,
        debug=False,
        report_data=proof.report_data,
        collateral_issued=below.collateral_issued,
        collateral_expires=below.collateral_expires,
        details={**proof.details, **details, "root": f"{below.tee} below the vTPM"},
        parts=(below,),
    )
