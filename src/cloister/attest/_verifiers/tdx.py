"""Verifies TDX quotes: types "tdx" and "simulated", by one code path under their own roots."""

from __future__ import annotations

from typing import Any

from cloister.attest._finding import Findings, Proven, check_registers
from cloister.attest._policy import Policy
from cloister.attest._policy_rules import TDX_REQUIRED
from cloister.attest._simulated.attester import layers_from_bytes
from cloister.attest._types import Claims
from cloister.attest._verifiers.dcap import DcapProof, verify_dcap
from cloister.errors import MalformedEvidenceError
from cloister.wire import Evidence

_DEBUG_BIT = 0x01  # bit 0 of TD attributes, Intel TDX Module Base Architecture, "TUD.DEBUG"
_REGISTERS = {"mr_seam": "mr_seam", "mr_td": "mr_td", **{f"rtmr{i}": f"rt_mr{i}" for i in range(4)}}
_LIMITS = (
    "not proven: that nobody with physical access reads or writes the memory bus",
    "not proven: that sealed files are the newest (TDX has no counter)",
)
_SIMULATED_LIMITS = ("not proven: anything against whoever holds the simulated root's folder; this is no TEE",)


def verify_tdx(
    evidence: Evidence, policy: Policy, *, role: str, now: int, required: tuple[str, ...] = TDX_REQUIRED
) -> Proven:
    """Prove what a TDX quote states, under a root that the policy pins, and judge it by [tdx] and the role's registers.

    Success means what `verify_dcap` says, for a TDX 1.0 trust domain. The caller must still refuse when the result has
    findings, and compare the report data.

    `required` are the registers that the policy must name; fewer where other evidence measures the rest (azure.py).

    Raises:
        MalformedEvidenceError: quote or collateral do not parse, or the quote is not of TDX 1.0.
        AttestationError: as `verify_dcap`.
    """
    proof = verify_dcap(evidence, policy, policy.tdx.platform, now=now)
    claims = _claims(evidence.type, proof)
    _check_attributes(claims, policy, proof.findings)
    check_registers(claims, policy.registers_for(role, "tdx"), proof.findings, role=role, required=required)
    return Proven(claims, proof.findings, _SIMULATED_LIMITS if proof.simulated else _LIMITS)


def _check_attributes(claims: Claims, policy: Policy, findings: Findings) -> None:
    rules = policy.tdx
    found, xfam = claims.details["td_attributes"], claims.details["xfam"]
    masked = bytes(a & m for a, m in zip(bytes.fromhex(found), rules.td_attributes_mask, strict=True))
    findings.check(
        masked == rules.td_attributes_value,
        "attributes are as the policy says",
        f"td_attributes are {found}, and the masked bits must be {rules.td_attributes_value.hex()}",
    )
    findings.check(not rules.xfam or xfam in rules.xfam, "", f"xfam {xfam} is not allowed")


def _claims(declared: str, proof: DcapProof) -> Claims:
    report: dict[str, Any] | None = proof.found["report"].get("TD10")
    if report is None:
        raise MalformedEvidenceError("the quote is not of a TDX 1.0 trust domain")
    # mr_owner_config is the host's to set on real hardware: only the simulated attester reports its layers there.
    layers = layers_from_bytes(bytes.fromhex(report["mr_owner_config"])) if proof.simulated else ()
    tcb = proof.found["tcb"]
    return Claims(
        tee="tdx",
        evidence_type=declared,
        simulated=proof.simulated,
        root_sha256=proof.root_sha256,
        measurements={name: report[key] for name, key in _REGISTERS.items()},
        debug=bool(bytes.fromhex(report["td_attributes"])[0] & _DEBUG_BIT),
        report_data=bytes.fromhex(report["report_data"]),
        tcb_status=tcb["status"],
        advisories=tuple(tcb["advisory_ids"]),
        platform_id=proof.platform_id,
        collateral_issued=proof.issued,
        collateral_expires=proof.expires,
        layers=layers,
        details={
            "td_attributes": report["td_attributes"],
            "xfam": report["xfam"],
            "tcb_evaluation_number": str(tcb["eval_data_number"]),
        },
    )
