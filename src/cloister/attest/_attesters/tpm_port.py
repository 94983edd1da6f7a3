"""What an attester needs of a TPM 2.0, as a port; and what is the same for every TPM: PCR arithmetic and quotes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Protocol

from cloister.attest._policy_rules import RUNTIME_PCR
from cloister.attest._types import REPORT_DATA_BYTES
from cloister.attest._verifiers.tpm import PCR_BYTES, parse_quote
from cloister.errors import AttestationError

RUNTIME_INDEX = int(RUNTIME_PCR.removeprefix("pcr"))
ALL_PCRS = tuple(range(24))
EVENT_BYTES = 48
_QUOTE_ATTEMPTS = 4
_HINT_REBOOT = (
    "another job or another program has extended it since this machine started: start the machine anew, and keep "
    f"others away from PCR {RUNTIME_INDEX} (systemd's measured boot uses it)"
)


class TpmPort(Protocol):
    """A TPM with one attestation key. Errors are `AttestationError` that name what failed; digests are SHA-256."""

    def vendor(self) -> str:
        """Manufacturer and vendor text, for a person."""
        ...

    def nonce_bytes(self) -> int:
        """How many bytes `quote` takes: the longest digest that this TPM can compute."""
        ...

    def attestation_key(self) -> bytes:
        """DER SubjectPublicKeyInfo of the attestation key. Public."""
        ...

    def read_pcrs(self, pcrs: Sequence[int]) -> bytes:
        """Values of the PCRs in this order, 32 bytes each."""
        ...

    def extend_pcr(self, pcr: int, digest: bytes) -> None:
        """PCR = SHA-256(PCR || digest)."""
        ...

    def quote(self, nonce: bytes, pcrs: Sequence[int]) -> tuple[bytes, bytes]:
        """TPMS_ATTEST and TPMT_SIGNATURE, or for RSA the bare signature."""
        ...

    def read_nv(self, index: int) -> bytes:
        """The contents of an NV index."""
        ...

    def seal(self, secret: bytes, pcrs: Sequence[int]) -> bytes:
        """A blob, public, from which only this TPM with the present values of `pcrs` gives `secret` back."""
        ...

    def unseal(self, sealed: bytes, pcrs: Sequence[int]) -> bytes:
        """The inverse of `seal`. Secret."""
        ...

    def read_counter(self, index: int) -> int | None:
        """Value of the NV counter, None where there is none yet."""
        ...

    def increment_counter(self, index: int) -> int:
        """Count up by one, after making the counter where there is none, and return the new value."""
        ...


def expected_pcr(events: Iterable[bytes], start: bytes = bytes(PCR_BYTES)) -> bytes:
    """The run-time PCR after these events, 32 bytes: for each, PCR = SHA-256(PCR || SHA-256(event)). Public.

    Args:
        events: 48 bytes each, as `measurement_events` gives them.
        start: the value before.

    Raises:
        AttestationError: an event is not 48 bytes.
    """
    value = start
    for event in events:
        value = hashlib.sha256(value + event_digest(event)).digest()
    return value


def event_digest(event: bytes) -> bytes:
    """What the SHA-256 bank is extended with for an event of 48 bytes."""
    if len(event) != EVENT_BYTES:
        raise AttestationError(f"a run-time measurement is {len(event)} bytes, not {EVENT_BYTES}")
    return hashlib.sha256(event).digest()


def bring_up(port: TpmPort, events: Sequence[bytes]) -> bytes:
    """Bring the run-time PCR to the state after all `events`, whatever of them a predecessor has extended already.

    Raises:
        AttestationError: the PCR is in no state of these events, or cannot be extended.
    """
    history = [expected_pcr(events[:count]) for count in range(len(events) + 1)]
    found = port.read_pcrs((RUNTIME_INDEX,))
    if found not in history:
        text = f"PCR {RUNTIME_INDEX} is {found.hex()}, which is no state of this job's measurements"
        raise AttestationError(text, hint=_HINT_REBOOT)
    for event in events[history.index(found) :]:
        port.extend_pcr(RUNTIME_INDEX, event_digest(event))
    return history[-1]


def quote_fields(port: TpmPort, report_data: bytes, *, runtime: bytes) -> dict[str, bytes]:
    """A fresh quote of all PCRs over `report_data` (64 bytes), as the fields of `tpm.QUOTE_FIELDS`. Public.

    Args:
        port: the TPM.
        report_data: in `extraData` itself, or its SHA-256 where the TPM takes fewer than 64 bytes.
        runtime: what the run-time PCR must be.

    Raises:
        AttestationError: `report_data` is not 64 bytes; the TPM gives no quote; a PCR keeps changing, or the run-time
            PCR is not `runtime`.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise AttestationError(f"report_data is {len(report_data)} bytes, not {REPORT_DATA_BYTES}")
    fits = port.nonce_bytes() >= REPORT_DATA_BYTES
    nonce = report_data if fits else hashlib.sha256(report_data).digest()
    for _ in range(_QUOTE_ATTEMPTS):
        # Values and quote are two commands: whatever extends a PCR between them makes the pair useless.
        values = port.read_pcrs(ALL_PCRS)
        message, signature = port.quote(nonce, ALL_PCRS)
        if hmac.compare_digest(parse_quote(message).pcr_digest, hashlib.sha256(values).digest()):
            break
    else:
        raise AttestationError("the PCRs of this TPM change faster than they can be quoted")
    found = values[RUNTIME_INDEX * PCR_BYTES :][:PCR_BYTES]
    if found != runtime:
        text = f"PCR {RUNTIME_INDEX} has changed since this process measured itself: it is {found.hex()}"
        raise AttestationError(text, hint=_HINT_REBOOT)
    return {"message": message, "signature": signature, "pcrs": values, "report_data": b"" if fits else report_data}
