"""What appraisal collects on its way to a decision: what passed, and what did not."""

from __future__ import annotations

from dataclasses import dataclass

from cloister.attest._types import Claims
from cloister.errors import AttestationError


@dataclass(frozen=True)
class Finding:
    """One reason to refuse: the class of the refusal, and one line for a person."""

    error: type[AttestationError]
    text: str


@dataclass(frozen=True)
class Proven:
    """What a verifier of one TEE type proved, before the policy's reference values are compared.

    Attributes:
        claims: the normalised claims.
        passed: one line for each check that passed.
        findings: reasons to refuse; the evidence is genuine all the same.
    """

    claims: Claims
    passed: tuple[str, ...]
    findings: tuple[Finding, ...]
