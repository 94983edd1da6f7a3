"""The one entry to verification: evidence in, a decision or an `AttestationError` out."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from cloister.attest._finding import Finding, Proven
from cloister.attest._policy import TDX_REQUIRED_REGISTERS, Policy
from cloister.attest._tdx import verify_tdx
from cloister.attest._types import Claims, Decision
from cloister.errors import MeasurementMismatchError, PolicyRejectedError
from cloister.wire import Evidence

# One entry per TEE type; "simulated" is the same hardware format under another root.
_VERIFIERS: dict[str, Callable[..., Proven]] = {"simulated": verify_tdx, "tdx": verify_tdx}


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
    verifier = _VERIFIERS.get(evidence.type)
    if verifier is None:
        known = ", ".join(sorted(_VERIFIERS))
        raise PolicyRejectedError(
            f'evidence type "{evidence.type}" is unknown', hint=f"this release can verify: {known}"
        )
    if evidence.type not in policy.accept:
        accepted = ", ".join(sorted(policy.accept)) or "nothing"
        raise PolicyRejectedError(f'evidence type "{evidence.type}" is not accepted; the policy accepts {accepted}')
    proven = verifier(evidence, policy, now=now)
    findings = list(proven.findings)
    passed = [f'evidence type "{evidence.type}" is accepted', *proven.passed]
    for check in (_check_platform, _check_layers):
        check(proven.claims, policy, findings, passed)
    _check_registers(proven.claims, policy, role, findings, passed)
    if hmac.compare_digest(proven.claims.report_data, report_data):
        passed.append("report_data binds the evidence to this session")
    else:
        findings.append(Finding(MeasurementMismatchError, "report_data is not of this session: relayed or replayed"))
    if findings:
        reasons = [finding.text for finding in findings]
        raise findings[0].error(reasons[0], reasons=reasons, hint=_hint(policy))
    return Decision(proven.claims, tuple(passed), policy.sha384, role)


def _check_platform(claims: Claims, policy: Policy, findings: list[Finding], passed: list[str]) -> None:
    """Debug, attributes, extended features and platform identity."""
    before = len(findings)
    rules = policy.tdx
    attributes = bytes.fromhex(claims.td_attributes)
    masked = bytes(a & m for a, m in zip(attributes, rules.td_attributes_mask, strict=True))
    if claims.debug:
        findings.append(Finding(PolicyRejectedError, "a debug enclave: its host can read its memory"))
    if claims.tcb_status not in rules.tcb_status:
        allowed = ", ".join(rules.tcb_status) or "nothing"
        text = f"platform TCB status is {claims.tcb_status}, the policy accepts {allowed}"
        findings.append(Finding(PolicyRejectedError, text))
    if masked != rules.td_attributes_value:
        text = (
            f"td_attributes are {claims.td_attributes}, and the masked bits must be {rules.td_attributes_value.hex()}"
        )
        findings.append(Finding(PolicyRejectedError, text))
    if rules.xfam and claims.xfam not in rules.xfam:
        findings.append(Finding(PolicyRejectedError, f"xfam {claims.xfam} is not allowed"))
    if policy.platform_ids and claims.platform_id not in policy.platform_ids:
        name = claims.platform_id or "without an id"
        findings.append(Finding(PolicyRejectedError, f"platform {name} is not in [platforms].allow_piid"))
    if len(findings) == before:
        passed.append("not a debug enclave; attributes and platform are allowed")


def _check_layers(claims: Claims, policy: Policy, findings: list[Finding], passed: list[str]) -> None:
    """The hardening of a simulated enclave. Real ones report none, and need none from their host."""
    if not claims.simulated:
        return
    missing = [layer for layer in policy.require_layers if layer not in claims.layers]
    if missing:
        text = f"hardening layers are missing: {', '.join(missing)}"
        findings.append(Finding(PolicyRejectedError, text))
    else:
        passed.append(f"hardening layers: {', '.join(claims.layers) or 'none reported'}")


def _check_registers(claims: Claims, policy: Policy, role: str, findings: list[Finding], passed: list[str]) -> None:
    """Every register that the policy names, and the four that it must name."""
    registers = policy.registers_for(role)
    if registers is None:
        text = f'the policy has no measurement set for the role "{role}" ([roles.{role}.tdx])'
        findings.append(Finding(PolicyRejectedError, text))
        return
    before = len(findings)
    for name in sorted(set(registers) | set(TDX_REQUIRED_REGISTERS)):
        allowed = registers.get(name, ())
        value: str = getattr(claims, name)
        if not allowed:
            text = f'the policy allows no value of {name} for the role "{role}", so it allows nothing'
            findings.append(Finding(PolicyRejectedError, text))
        elif value not in allowed:
            text = f"{name} is {value}, which is not a reference value of the role {role}"
            findings.append(Finding(MeasurementMismatchError, text))
    if len(findings) == before:
        names = ", ".join(sorted(registers))
        passed.append(f"{names} are reference values of the role {role}; rtmr3 is {claims.rtmr3[:16]}…")


def _hint(policy: Policy) -> str:
    return f"decided by the policy {policy.source}" if policy.source else ""
