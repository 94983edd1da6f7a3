"""What appraisal collects on its way to a decision: what passed, what did not, and what nothing could prove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cloister.attest._types import Claims
from cloister.errors import AttestationError, MeasurementMismatchError, PolicyRejectedError


@dataclass(frozen=True)
class Finding:
    """One reason to refuse: the class of the refusal, and one line for a person."""

    error: type[AttestationError]
    text: str


@dataclass
class Findings:
    """The two lists that every check writes to, in the order in which the checks run.

    Attributes:
        passed: one line for each check that passed.
        refused: one for each that did not; the evidence is genuine all the same.
    """

    passed: list[str] = field(default_factory=list[str])
    refused: list[Finding] = field(default_factory=list[Finding])

    def refuse(self, error: type[AttestationError], text: str) -> None:
        """Record a reason to refuse; the checks go on, so that a person reads all reasons at once."""
        self.refused.append(Finding(error, text))

    def check(self, holds: bool, passed: str, text: str, error: type[AttestationError] = PolicyRejectedError) -> None:
        """Record `passed` where the check holds, else the refusal `text`. An empty `passed` says nothing."""
        if not holds:
            self.refuse(error, text)
        elif passed:
            self.passed.append(passed)


@dataclass(frozen=True)
class Proven:
    """What the verifier of one TEE type proved, and how the policy's section for that TEE judges it.

    Attributes:
        claims: the normalised claims.
        findings: what passed and what did not, platform and reference values of the role included.
        limits: what evidence of this type cannot prove, one line each.
    """

    claims: Claims
    findings: Findings
    limits: tuple[str, ...] = ()


def check_registers(
    claims: Claims,
    allowed: Mapping[str, tuple[str, ...]] | None,
    findings: Findings,
    *,
    role: str,
    required: tuple[str, ...],
) -> None:
    """Compare every register that the policy names for `role`, and those that it must name, with what was proven.

    Args:
        claims: with the measurements.
        allowed: from `Policy.registers_for`; None where the policy has no set for the role.
        findings: where the outcome goes.
        role: "server" or "client".
        required: registers without which the policy would accept other code.
    """
    if allowed is None:
        text = f'the policy has no measurement set for the role "{role}" ([roles.{role}.{claims.tee}])'
        findings.refuse(PolicyRejectedError, text)
        return
    before = len(findings.refused)
    for name in sorted(set(allowed) | set(required)):
        values = allowed.get(name, ())
        value = claims.measurements.get(name)
        if not values:
            text = f'the policy allows no value of {name} for the role "{role}", so it allows nothing'
            findings.refuse(PolicyRejectedError, text)
        elif value is None:
            findings.refuse(MeasurementMismatchError, f"the evidence has no {name}, which the policy names")
        elif value not in values:
            text = f"{name} is {value}, which is not a reference value of the role {role}"
            findings.refuse(MeasurementMismatchError, text)
    if len(findings.refused) == before:
        names = ", ".join(sorted(allowed))
        findings.passed.append(f"{names}: reference values of the role {role}")
