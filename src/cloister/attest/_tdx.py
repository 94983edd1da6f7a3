"""Verifies TDX quotes (types "tdx" and "simulated") with `dcap_qvl`: one code path, several trust roots."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import dcap_qvl  # pyright: ignore[reportMissingTypeStubs]  # its stubs are on an inner module
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloister.attest._finding import Finding, Proven
from cloister.attest._policy import Policy
from cloister.attest._simulated import layers_from_bytes
from cloister.attest._types import INTEL_ROOT_SHA256, Claims
from cloister.errors import (
    AttestationError,
    EvidenceSignatureError,
    MalformedEvidenceError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

_DEBUG_BIT = 0x01  # bit 0 of TD attributes, Intel TDX Module Base Architecture, "TUD.DEBUG"

# dcap_qvl 0.7 has one exception type. Its messages only choose the class of our refusal, never whether we refuse.
_ERROR_CLASSES = (
    ("CrlExpired", StaleEvidenceError),
    ("CertExpired", StaleEvidenceError),
    ("TCBInfo expired", StaleEvidenceError),
    ("QE Identity expired", StaleEvidenceError),
    ("issue date is in the future", StaleEvidenceError),
    ("Debug mode is enabled", PolicyRejectedError),
    ("Reserved bits in TD attributes", PolicyRejectedError),
    ("SEPT_VE_DISABLE", PolicyRejectedError),
    ("TCB status is invalid", PolicyRejectedError),
    ("No matching TCB level", PolicyRejectedError),
    ("Failed to decode quote", MalformedEvidenceError),
)


def verify_tdx(evidence: Evidence, policy: Policy, *, now: int) -> Proven:
    """Prove what a TDX quote states, under a root that the policy pins.

    Success means: the quote was signed by an attestation key that a quoting enclave certified, that enclave's report by
    a PCK key, and that key, the TCB info, the QE identity and the revocation lists by the pinned root, all valid at
    `now`. The caller must still refuse when the result has findings, and compare registers and report data.

    Args:
        evidence: the quote, and the collateral in `aux`.
        policy: pins the root and sets the limits.
        now: Unix seconds.

    Raises:
        MalformedEvidenceError: quote or collateral do not parse, or the quote is not of TDX 1.0.
        PolicyRejectedError: the root is not pinned or not allowed, or the platform is in no acceptable state.
        StaleEvidenceError: the collateral is too old or from the future.
        EvidenceSignatureError: a signature or certificate chain does not verify.
    """
    collateral, fields = _parse_collateral(evidence.aux)
    root_der = _root_of(collateral)
    root_sha256 = hashlib.sha256(root_der).hexdigest()
    passed = _check_root(evidence.type, root_sha256, policy)
    issued = min(fields)
    # An issuer's clock may be ahead of ours by the allowed skew: check at the time of issue then, never later.
    at = min(max(now, *fields), now + policy.clock_skew_s)
    verifier = dcap_qvl.QuoteVerifier(root_der)
    try:
        # Signatures, chains, revocation and validity first, so that a refusal by policy is known to be of genuine
        # evidence. No policy object is used twice: dcap_qvl changes the one it is given.
        found = verifier.verify_with_policy(evidence.blob, collateral, at, dcap_qvl.QuotePolicy.claims_only(at))
    except ValueError as error:
        raise _refusal(str(error), collateral, at) from None
    claims = _claims(evidence.type, json.loads(found.to_json()), root_sha256, issued)
    passed.append(f"quote, certificates and revocation lists verify under that root at {_utc(at)}")
    findings: list[Finding] = []
    try:
        verifier.verify_with_policy(evidence.blob, collateral, at, _strict(policy, at))
        passed.append(f"platform TCB status is {claims.tcb_status}")
    except ValueError as error:
        findings.append(Finding(PolicyRejectedError, _plain(str(error))))
    age_s = now - issued
    if age_s > policy.tdx.collateral_max_age_d * 86400:
        limit = f"the policy allows {policy.tdx.collateral_max_age_d}"
        findings.append(Finding(StaleEvidenceError, f"collateral is {age_s // 86400} days old, {limit}"))
    else:
        passed.append(f"collateral was issued {_utc(issued)} and expires {_utc(claims.collateral_expires)}")
    return Proven(claims, tuple(passed), tuple(findings))


def _parse_collateral(aux: bytes) -> tuple[dcap_qvl.QuoteCollateralV3, tuple[int, int]]:
    """The collateral, and the issue times of its two signed statements (not yet proven)."""
    if not aux:
        raise MalformedEvidenceError("collateral is missing", hint="the attester must send it along")
    try:
        collateral = dcap_qvl.QuoteCollateralV3.from_json(aux.decode())
        issued = [
            int(datetime.fromisoformat(json.loads(text)["issueDate"]).timestamp())
            for text in (collateral.tcb_info, collateral.qe_identity)
        ]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise MalformedEvidenceError("collateral does not parse") from None
    return collateral, (issued[0], issued[1])


def _root_of(collateral: dcap_qvl.QuoteCollateralV3) -> bytes:
    """The certificate that the collateral says is its root. Proves nothing until it is compared with a pin."""
    try:
        chain = x509.load_pem_x509_certificates(collateral.tcb_info_issuer_chain.encode())
    except ValueError:
        raise MalformedEvidenceError("the collateral's certificate chain does not parse") from None
    return chain[-1].public_bytes(serialization.Encoding.DER)


def _check_root(declared: str, root_sha256: str, policy: Policy) -> list[str]:
    """Refuse before any signature is looked at: nothing under an unpinned root is worth a look."""
    reasons: list[str] = []
    simulated = root_sha256 != INTEL_ROOT_SHA256
    if root_sha256 not in policy.intel_sha256:
        reasons.append(f"root {root_sha256} is not pinned in [roots].intel_sha256")
    if simulated and not policy.allow_simulated:
        reasons.append("the root is not Intel's, and the policy does not allow simulated evidence")
    if simulated != (declared == "simulated"):
        actual = "not Intel's" if simulated else "Intel's"
        reasons.append(f'evidence is declared "{declared}", and its root is {actual}')
    if reasons:
        raise PolicyRejectedError(reasons[0], reasons=reasons, hint="the policy decides which roots are trusted")
    if simulated:
        return [f"root {root_sha256[:16]}… is pinned; it is SIMULATED, and the policy allows simulated evidence"]
    return [f"root {root_sha256[:16]}… is pinned; it is Intel's"]


def _strict(policy: Policy, at: int) -> dcap_qvl.QuotePolicy:
    rules = policy.tdx
    strict = dcap_qvl.QuotePolicy.strict(at)
    for status in rules.tcb_status:
        strict = strict.allow_status(status)
    return (
        strict.reject_advisories(list(rules.reject_advisories))
        .min_tcb_eval_data_number(rules.min_tcb_evaluation)
        .allow_dynamic_platform(rules.allow_dynamic)
        .allow_cached_keys(rules.allow_cached_keys)
        .allow_smt(rules.allow_smt)
    )


def _claims(declared: str, found: dict[str, Any], root_sha256: str, issued: int) -> Claims:
    report = found["report"].get("TD10")
    if report is None:
        raise MalformedEvidenceError("the quote is not of a TDX 1.0 trust domain")
    simulated = root_sha256 != INTEL_ROOT_SHA256
    piid = found["platform"]["pck"]["platform_instance_id"]
    # mr_owner_config is the host's to set on real hardware: only the simulated attester reports its layers there.
    layers = layers_from_bytes(bytes.fromhex(report["mr_owner_config"])) if simulated else ()
    return Claims(
        tee="tdx",
        evidence_type=declared,
        simulated=simulated,
        root_sha256=root_sha256,
        mr_td=report["mr_td"],
        mr_seam=report["mr_seam"],
        rtmr0=report["rt_mr0"],
        rtmr1=report["rt_mr1"],
        rtmr2=report["rt_mr2"],
        rtmr3=report["rt_mr3"],
        td_attributes=report["td_attributes"],
        xfam=report["xfam"],
        debug=bool(bytes.fromhex(report["td_attributes"])[0] & _DEBUG_BIT),
        report_data=bytes.fromhex(report["report_data"]),
        tcb_status=found["tcb"]["status"],
        advisories=tuple(found["tcb"]["advisory_ids"]),
        tcb_evaluation_number=found["tcb"]["eval_data_number"],
        platform_id=bytes(piid).hex() if piid else "",
        collateral_issued=issued,
        collateral_expires=min(found["earliest_expiration_date"], found["qe_iden_earliest_expiration_date"]),
        layers=layers,
    )


def _refusal(message: str, collateral: dcap_qvl.QuoteCollateralV3, at: int) -> AttestationError:
    """The right class for a failed verification; that it is refused is decided already."""
    for words, error in _ERROR_CLASSES:
        if words in message:
            return error(_plain(message))
    # For the PCK's own revocation list the library only says that the chain failed.
    if _is_expired_list(collateral.pck_crl, at):
        return StaleEvidenceError("the revocation list of the platform's certificates has expired")
    return EvidenceSignatureError(_plain(message))


def _is_expired_list(der: bytes, at: int) -> bool:
    try:
        expires = x509.load_der_x509_crl(der).next_update_utc
    except ValueError:
        return False
    return expires is not None and expires.timestamp() <= at


def _plain(message: str) -> str:
    return message.removeprefix("Verification failed: ")


def _utc(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
