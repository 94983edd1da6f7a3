"""Verifies "with-gpu": the evidence of a CPU, and of the GPUs that its session asked, in one."""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Callable, Mapping
from typing import Any, cast

from cloister.attest._finding import Findings, Proven
from cloister.attest._policy import Policy
from cloister.attest._types import Claims
from cloister.attest._verifiers.gpu import GPU_TYPES, gpu_nonce, verify_gpu
from cloister.errors import MalformedEvidenceError, MeasurementMismatchError, PolicyRejectedError, WireError
from cloister.wire import MAX_EVIDENCE_BLOB_BYTES, Evidence, pack, unpack

COMPOSITE_TYPE = "with-gpu"
MAX_GPUS = 16
_KIND = "attest.with-gpu"
_FIELDS = {"type", "blob", "aux"}


def pack_composite(cpu: Evidence, gpus: list[Evidence]) -> Evidence:
    """The evidence of one machine. Public; each part stays what it is, and is verified for itself.

    Raises:
        WireError: the parts together are larger than evidence may be.
    """
    body = {"cpu": _to_fields(cpu), "gpus": [_to_fields(gpu) for gpu in gpus]}
    return Evidence(COMPOSITE_TYPE, pack(_KIND, body), b"")


def verify_with_gpu(
    evidence: Evidence, policy: Policy, *, role: str, now: int, cpu_verifiers: Mapping[str, Callable[..., Proven]]
) -> Proven:
    """Prove the CPU's evidence by its own verifier, and of 1 to 16 different GPUs that they answered the same session.

    Success means what those verifiers say, and that each report's nonce is that of the CPU's report data. The result
    has the claims of the CPU, with those of the GPUs among its parts; it is simulated if any of them is. The caller
    must still refuse when the result has findings, and compare the report data.

    Args:
        evidence: `blob` from `pack_composite`, `aux` empty; untrusted.
        policy: this party's own; it must accept the CPU's type too.
        role: whose measurement set applies to the CPU.
        now: Unix seconds.
        cpu_verifiers: evidence type -> verifier.

    Raises:
        MalformedEvidenceError: a part does not parse, or is itself a composite.
        PolicyRejectedError: the CPU's type is unknown or not accepted.
        AttestationError: as the verifiers.
    """
    cpu_evidence, gpu_evidence = _parse(evidence)
    verifier = cpu_verifiers.get(cpu_evidence.type)
    if verifier is None or cpu_evidence.type not in policy.accept:
        accepted = ", ".join(sorted(policy.accept - {COMPOSITE_TYPE})) or "nothing"
        text = f'evidence type "{cpu_evidence.type}" beside a GPU is not accepted; the policy accepts {accepted}'
        raise PolicyRejectedError(text)
    cpu = verifier(cpu_evidence, policy, role=role, now=now)
    gpus = [verify_gpu(gpu, policy, now=now) for gpu in gpu_evidence]
    findings = Findings([f'evidence type "{cpu_evidence.type}" is accepted', *cpu.findings.passed])
    findings.refused += cpu.findings.refused
    for gpu in gpus:
        findings.passed += gpu.findings.passed
        findings.refused += gpu.findings.refused
    _check_binding(cpu.claims, [gpu.claims for gpu in gpus], findings)
    parts = (*cpu.claims.parts, *(gpu.claims for gpu in gpus))
    simulated = cpu.claims.simulated or any(gpu.claims.simulated for gpu in gpus)
    claims = dataclasses.replace(cpu.claims, parts=parts, simulated=simulated)
    limits = dict.fromkeys(limit for proven in (cpu, *gpus) for limit in proven.limits)
    return Proven(claims, findings, tuple(limits))


def _check_binding(cpu: Claims, gpus: list[Claims], findings: Findings) -> None:
    expected = gpu_nonce(cpu.report_data)
    findings.check(
        all(hmac.compare_digest(gpu.report_data, expected) for gpu in gpus),
        f"gpu: {len(gpus)} report(s) answer the CPU's session",
        "gpu: the nonce of a report is not of this session: relayed or replayed",
        MeasurementMismatchError,
    )
    different = len({gpu.platform_id for gpu in gpus}) == len(gpus)
    findings.check(different, "", "gpu: one device answers as several", MeasurementMismatchError)


def _parse(evidence: Evidence) -> tuple[Evidence, list[Evidence]]:
    try:
        body = unpack(evidence.blob, _KIND, max_bytes=MAX_EVIDENCE_BLOB_BYTES)
        cpu, gpus = _from_fields(body.get("cpu")), body.get("gpus")
        count = len(cast("list[object]", gpus)) if isinstance(gpus, list) else 0
        if set(body) != {"cpu", "gpus"} or not 1 <= count <= MAX_GPUS:
            raise MalformedEvidenceError(f"evidence with GPUs is not of one CPU and 1 to {MAX_GPUS} GPUs")
        parts = [_from_fields(gpu) for gpu in cast("list[object]", gpus)]
    except WireError as error:
        raise MalformedEvidenceError(f"evidence with GPUs does not parse: {error.cause}") from None
    if evidence.aux:
        raise MalformedEvidenceError("evidence with GPUs has something beside it that nothing reads")
    if cpu.type in (COMPOSITE_TYPE, *GPU_TYPES) or any(gpu.type not in GPU_TYPES for gpu in parts):
        raise MalformedEvidenceError("evidence with GPUs holds a part in a place where it does not belong")
    return cpu, parts


def _to_fields(evidence: Evidence) -> dict[str, object]:
    return {"type": evidence.type, "blob": evidence.blob, "aux": evidence.aux}


def _from_fields(value: object) -> Evidence:
    """One part; `Evidence` itself checks the types and sizes, and raises a `WireError`."""
    if not isinstance(value, dict) or set(cast("dict[str, Any]", value)) != _FIELDS:
        raise MalformedEvidenceError("a part of evidence with GPUs has other fields than type, blob and aux")
    return Evidence(**cast("dict[str, Any]", value))
