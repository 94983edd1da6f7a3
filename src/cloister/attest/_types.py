"""What attesters and verifiers exchange: the attester's interface, normalised claims, and a decision."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from cloister.wire import Evidence

# SHA-256 of the DER of Intel's SGX and TDX root CA (CN=Intel SGX Root CA, valid until 2049).
INTEL_ROOT_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"

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


class Attester(Protocol):
    """What runs inside an enclave and vouches for it: one implementation per TEE type."""

    @property
    def type(self) -> str:
        """The evidence type, which selects the verifier."""
        ...

    def evidence(self, report_data: bytes) -> Evidence:
        """Fresh evidence that carries `report_data` (64 bytes, public)."""
        ...

    def sealing_key(self, label: str) -> bytes:
        """A secret of 32 bytes that only the same code, job and platform derive again."""
        ...

    def claims(self) -> dict[str, Any]:
        """What this attester would claim, for logs and reports; unproven, JSON types only, nothing secret."""
        ...


@dataclass(frozen=True)
class Claims:
    """What evidence proved, in one form for every TEE. Public.

    Attributes:
        tee: "tdx".
        evidence_type: as declared by the peer, "tdx" or "simulated".
        simulated: True unless the chain of trust ends at the hardware vendor's root. Computed, never declared.
        root_sha256: hex SHA-256 of the root certificate that the verification used.
        mr_td, mr_seam, rtmr0, rtmr1, rtmr2, rtmr3: registers, lower-case hex of 48 bytes each.
        td_attributes, xfam: lower-case hex of 8 bytes each.
        debug: a debugger of the host could read the enclave.
        report_data: the 64 bytes that the attester signed.
        tcb_status: the vendor's word on the platform's patch level, e.g. "UpToDate".
        advisories: the vendor's security advisories that apply.
        tcb_evaluation_number: generation of the vendor's TCB data.
        platform_id: hex platform instance id, empty where the platform has none.
        collateral_issued, collateral_expires: Unix seconds; the older and the earlier of the collateral's parts.
        layers: hardening layers of a simulated enclave; empty for a real one.
    """

    tee: str
    evidence_type: str
    simulated: bool
    root_sha256: str
    mr_td: str
    mr_seam: str
    rtmr0: str
    rtmr1: str
    rtmr2: str
    rtmr3: str
    td_attributes: str
    xfam: str
    debug: bool
    report_data: bytes = field(repr=False)
    tcb_status: str
    advisories: tuple[str, ...]
    tcb_evaluation_number: int
    platform_id: str
    collateral_issued: int
    collateral_expires: int
    layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, for events, reports and result.json."""
        values = asdict(self)
        values["report_data"] = self.report_data.hex()
        values["advisories"] = list(self.advisories)
        values["layers"] = list(self.layers)
        return values


@dataclass(frozen=True)
class Decision:
    """Evidence that a policy accepted. There is no object for a refusal: that is an `AttestationError`.

    Attributes:
        claims: what was proven.
        reasons: one line for each check that passed, for a person to read.
        policy_sha384: SHA-384 of the policy file that decided, 48 bytes.
        role: whose measurement set was used.
        accepted: always True.
    """

    claims: Claims
    reasons: tuple[str, ...]
    policy_sha384: bytes
    role: str
    accepted: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, for events, reports and result.json."""
        return {
            "accepted": self.accepted,
            "role": self.role,
            "reasons": list(self.reasons),
            "policy_sha384": self.policy_sha384.hex(),
            "claims": self.claims.to_dict(),
        }
