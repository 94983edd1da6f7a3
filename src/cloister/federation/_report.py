"""The run report: what was trained on how many examples of whom, with what result; signed by evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cloister.errors import MalformedMessageError
from cloister.wire import enc

if TYPE_CHECKING:
    from cloister.attest import Attester

    from ._plan import ServerPlan
    from ._state import RunState

REPORT_LABEL = b"cloister-run-report/v1"


def report_data(report: bytes) -> bytes:
    """The 64 bytes that bind evidence to a run report (spec/wire.md, run report)."""
    return hashlib.sha512(enc(REPORT_LABEL, hashlib.sha384(report).digest())).digest()


def sign_report(report: bytes, attester: Attester) -> bytes:
    """Evidence whose report_data is the report's hash: the enclave's own signature, no further key needed."""
    return attester.evidence(report_data(report)).to_bytes()


def run_report(
    plan: ServerPlan, state: RunState, facts: Mapping[str, Any], claims: Mapping[str, Any], *, relay_bytes: int
) -> bytes:
    """Canonical JSON of the run report; every client of the run sees it. `facts` are the method's own."""
    own = dict(facts)
    report = {
        "version": 1,
        "run_id": plan.run_id,
        "task": plan.task.name,
        "job_sha384": plan.job_sha384.hex(),
        "policy_sha384": plan.policy.sha384.hex(),
        "release": plan.release,
        "seed": plan.train.seed,
        "bytes": {"store": own.pop("store_bytes", 0), "relay": relay_bytes},
        "enclave": {key: _plain(value) for key, value in claims.items()},
        **own,
        **state.results,
    }
    return json.dumps(report, sort_keys=True, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def parse_report(report: bytes) -> dict[str, Any]:
    """Types the report's bytes; the caller has verified the evidence over them."""
    try:
        value = json.loads(report)
    except ValueError as error:
        raise MalformedMessageError("the run report is not JSON") from error
    if not isinstance(value, dict) or value.get("version") != 1:
        raise MalformedMessageError("the run report is of an unknown version")
    return value
