"""Evidence in files, judged offline: what a policy says of it, and everything that was and was not proven."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.attest import EVIDENCE_TYPES, Claims, Policy, appraise_evidence, verify_evidence
from cloister.errors import AttestationError, ConfigError, MalformedEvidenceError, WireError
from cloister.wire import MAX_EVIDENCE_AUX_BYTES, MAX_EVIDENCE_BLOB_BYTES, MAX_EVIDENCE_BYTES, Evidence

_MAGIC = b"CLST"  # spec/wire.md section 2: how every message of ours starts, and no quote or report does


@dataclass(frozen=True)
class Outcome:
    """What came of evidence under a policy. Public.

    Attributes:
        evidence_type: as declared.
        role: whose measurement set was used.
        now: Unix seconds at which everything had to be valid.
        policy_sha384: hex, of the policy file's bytes.
        bound: whether the evidence was made for the expected report data; None where none was expected.
        claims: what was proven; None where the evidence is not genuine, or not worth a look.
        passed: one line for each check that passed.
        refused: one line for each reason to refuse.
        limits: one line for each thing that evidence of this type cannot prove.
        error: the refusal; None where the policy accepts.
    """

    evidence_type: str
    role: str
    now: int
    policy_sha384: str
    bound: bool | None
    claims: Claims | None
    passed: tuple[str, ...]
    refused: tuple[str, ...]
    limits: tuple[str, ...]
    error: AttestationError | None

    @property
    def accepted(self) -> bool:
        """Whether the policy accepts. Without expected report data that is no statement about any session."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "accepted": self.accepted,
            "code": self.error.code if self.error else "",
            "evidence_type": self.evidence_type,
            "simulated": self.claims.simulated if self.claims else None,
            "role": self.role,
            "now": self.now,
            "policy_sha384": self.policy_sha384,
            "bound_to_report_data": self.bound,
            "passed": list(self.passed),
            "refused": list(self.refused),
            "limits": list(self.limits),
            "claims": self.claims.to_dict() if self.claims else None,
        }


def read_evidence(path: str | Path, *, evidence_type: str | None = None, aux: str | Path | None = None) -> Evidence:
    """Evidence from a file: a message of ours (spec/wire.md), or a quote or report as the hardware made it.

    Args:
        path: the file; untrusted.
        evidence_type: of a raw quote or report; for a message of ours it must be what the message declares.
        aux: a file with collateral or certificates; takes the place of what a message of ours carries.

    Raises:
        ConfigError: a file cannot be read, or the type is not known.
        MalformedEvidenceError: the file is too large, or not evidence.
    """
    if evidence_type is not None and evidence_type not in EVIDENCE_TYPES:
        raise ConfigError(f'evidence type "{evidence_type}" is not known', hint="one of " + ", ".join(EVIDENCE_TYPES))
    blob = read_limited(path, MAX_EVIDENCE_BYTES)
    beside = read_limited(aux, MAX_EVIDENCE_AUX_BYTES) if aux is not None else None
    if blob.startswith(_MAGIC):
        return _from_message(Path(path), blob, evidence_type, beside)
    if evidence_type is None:
        raise MalformedEvidenceError(
            f"{path} is no evidence file of cloister",
            hint="for a raw quote or report name its type, and the file of its collateral or certificates",
        )
    if len(blob) > MAX_EVIDENCE_BLOB_BYTES:
        raise MalformedEvidenceError(f"{path} is larger than {MAX_EVIDENCE_BLOB_BYTES} bytes: no quote or report is")
    return Evidence(evidence_type, blob, beside or b"")


def judge_evidence(
    evidence: Evidence, policy: Policy, *, role: str, now: int, report_data: bytes | None = None
) -> Outcome:
    """Have `policy` judge `evidence` at `now`. A refusal is an outcome, not an exception.

    Success (`accepted`) means what `verify_evidence` says; without `report_data` it does not say for whom the evidence
    was made, and the caller must not take it for the peer of a session.
    """
    claims: Claims | None = None
    passed: list[str] = []
    refused: list[str] = []
    limits: tuple[str, ...] = ()
    error: AttestationError | None = None
    bound: bool | None = None
    try:
        found = appraise_evidence(evidence, policy, role=role, now=now)
        claims, limits = found.claims, found.limits
        passed, refused = list(found.passed), [finding.text for finding in found.refused]
        if report_data is not None:
            bound = claims.report_data == report_data
            passed += ["report_data binds the evidence to this session"] if bound else []
            passed = list(verify_evidence(evidence, policy, role=role, report_data=report_data, now=now).reasons)
        elif found.refused:
            raise found.refused[0].error(refused[0], reasons=refused)
    except AttestationError as refusal:
        error, refused = refusal, list(refusal.reasons)
    return Outcome(
        evidence_type=evidence.type,
        role=role,
        now=now,
        policy_sha384=policy.sha384.hex(),
        bound=bound,
        claims=claims,
        passed=tuple(passed),
        refused=tuple(refused),
        limits=limits,
        error=error,
    )


def read_limited(path: str | Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        ConfigError: it cannot be read.
        MalformedEvidenceError: it is larger, or empty.
    """
    try:
        with Path(path).open("rb") as file:
            blob = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(blob) > limit:
        raise MalformedEvidenceError(f"{path} is larger than {limit} bytes, which no evidence is")
    if not blob:
        raise MalformedEvidenceError(f"{path} is empty")
    return blob


def _from_message(path: Path, blob: bytes, evidence_type: str | None, beside: bytes | None) -> Evidence:
    try:
        evidence = Evidence.parse(blob)
    except WireError as error:
        raise MalformedEvidenceError(f"{path} does not parse: {error.cause}", hint="is it cut short?") from None
    if evidence_type not in (None, evidence.type):
        raise MalformedEvidenceError(f'{path} holds evidence of the type "{evidence.type}", not "{evidence_type}"')
    return evidence if beside is None else Evidence(evidence.type, evidence.blob, beside)
