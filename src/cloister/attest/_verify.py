"""The one entry to verification: evidence in, a decision or an `AttestationError` out."""

from __future__ import annotations

import functools
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from cloister.attest._finding import Finding, Findings, Proven
from cloister.attest._policy import Policy
from cloister.attest._types import Claims, Decision
from cloister.attest._verifiers.azure import verify_azure
from cloister.attest._verifiers.composite import COMPOSITE_TYPE, verify_with_gpu
from cloister.attest._verifiers.sgx import verify_sgx
from cloister.attest._verifiers.snp import verify_snp
from cloister.attest._verifiers.tdx import verify_tdx
from cloister.attest._verifiers.vtpm import verify_vtpm
from cloister.errors import MeasurementMismatchError, PolicyRejectedError
from cloister.wire import Evidence

Verifier = Callable[..., Proven]

# One entry per evidence type; "simulated" is the same hardware format under another root.
VERIFIERS: dict[str, Verifier] = {
    "azure": verify_azure,
    "sgx": verify_sgx,
    "simulated": verify_tdx,
    "simulated-sgx": verify_sgx,
    "simulated-snp": verify_snp,
    "snp": verify_snp,
    "tdx": verify_tdx,
    "vtpm": verify_vtpm,
}
VERIFIERS[COMPOSITE_TYPE] = functools.partial(verify_with_gpu, cpu_verifiers=VERIFIERS)


@dataclass(frozen=True)
class Appraisal:
    """What genuine evidence proved and how a policy judges it, before it is tied to a session. Not a decision.

    Attributes:
        claims: what was proven.
        passed: one line for each check that passed.
        refused: what did not; empty means that the policy would accept the evidence, given the right report data.
        limits: what evidence of this type cannot prove.
    """

    claims: Claims
    passed: tuple[str, ...]
    refused: tuple[Finding, ...]
    limits: tuple[str, ...]


def appraise_evidence(evidence: Evidence, policy: Policy, *, role: str, now: int) -> Appraisal:
    """Prove what `evidence` states and judge it, without asking whom it was made for.

    For a person who looks at a file. A protocol MUST use `verify_evidence`: evidence that is not bound to a session may
    be anybody's, of any time.

    Raises:
        MalformedEvidenceError, EvidenceSignatureError, StaleEvidenceError, PolicyRejectedError: the evidence is not
            genuine, or of a type or under a root that the policy does not name.
    """
    verifier = VERIFIERS.get(evidence.type)
    if verifier is None:
        known = ", ".join(sorted(VERIFIERS))
        raise PolicyRejectedError(
            f'evidence type "{evidence.type}" is unknown', hint=f"this release can verify: {known}"
        )
    if evidence.type not in policy.accept:
        accepted = ", ".join(sorted(policy.accept)) or "nothing"
        raise PolicyRejectedError(f'evidence type "{evidence.type}" is not accepted; the policy accepts {accepted}')
    proven = verifier(evidence, policy, role=role, now=now)
    found = Findings([f'evidence type "{evidence.type}" is accepted', *proven.findings.passed])
    found.refused += proven.findings.refused
    for claims in (proven.claims, *proven.claims.parts):
        _check_common(claims, policy, found)
    if policy.gpu.required:
        text = "the policy asks for a GPU ([gpu].required), and the evidence has none"
        found.check(any(part.tee == "gpu" for part in proven.claims.parts), "a GPU is part of the evidence", text)
    return Appraisal(proven.claims, tuple(found.passed), tuple(found.refused), proven.limits)


def verify_evidence(evidence: Evidence, policy: Policy, *, role: str, report_data: bytes, now: int) -> Decision:
    """Decide whether a peer in `role` is one that `policy` allows, for the session that `report_data` binds.

    Success means that all of the following hold at `now`: the evidence's type is accepted; it verifies under a pinned
    root; platform state, registers and hardening are what the policy allows for `role`; it is no debug enclave; and it
    was made for exactly this `report_data`. The caller must still have derived `report_data` from its own session
    secret, and must send nothing secret before this returns.

    Args:
        evidence: from the peer, untrusted.
        policy: this party's own.
        role: "server" or "client", whose measurement set applies.
        report_data: 64 bytes that this party expects.
        now: Unix seconds, always given by the caller.

    Raises:
        MalformedEvidenceError, EvidenceSignatureError, StaleEvidenceError, MeasurementMismatchError,
        PolicyRejectedError: the class of the first reason; `reasons` has all that were found.
    """
    found = appraise_evidence(evidence, policy, role=role, now=now)
    refused, passed = list(found.refused), list(found.passed)
    if hmac.compare_digest(found.claims.report_data, report_data):
        passed.append("report_data binds the evidence to this session")
    else:
        refused.append(Finding(MeasurementMismatchError, "report_data is not of this session: relayed or replayed"))
    if refused:
        reasons = [finding.text for finding in refused]
        raise refused[0].error(reasons[0], reasons=reasons, hint=_hint(policy))
    return Decision(found.claims, tuple(passed), found.limits, policy.sha384, role)


def _check_common(claims: Claims, policy: Policy, found: Findings) -> None:
    """What holds for every TEE: no debugger, an allowed platform, and the hardening of a simulated process."""
    where = f"{claims.tee}: " if claims.parts else ""
    # A GPU's report does not say whether it can be debugged: that check cannot pass for it, only fail.
    passed = "" if claims.tee == "gpu" else f"{where}not a debug enclave"
    found.check(not claims.debug, passed, "a debug enclave: its host can read its memory")
    if policy.platform_ids and claims.tee != "gpu":
        name = claims.platform_id or "without an id"
        text = f"platform {name} is not in [platforms].allow_piid or allow_chip_id"
        # A vTPM has no id of its own: the CPU below it has. A GPU beside it vouches for no platform.
        below = any(part.tee != "gpu" for part in claims.parts)
        found.check(claims.platform_id in policy.platform_ids or below, "platform is allowed", text)
    if claims.simulated and claims.tee == "tdx":
        missing = [layer for layer in policy.require_layers if layer not in claims.layers]
        found.check(
            not missing,
            f"hardening layers: {', '.join(claims.layers) or 'none reported'}",
            f"hardening layers are missing: {', '.join(missing)}",
        )


def _hint(policy: Policy) -> str:
    return f"decided by the policy {policy.source}" if policy.source else ""
