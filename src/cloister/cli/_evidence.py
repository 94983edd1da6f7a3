"""`cloister verify`, `cloister policy` and `cloister collateral`: evidence, and what a policy says of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.cli._outcome import exit_code, show_outcome, show_refusal, show_unread
from cloister.cli._views import STAMP
from cloister.errors import AttestationError, ConfigError

if TYPE_CHECKING:
    from cloister.attest import Policy
    from cloister.wire import Evidence

_MAX_NOW = 253_402_300_799  # the last second of the year 9999
_MACHINE_CLOCK, _GIVEN_CLOCK = "this machine's clock", "--now"


def verify(args: argparse.Namespace) -> int:
    """`cloister verify`: one decision about one piece of evidence, offline."""
    from cloister.attest import Policy

    policy = Policy.load(args.policy)
    return _judge(args, policy, args.evidence, args.collateral, report_data=_report_data(args.report_data))


def policy_init(args: argparse.Namespace) -> int:
    """`cloister policy init`: a strict policy from evidence that is genuine."""
    from cloister.attest import Policy, draft_policy

    now, clock = _now(args.now)
    out = Path(args.out) if args.out else None
    if out is not None and out.exists() and not args.force:
        raise ConfigError(f"{out} is there already", hint="--force replaces it; --out names another file")
    source = ", ".join(args.evidence)
    try:
        evidences = _read_all(args)
        text = draft_policy(
            evidences, role=args.role, now=now, allow_simulated=args.allow_simulated, pin_platform=args.pin_platform
        )
    except AttestationError as error:
        show_refusal(error, source=source, now=now, clock=clock)
        _say_more(error)
        return exit_code(error)
    if out is None:
        sys.stdout.write(text.decode())
    else:
        _write(out, text)
    if Policy.parse(text).allow_simulated:
        sys.stderr.write(f"{STAMP}: this policy trusts a software root\n")
    check = f"cloister policy check {out or 'policy.toml'} {' '.join(args.evidence)}"
    sys.stderr.write(f"read it before you rely on it; then: {check}\n")
    return 0


def policy_check(args: argparse.Namespace) -> int:
    """`cloister policy check`: what a policy allows, in words; or its decision, line by line."""
    from cloister.attest import Policy

    policy = Policy.load(args.policy)
    if not args.evidence:
        _describe(policy, as_json=args.json)
        return 0
    report_data = _report_data(args.report_data)
    codes: list[int] = []
    for i, (path, beside) in enumerate(_pairs(args)):
        if i and not args.json:
            sys.stdout.write("\n")
        codes.append(_judge(args, policy, path, beside, report_data=report_data))
    return next((code for code in codes if code), 0)


def collateral_fetch(args: argparse.Namespace) -> int:
    """`cloister collateral fetch`: the one command that goes online."""
    from cloister import api
    from cloister._files import write_whole
    from cloister.attest import AMD_KDS_URL, INTEL_PCS_URL
    from cloister.wire import MAX_EVIDENCE_BLOB_BYTES

    blob = api.read_limited(args.quote or args.snp_report, MAX_EVIDENCE_BLOB_BYTES)
    if args.quote:
        url = args.pccs or INTEL_PCS_URL
        sys.stderr.write(f"asking {url} for the collateral of {args.quote}\n")
        found = api.fetch_for_quote(blob, url=url)
    else:
        url = args.kds or AMD_KDS_URL
        sys.stderr.write(f"asking {url} for the certificates of {args.snp_report}; it learns the chip's id\n")
        found = api.fetch_for_snp_report(blob, url=url, product=args.product)
    write_whole(Path(args.out), found, mode=0o644)
    sys.stderr.write(f"wrote {args.out} ({len(found)} bytes); untrusted until `cloister verify` has checked it\n")
    return 0


def _judge(
    args: argparse.Namespace, policy: Policy, path: str, beside: str | None, *, report_data: bytes | None
) -> int:
    from cloister import api

    now, clock = _now(args.now)
    try:
        evidence = api.read_evidence(path, evidence_type=args.type, aux=beside)
    except AttestationError as error:
        return show_unread(error, source=path, now=now, clock=clock, as_json=args.json)
    outcome = api.judge_evidence(evidence, policy, role=args.role, now=now, report_data=report_data)
    return show_outcome(outcome, source=path, clock=clock, as_json=args.json)


def _read_all(args: argparse.Namespace) -> list[Evidence]:
    from cloister import api

    return [api.read_evidence(path, evidence_type=args.type, aux=beside) for path, beside in _pairs(args)]


def _pairs(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Each piece of evidence with its collateral: none, one for all of them, or one for each in their order."""
    given: list[str] = args.collateral or []
    if len(given) > 1 and len(given) != len(args.evidence):
        raise ConfigError(
            f"{len(given)} files of collateral for {len(args.evidence)} of evidence",
            hint="one for all, or one for each",
        )
    each: list[str | None] = list(given) if len(given) > 1 else [given[0] if given else None] * len(args.evidence)
    return list(zip(args.evidence, each, strict=True))


def _describe(policy: Policy, *, as_json: bool) -> None:
    from cloister.api import policy_allows, policy_warnings

    allows, warnings = policy_allows(policy), policy_warnings(policy)
    hashes = {"sha384": policy.sha384.hex(), "template_sha384": policy.template_sha384.hex()}
    if as_json:
        shown = {**hashes, "allow_simulated": policy.allow_simulated, "allows": allows, "warnings": warnings}
        sys.stdout.write(json.dumps(shown, ensure_ascii=False) + "\n")
        return
    stamp = f" [{STAMP}]" if policy.allow_simulated else ""
    lines = [
        f"policy    {policy.source}{stamp}",
        f"sha384    {hashes['sha384']}",
        f"template  {hashes['template_sha384']}",
    ]
    lines += ["", "allows, and nothing else", *(f"  {line}" for line in allows)]
    lines += ["", "warnings" if warnings else "no warnings", *(f"  - {line}" for line in warnings)]
    sys.stdout.write("\n".join(lines) + "\n")


def _write(out: Path, text: bytes) -> None:
    from cloister._files import write_whole

    write_whole(out, text, mode=0o644)  # public, and others compare it with theirs
    sys.stderr.write(f"wrote {out}\n")


def _say_more(error: AttestationError) -> None:
    sys.stderr.writelines(f"  - {reason}\n" for reason in error.reasons if reason != error.cause)


def _now(text: str | None) -> tuple[int, str]:
    """The time to check at, and whose it is. Only here the command line reads the clock for evidence."""
    if text is None:
        return int(time.time()), _MACHINE_CLOCK
    try:
        moment = datetime.fromisoformat(text) if not text.isdecimal() else None
        # Without an offset the same text would mean another time on another machine.
        seconds = int(text) if moment is None else int(moment.timestamp()) if moment.tzinfo else -1
    except (ValueError, OverflowError):
        seconds = -1
    if not 0 <= seconds <= _MAX_NOW:
        raise ConfigError(
            f'--now "{text}" is no time', hint="Unix seconds, or RFC 3339 with an offset, such as 2026-06-01T12:00:00Z"
        )
    return seconds, _GIVEN_CLOCK


def _report_data(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 64:
        raise ConfigError("--report-data is not 64 bytes in hex", hint="128 hex digits")
    return value
