"""What attesters and verifiers exchange: the attester's interface, normalised claims, and a decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from cloister.wire import Evidence

# SHA-256 of the DER of Intel's SGX and TDX root CA (CN=Intel SGX Root CA, valid until 2049).
INTEL_ROOT_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"

REPORT_DATA_BYTES = 64

# The hardening layers that simulated evidence reports, in the order of their bits (spec/attestation.md section 6).
HARDENING_LAYERS = (
    "no_dump",
    "no_tracer",
    "no_core",
    "no_new_privs",
    "landlock",
    "landlock_net",
    "landlock_scope",
    "seccomp",
    "memfd_secret",
)


class MonotonicCounter(Protocol):
    """A number that only grows, kept where the host of sealed files cannot turn it back."""

    def value(self) -> int:
        """The highest number that was ever advanced to; 0 at first."""
        ...

    def advance(self, to: int) -> None:
        """Raise the number to `to`, durably; a number that is not higher changes nothing."""
        ...


class Attester(Protocol):
    """What runs inside an enclave and vouches for it: one implementation per TEE type."""

    @property
    def type(self) -> str:
        """The evidence type, which selects the verifier."""
        ...

    @property
    def binding(self) -> str:
        """Where in the evidence the 64 bytes of `report_data` land, for reports: "TDREPORT.REPORTDATA", say."""
        ...

    def evidence(self, report_data: bytes) -> Evidence:
        """Fresh evidence that carries `report_data` (64 bytes, public)."""
        ...

    def sealing_key(self, label: str) -> bytes:
        """A secret of 32 bytes that only the same code, job and platform derive again."""
        ...

    def counter(self) -> MonotonicCounter | None:
        """What tells the newest sealed file from an older one; None where the platform counts nothing."""
        ...

    def claims(self) -> dict[str, Any]:
        """What this attester would claim, for logs and reports; unproven, JSON types only, nothing secret."""
        ...


@dataclass(frozen=True)
class Claims:
    """What evidence proved, in one form for every TEE. Public.

    Attributes:
        tee: "tdx", "sgx", "snp", "vtpm" or "gpu": whose format was verified.
        evidence_type: as declared by the peer.
        simulated: True unless the chain of trust ends at a hardware vendor's root. Computed, never declared.
        root_sha256: hex SHA-256 of the root (certificate, or pinned key) that the verification used.
        measurements: register -> lower-case hex; the names are those of the policy's section for this TEE.
        details: what else was proven, by the vendor's field names; text for a person and for the policy's other rules.
        debug: a debugger of the host could read the enclave.
        report_data: the 64 bytes that the attester signed, at the place that the type binds them.
        tcb_status: the vendor's word on the platform's patch level, "" where the vendor gives none.
        advisories: the vendor's security advisories that apply.
        platform_id: hex id of the chip or platform instance, empty where there is none.
        collateral_issued, collateral_expires: Unix seconds; the older and the earlier of what the proof rests on.
        layers: hardening layers of a simulated enclave; empty for a real one.
        parts: claims of the evidence that this evidence rests on or carries along (the CPU below a vTPM, a GPU beside).
    """

    tee: str
    evidence_type: str
    simulated: bool
    root_sha256: str
    measurements: Mapping[str, str]
    debug: bool
    report_data: bytes = field(repr=False)
    tcb_status: str = ""
    advisories: tuple[str, ...] = ()
    platform_id: str = ""
    collateral_issued: int = 0
    collateral_expires: int = 0
    layers: tuple[str, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: tuple[Claims, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, for events, reports and result.json."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return values | {
            "report_data": self.report_data.hex(),
            "measurements": dict(self.measurements),
            "details": dict(self.details),
            "advisories": list(self.advisories),
            "layers": list(self.layers),
            "parts": [part.to_dict() for part in self.parts],
        }


@dataclass(frozen=True)
class Decision:
    """Evidence that a policy accepted. There is no object for a refusal: that is an `AttestationError`.

    Attributes:
        claims: what was proven.
        reasons: one line for each check that passed, for a person to read.
        limits: one line for each thing that this kind of evidence cannot prove.
        policy_sha384: SHA-384 of the policy file that decided, 48 bytes.
        role: whose measurement set was used.
        accepted: always True.
    """

    claims: Claims
    reasons: tuple[str, ...]
    limits: tuple[str, ...]
    policy_sha384: bytes
    role: str
    accepted: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, for events, reports and result.json."""
        return {
            "accepted": self.accepted,
            "role": self.role,
            "reasons": list(self.reasons),
            "limits": list(self.limits),
            "policy_sha384": self.policy_sha384.hex(),
            "claims": self.claims.to_dict(),
        }
