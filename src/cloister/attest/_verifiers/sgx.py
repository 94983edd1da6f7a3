"""Verifies SGX quotes: types "sgx" and "simulated-sgx", by one code path under their own roots."""

from __future__ import annotations

from typing import Any

from cloister.attest._finding import Findings, Proven, check_registers
from cloister.attest._policy import Policy
from cloister.attest._types import Claims
from cloister.attest._verifiers.dcap import DcapProof, verify_dcap
from cloister.errors import MalformedEvidenceError, MeasurementMismatchError, PolicyRejectedError
from cloister.wire import Evidence

_DEBUG_BIT = 0x02  # bit 1 of ATTRIBUTES.FLAGS, Intel SDM volume 3D, table "Layout of ATTRIBUTES Structure"
_FLAGS_BYTES = 8
_LIMITS = (
    "not proven: that nobody with physical access reads or writes the memory bus",
    "not proven: that no other process on the processor learns something through shared caches and predictors",
    "not proven: that sealed files are the newest (SGX has no counter that the verifier sees)",
)
_SIMULATED_LIMITS = ("not proven: anything against whoever holds the simulated root's folder; this is no TEE",)


def verify_sgx(evidence: Evidence, policy: Policy, *, role: str, now: int) -> Proven:
    """Prove what an SGX quote states, under a root that the policy pins, and judge it by [sgx] and the role's values.

    Success means what `verify_dcap` says, for one SGX enclave. The caller must still refuse when the result has
    findings or a debug enclave, and compare the report data.

    Raises:
        MalformedEvidenceError: quote or collateral do not parse, or the quote is not of an SGX enclave.
        AttestationError: as `verify_dcap`.
    """
    proof = verify_dcap(evidence, policy, policy.sgx.platform, now=now)
    claims = _claims(evidence.type, proof)
    _check_identity(claims, policy, proof.findings, role=role)
    return Proven(claims, proof.findings, _SIMULATED_LIMITS if proof.simulated else _LIMITS)


def _check_identity(claims: Claims, policy: Policy, findings: Findings, *, role: str) -> None:
    """One enclave by `mr_enclave`, or one product of one signer from a version on; where both are named, both hold."""
    allowed = policy.registers_for(role, "sgx")
    # Neither named: the register that the policy lacks is reported, and nothing is accepted.
    required = () if allowed else ("mr_enclave",)
    check_registers(claims, allowed, findings, role=role, required=required)
    rules = policy.sgx
    prod_id, svn = int(claims.details["isv_prod_id"]), int(claims.details["isv_svn"])
    if rules.prod_id is not None:
        findings.check(
            prod_id == rules.prod_id,
            f"product {prod_id} of that signer",
            f"the enclave is product {prod_id}, the policy names {rules.prod_id}",
            MeasurementMismatchError,
        )
    elif allowed and "mr_signer" in allowed:
        # The reader sees this for [sgx] alone; a signer that only a role names is caught here.
        text = "the policy names mr_signer without prod_id: it would accept every product of that signer"
        findings.refuse(PolicyRejectedError, text)
    findings.check(
        svn >= rules.min_svn,
        f"security version {svn}, at least {rules.min_svn}",
        f"the enclave's security version is {svn}, the policy asks for {rules.min_svn}",
    )


def _claims(declared: str, proof: DcapProof) -> Claims:
    report: dict[str, Any] | None = proof.found["report"].get("SgxEnclave")
    if report is None:
        raise MalformedEvidenceError("the quote is not of an SGX enclave")
    attributes = bytes.fromhex(report["attributes"])
    tcb = proof.found["tcb"]
    return Claims(
        tee="sgx",
        evidence_type=declared,
        simulated=proof.simulated,
        root_sha256=proof.root_sha256,
        measurements={name: report[name] for name in ("mr_enclave", "mr_signer")},
        debug=bool(attributes[0] & _DEBUG_BIT),
        report_data=bytes.fromhex(report["report_data"]),
        tcb_status=tcb["status"],
        advisories=tuple(tcb["advisory_ids"]),
        platform_id=proof.platform_id,
        collateral_issued=proof.issued,
        collateral_expires=proof.expires,
        details={
            "isv_prod_id": str(report["isv_prod_id"]),
            "isv_svn": str(report["isv_svn"]),
            "attributes": attributes[:_FLAGS_BYTES].hex(),
            "xfrm": attributes[_FLAGS_BYTES:].hex(),
            "tcb_evaluation_number": str(tcb["eval_data_number"]),
        },
    )
