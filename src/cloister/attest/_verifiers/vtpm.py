"""Verifies quotes of a TPM 2.0 whose attestation key the policy pins: type "vtpm", hardware or software."""

from __future__ import annotations

import hashlib

from cloister.attest._finding import Findings, Proven, check_registers
from cloister.attest._policy import Policy
from cloister.attest._policy_rules import RUNTIME_PCR
from cloister.attest._types import Claims
from cloister.attest._verifiers import tpm
from cloister.errors import MalformedEvidenceError, PolicyRejectedError
from cloister.wire import Evidence

TPM_KIND = "evidence.tpm"
TPM_FIELDS = ("ak", *tpm.QUOTE_FIELDS)
# Firmware, what the firmware starts, and cloister's own code and job: without one of them the quote may be of a system
# that lies about the others. A software TPM measures no boot, so that only the run-time register says anything.
PINNED_REQUIRED = ("pcr0", "pcr4", RUNTIME_PCR)
SOFTWARE_REQUIRED = (RUNTIME_PCR,)
VTPM_LIMITS = (
    "not proven: that root inside the guest is kept out (whoever may use the TPM can quote)",
    "not proven: a kernel command line or initial RAM disk, unless the policy names the PCRs that they go into",
)
_PINNED_LIMITS = (
    "not proven: that a TPM keeps the pinned key, beyond what whoever pinned it has checked",
    "not proven: secrecy from whoever has physical access, or from the hypervisor that runs a virtual TPM",
)
_SOFTWARE_LIMITS = ("not proven: anything against the host; a software TPM is SIMULATED and keeps no secret from it",)


def verify_vtpm(evidence: Evidence, policy: Policy, *, role: str, now: int) -> Proven:
    """Prove what a TPM quote states under a pinned attestation key, and judge it by the role's PCRs.

    Success means what `tpm.verify_quote` says, for a key that [vtpm] pins. Evidence under a key of `software_ak_sha256`
    is simulated, whatever it says of itself. The caller must still refuse when the result has findings, and compare the
    report data, which alone makes the quote fresh.

    Args:
        evidence: untrusted; `blob` is `TPM_FIELDS` packed, `aux` is empty.
        policy: this party's own.
        role: "server" or "client".
        now: unused: a quote has no date, and a pinned key does not expire.

    Raises:
        MalformedEvidenceError: the evidence does not parse.
        PolicyRejectedError: the key is not pinned, or not allowed.
        EvidenceSignatureError: the signature does not verify, or does not cover what came along.
    """
    del now
    if evidence.aux:
        raise MalformedEvidenceError("TPM evidence has no collateral, and this one came with some")
    fields = tpm.unpack_evidence(evidence.blob, TPM_KIND, TPM_FIELDS, max_bytes=tpm.MAX_TPM_BYTES)
    ak_sha256 = hashlib.sha256(fields["ak"]).hexdigest()
    simulated, reason = _trust_key(ak_sha256, policy)
    proof = tpm.verify_quote(fields, tpm.load_attestation_key(fields["ak"]))
    findings = Findings([reason, "the TPM quote and its PCR values verify under that key"])
    claims = Claims(
        tee="vtpm",
        evidence_type=evidence.type,
        simulated=simulated,
        root_sha256=ak_sha256,
        measurements=proof.measurements,
        debug=False,
        report_data=proof.report_data,
        details={**proof.details, "root": "software TPM" if simulated else "pinned attestation key"},
    )
    required = SOFTWARE_REQUIRED if simulated else PINNED_REQUIRED
    check_registers(claims, policy.registers_for(role, "vtpm"), findings, role=role, required=required)
    return Proven(claims, findings, (*VTPM_LIMITS, *(_SOFTWARE_LIMITS if simulated else _PINNED_LIMITS)))


def _trust_key(ak_sha256: str, policy: Policy) -> tuple[bool, str]:
    """Whether the key is a software TPM's, and the reason to trust it. No signature is looked at before."""
    rules = policy.vtpm
    pinned, software = ak_sha256 in rules.ak_sha256, ak_sha256 in rules.software_ak_sha256
    reasons: list[str] = []
    if not (pinned or software):
        reasons.append(f"attestation key {ak_sha256} is in neither [vtpm].ak_sha256 nor software_ak_sha256")
    if pinned and software:
        reasons.append(f"attestation key {ak_sha256} is in both [vtpm].ak_sha256 and software_ak_sha256")
    if pinned and "pinned" not in rules.ak_source:
        reasons.append('[vtpm].ak_source does not name "pinned", and the attestation key is one')
    if software and "software" not in rules.ak_source:
        reasons.append('[vtpm].ak_source does not name "software", and the attestation key is of a software TPM')
    if software and not policy.allow_simulated:
        reasons.append("the attestation key is of a software TPM, and the policy does not allow simulated evidence")
    if reasons:
        raise PolicyRejectedError(reasons[0], reasons=reasons, hint="the policy decides which keys are trusted")
    if software:
        text = "is pinned; it is of a software TPM, SIMULATED, and the policy allows simulated evidence"
    else:
        text = "is pinned"
    return software, f"attestation key {ak_sha256[:16]}… {text}"
