"""Intel quotes, what TDX and SGX share: collateral, root, `dcap_qvl` and its refusals. One code path, several roots."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dcap_qvl  # pyright: ignore[reportMissingTypeStubs]  # its stubs are on an inner module
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloister.attest._certificates import PARSE_ERRORS
from cloister.attest._finding import Findings
from cloister.attest._policy import Policy
from cloister.attest._policy_rules import DcapRules
from cloister.attest._types import INTEL_ROOT_SHA256
from cloister.attest._verifiers.root import check_root
from cloister.errors import (
    AttestationError,
    EvidenceSignatureError,
    MalformedEvidenceError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

# dcap_qvl 0.7 has one exception type. Its messages only choose the class of our refusal, never whether we refuse.
_ERROR_CLASSES = (
    ("CrlExpired", StaleEvidenceError, "a revocation list of the collateral has expired"),
    ("CertExpired", StaleEvidenceError, "a certificate of the collateral has expired"),
    ("CertNotValidYet", StaleEvidenceError, "a certificate of the collateral is not valid yet"),
    ("TCBInfo expired", StaleEvidenceError, "the TCBInfo of the collateral has expired"),
    ("QE Identity expired", StaleEvidenceError, "the QE Identity of the collateral has expired"),
    ("issue date is in the future", StaleEvidenceError, ""),
    ("Debug mode is enabled", PolicyRejectedError, ""),
    ("Reserved bits in TD attributes", PolicyRejectedError, ""),
    ("SEPT_VE_DISABLE", PolicyRejectedError, ""),
    ("TCB status is invalid", PolicyRejectedError, ""),
    ("No matching TCB level", PolicyRejectedError, ""),
    ("Failed to decode quote", MalformedEvidenceError, ""),
)


@dataclass(frozen=True)
class DcapProof:
    """A quote that verified under a pinned root.

    Attributes:
        found: the library's word: `report`, `platform`, `tcb`, expiry dates.
        root_sha256: hex, of the pinned root.
        simulated: whether that root is not Intel's.
        issued: Unix seconds, when the older of TCB info and QE identity was issued.
        expires: Unix seconds, when the first part of the collateral expires.
        findings: what the policy says of the platform's state and the collateral's age.
    """

    found: dict[str, Any]
    root_sha256: str
    simulated: bool
    issued: int
    expires: int
    findings: Findings

    @property
    def platform_id(self) -> str:
        """Hex platform instance id, empty where the PCK certificate has none."""
        piid = self.found["platform"]["pck"]["platform_instance_id"]
        return bytes(piid).hex() if piid else ""


def verify_dcap(evidence: Evidence, policy: Policy, rules: DcapRules, *, now: int) -> DcapProof:
    """Prove an Intel quote under a root that the policy pins, and judge its platform by `rules`.

    Success means: the quote was signed by an attestation key that a quoting enclave certified, that enclave's report by
    a PCK key, and that key, the TCB info, the QE identity and the revocation lists by the pinned root, all valid at
    `now`. The caller must still compare registers, attributes and report data.

    Raises:
        MalformedEvidenceError: quote or collateral do not parse.
        PolicyRejectedError: the root is not pinned or not allowed, or the platform is in no acceptable state.
        StaleEvidenceError: the collateral has expired or is from the future.
        EvidenceSignatureError: a signature or certificate chain does not verify.
    """
    collateral, fields = _parse_collateral(evidence.aux)
    root_der = _root_of(collateral)
    root_sha256 = hashlib.sha256(root_der).hexdigest()
    root = check_root(
        evidence.type,
        root_sha256,
        policy,
        vendor="Intel",
        genuine=(INTEL_ROOT_SHA256,),
        pinned=policy.intel_sha256,
        key="intel_sha256",
        real=("sgx", "tdx"),
        software=("simulated", "simulated-sgx"),
    )
    findings = Findings([root])
    issued = min(fields)
    # An issuer's clock may be ahead of ours by the allowed skew: check at the time of issue then, never later.
    at = min(max(now, *fields), now + policy.clock_skew_s)
    verifier = dcap_qvl.QuoteVerifier(root_der)
    try:
        # Signatures, chains, revocation and validity first, so that a refusal by policy is known to be of genuine
        # evidence. No policy object is used twice: dcap_qvl changes the one it is given.
        proven = verifier.verify_with_policy(evidence.blob, collateral, at, dcap_qvl.QuotePolicy.claims_only(at))
    except ValueError as error:
        raise _refusal(str(error), collateral, at) from None
    found = json.loads(proven.to_json())
    expires = min(found["earliest_expiration_date"], found["qe_iden_earliest_expiration_date"])
    findings.passed.append(f"quote, certificates and revocation lists verify under that root at {utc(at)}")
    _check_status(found["tcb"]["status"], rules, findings)
    try:
        verifier.verify_with_policy(evidence.blob, collateral, at, _strict(rules, at))
    except ValueError as error:
        findings.refuse(PolicyRejectedError, _plain(str(error)))
    age_d = (now - issued) / 86400
    findings.check(
        age_d <= rules.collateral_max_age_d,
        f"collateral was issued {utc(issued)} and expires {utc(expires)}",
        f"collateral is {int(age_d)} days old, the policy allows {rules.collateral_max_age_d}",
        StaleEvidenceError,
    )
    return DcapProof(found, root_sha256, root_sha256 != INTEL_ROOT_SHA256, issued, expires, findings)


def _check_status(status: str, rules: DcapRules, findings: Findings) -> None:
    allowed = ", ".join(rules.tcb_status) or "nothing"
    findings.check(
        status in rules.tcb_status,
        f"platform TCB status is {status}",
        f"platform TCB status is {status}, the policy accepts {allowed}",
    )


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
    except PARSE_ERRORS:
        raise MalformedEvidenceError("the collateral's certificate chain does not parse") from None
    return chain[-1].public_bytes(serialization.Encoding.DER)


def _strict(rules: DcapRules, at: int) -> dcap_qvl.QuotePolicy:
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


def _refusal(message: str, collateral: dcap_qvl.QuoteCollateralV3, at: int) -> AttestationError:
    """The right class for a failed verification; that it is refused is decided already."""
    for words, error, sentence in _ERROR_CLASSES:
        if words in message:
            return error(sentence or _plain(message))
    # For the PCK's own revocation list the library only says that the chain failed.
    if _is_expired_list(collateral.pck_crl, at):
        return StaleEvidenceError("the revocation list of the platform's certificates has expired")
    return EvidenceSignatureError(_plain(message))


def _is_expired_list(der: bytes, at: int) -> bool:
    try:
        expires = x509.load_der_x509_crl(der).next_update_utc
    except PARSE_ERRORS:
        return False
    return expires is not None and expires.timestamp() <= at


def _plain(message: str) -> str:
    return message.removeprefix("Verification failed: ")


def utc(seconds: int) -> str:
    """Unix seconds as text, for reasons."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
