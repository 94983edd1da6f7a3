"""How a judgement of evidence is shown, and what each outcome exits with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cloister.cli._views import STAMP
from cloister.errors import (
    AttestationError,
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)

if TYPE_CHECKING:
    from cloister.api import Outcome
    from cloister.attest import Claims

# Only where a person has evidence judged. A run that refuses evidence exits with 5, whatever the reason.
REFUSAL_EXIT_CODES: dict[type[AttestationError], int] = {
    MalformedEvidenceError: 50,
    EvidenceSignatureError: 51,
    StaleEvidenceError: 52,
    MeasurementMismatchError: 53,
    PolicyRejectedError: 54,
}
UNBOUND = "not proven: that it was made for a session of yours; pass --report-data"


def exit_code(error: AttestationError | None) -> int:
    """0 for an acceptance, and one code for each class of refusal."""
    return REFUSAL_EXIT_CODES.get(type(error), error.exit_code) if error else 0


def show_outcome(outcome: Outcome, *, source: str, clock: str, as_json: bool) -> int:
    """The judgement on stdout, and where it is a refusal its first reason on stderr too. Returns the exit code."""
    code = exit_code(outcome.error)
    limits = [*outcome.limits, *([UNBOUND] if outcome.bound is None else [])]
    if as_json:
        shown = outcome.to_dict() | {"evidence": source, "limits": limits, "exit_code": code}
        sys.stdout.write(json.dumps(shown, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(outcome, limits, source=source, clock=clock, code=code)) + "\n")
    sys.stdout.flush()
    if outcome.error is not None:
        show_refusal(outcome.error, source=source, now=outcome.now, clock=clock)
    return code


def show_refusal(error: AttestationError, *, source: str, now: int, clock: str) -> None:
    """One `error:` line and what can be done, on stderr."""
    hint = error.hint
    if isinstance(error, StaleEvidenceError):
        hint = f"checked at {utc(now)} by {clock}: is that right? `cloister collateral fetch` gets newer collateral"
    where = "" if source in error.cause else f"{source}: "
    sys.stderr.write(f"error: {where}{error.cause}\n" + (f"hint: {hint}\n" if hint else ""))


def show_unread(error: AttestationError, *, source: str, now: int, clock: str, as_json: bool) -> int:
    """The outcome for a file that is no evidence at all."""
    code = exit_code(error)
    if as_json:
        shown = {"accepted": False, "code": error.code, "evidence": source, "now": now, "passed": [], "claims": None}
        sys.stdout.write(json.dumps({**shown, "refused": error.reasons, "limits": [], "exit_code": code}) + "\n")
        sys.stdout.flush()
    show_refusal(error, source=source, now=now, clock=clock)
    return code


def utc(seconds: int) -> str:
    """Unix seconds for a person."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _lines(outcome: Outcome, limits: list[str], *, source: str, clock: str, code: int) -> Iterator[str]:
    simulated = outcome.claims is not None and outcome.claims.simulated
    stamp = f" [{STAMP}]" if simulated else ""
    if outcome.error is None:
        yield f"ACCEPTED{stamp} for the role {outcome.role}"
    else:
        yield f"REFUSED{stamp} for the role {outcome.role}: {outcome.error.code} (exit code {code})"
    if simulated:
        yield f"{STAMP}: the root is software, and protects nobody from whoever holds it"
    yield ""
    yield f"evidence  {source} ({outcome.evidence_type})"
    yield f"policy    sha384 {outcome.policy_sha384}"
    yield f"checked   at {utc(outcome.now)}, by {clock}"
    yield ""
    yield "checks"
    yield from (f"  ok  {line}" for line in outcome.passed)
    yield from (f"  no  {line}" for line in outcome.refused)
    yield ""
    if outcome.claims is None:
        yield "proven: nothing"
        return
    yield "proven"
    yield from _table(outcome.claims, indent="  ")
    yield ""
    yield "not proven"
    yield from (f"  - {line.removeprefix('not proven: ')}" for line in limits)


def _table(claims: Claims, *, indent: str) -> Iterator[str]:
    rows = list(_rows(claims))
    width = max(len(name) for name, _ in rows)
    yield from (f"{indent}{name.ljust(width)}  {value}" for name, value in rows)
    for part in claims.parts:
        yield f"{indent}and of the {part.tee} evidence that it rests on, or that is beside it"
        yield from _table(part, indent=indent + "  ")


def _rows(claims: Claims) -> Iterator[tuple[str, str]]:
    yield "tee", claims.tee
    yield "simulated", "yes" if claims.simulated else "no"
    yield "root_sha256", claims.root_sha256
    yield from sorted(claims.measurements.items())
    yield "debug", "yes" if claims.debug else "no"
    yield "report_data", claims.report_data.hex()
    optional = {
        "tcb_status": claims.tcb_status,
        "advisories": ", ".join(claims.advisories),
        "platform_id": claims.platform_id,
        "collateral_issued": utc(claims.collateral_issued) if claims.collateral_issued else "",
        "collateral_expires": utc(claims.collateral_expires) if claims.collateral_expires else "",
        "layers": ", ".join(claims.layers),
        **dict(sorted(claims.details.items())),
    }
    yield from ((name, value) for name, value in optional.items() if value)
