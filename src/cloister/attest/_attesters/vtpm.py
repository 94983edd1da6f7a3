"""Attester of a machine with a TPM 2.0: quotes of its PCRs, sealing to them, and a counter against roll-back.

Played through in tests with swtpm, a software TPM that keeps no secret from its host.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister._files import write_whole
from cloister.attest._attesters.tpm_device import DEFAULT_TCTI, DeviceTpm
from cloister.attest._attesters.tpm_port import (
    RUNTIME_INDEX,
    TpmPort,
    bring_up,
    event_digest,
    expected_pcr,
    quote_fields,
)
from cloister.attest._policy_rules import RUNTIME_PCR
from cloister.attest._verifiers.vtpm import TPM_KIND
from cloister.errors import AttestationError
from cloister.wire import Evidence, enc, pack

COUNTER_INDEX = 0x01801C15  # in the range that the TCG leaves to the owner of the machine
# Firmware, option ROMs, boot loader, Secure Boot state, and cloister's own code and job.
SEALING_PCRS = (0, 2, 4, 7, RUNTIME_INDEX)
SEALED_NAME = "sealing.tpm"
SOFTWARE_LABEL = "software TPM"
_SOFTWARE_VENDORS = ("IBM SW", "SW")  # libtpms, which swtpm runs on
_SEALING_LABEL = b"cloister-sealing/v1"
_SECRET_BYTES, _BASE_BYTES = 32, 8
_MAX_SEALED_BYTES = 4096
_MAX_ADVANCE = 1000  # each step writes to the TPM's memory, which wears


class VtpmAttester:
    """Vouches for a process on a machine with a TPM 2.0.

    The run-time PCR is extended when the object is made, before any quote. A process that is started again without a
    restart of the machine finds it where its predecessor left it, and goes on; one with anything else in it is refused.

    Args:
        tcti: how to reach the TPM.
        events: from `measurement_events`, 48 bytes each.
        folder: where the sealed secret is kept (public: only this TPM opens it); without one nothing can be sealed.
        algorithm: "ecc" or "rsa" of the attestation key.
        sealing_pcrs: PCRs that sealed secrets are bound to; the run-time PCR must be among them.
        counter_index: NV index of the counter, for this folder only; None counts nothing.
        port: in place of a TPM at `tcti`.

    Raises:
        AttestationError: there is no TPM, the extra is missing, or the run-time PCR has been extended by others.
    """

    type = "vtpm"
    binding = "TPMS_ATTEST.extraData"

    def __init__(
        self,
        tcti: str = DEFAULT_TCTI,
        *,
        events: Sequence[bytes] = (),
        folder: str | Path | None = None,
        algorithm: str = "ecc",
        sealing_pcrs: Sequence[int] = SEALING_PCRS,
        counter_index: int | None = COUNTER_INDEX,
        port: TpmPort | None = None,
    ) -> None:
        if RUNTIME_INDEX not in sealing_pcrs:
            raise AttestationError(f"sealing without PCR {RUNTIME_INDEX} would give other code the same keys")
        self._port = port or DeviceTpm(tcti, algorithm=algorithm)
        self._folder = Path(folder) if folder is not None else None
        self._sealing_pcrs = tuple(sealing_pcrs)
        self._counter_index = counter_index
        self._key = self._port.attestation_key()
        self._runtime = bring_up(self._port, events)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({RUNTIME_PCR}={self._runtime.hex()[:16]}…)"

    @property
    def manufacturer(self) -> str:
        """What the TPM says of its maker; of a software TPM that it is one. Unproven: a TPM may say anything."""
        vendor = self._port.vendor()
        return f"{SOFTWARE_LABEL} ({vendor})" if vendor.startswith(_SOFTWARE_VENDORS) else vendor

    @property
    def ak_sha256(self) -> str:
        """Hex SHA-256 of the attestation key's DER, to be pinned by whoever has checked whose key it is. Public."""
        return hashlib.sha256(self._key).hexdigest()

    def evidence(self, report_data: bytes) -> Evidence:
        """A fresh quote of all PCRs over `report_data` (64 bytes, public).

        Raises:
            AttestationError: no quote, or the run-time PCR is not what this process left.
        """
        fields = quote_fields(self._port, report_data, runtime=self._runtime)
        return Evidence(type=self.type, blob=pack(TPM_KIND, {**fields, "ak": self._key}), aux=b"")

    def extend_runtime(self, digest: bytes) -> None:
        """Extend the run-time PCR with one more event of 48 bytes. What was sealed before no longer opens.

        Raises:
            AttestationError: the event is not 48 bytes, or the TPM refuses.
        """
        self._port.extend_pcr(RUNTIME_INDEX, event_digest(digest))
        self._runtime = expected_pcr([digest], self._runtime)

    def sealing_key(self, label: str) -> bytes:
        """32 secret bytes, bound to this TPM, to the sealing PCRs as they were at first use, and to `label`.

        Raises:
            AttestationError: no folder was given, the PCRs have changed, or the sealed secret is of another TPM.
            StoreError: the sealed secret cannot be written.
        """
        secret, _ = self._open_secret()
        return HKDF(hashes.SHA384(), 32, salt=None, info=enc(_SEALING_LABEL, label.encode())).derive(secret)

    def counter(self) -> NvCounter | None:
        """The counter against roll-back of what this attester's keys seal; it begins at 0 with the sealed secret.

        Raises:
            AttestationError: as `sealing_key`.
        """
        if self._counter_index is None:
            return None
        _, base = self._open_secret()
        return NvCounter(self._port, self._counter_index, base)

    def claims(self) -> dict[str, Any]:
        """What this attester would claim, unproven; JSON types only."""
        manufacturer = self.manufacturer
        return {
            "tee": "vtpm",
            "evidence_type": self.type,
            "simulated": manufacturer.startswith(SOFTWARE_LABEL),
            "manufacturer": manufacturer,
            "ak_sha256": self.ak_sha256,
            RUNTIME_PCR: self._runtime.hex(),
        }

    def _open_secret(self) -> tuple[bytes, int]:
        """The sealed secret, made at first use, and where the counter stood then. Secret."""
        if self._folder is None:
            raise AttestationError("a TPM needs a folder to keep sealed secrets in", hint="give the attester a folder")
        path = self._folder / SEALED_NAME
        try:
            with path.open("rb") as stream:
                sealed = stream.read(_MAX_SEALED_BYTES + 1)
        except FileNotFoundError:
            return self._make_secret(path)
        except OSError as error:
            raise AttestationError(f"{path} cannot be read: {error.strerror}") from None
        opened = self._port.unseal(sealed, self._sealing_pcrs)
        if len(opened) != _SECRET_BYTES + _BASE_BYTES:
            raise AttestationError(f"{path} holds no sealed secret of this release")
        return opened[:_SECRET_BYTES], int.from_bytes(opened[_SECRET_BYTES:], "big")

    def _make_secret(self, path: Path) -> tuple[bytes, int]:
        secret = secrets.token_bytes(_SECRET_BYTES)
        # Sealed along with the secret: whoever deletes the counter and makes it anew cannot make it begin at 0 again.
        base = 0 if self._counter_index is None else self._port.increment_counter(self._counter_index)
        sealed = self._port.seal(secret + base.to_bytes(_BASE_BYTES, "big"), self._sealing_pcrs)
        write_whole(path, sealed)
        return secret, base


class NvCounter:
    """A number in the TPM that only grows, also over restarts: what tells an older sealed file from the newest.

    Args:
        port: the TPM.
        index: NV index of the counter.
        base: where the counter stood when it began; counted from there.
    """

    def __init__(self, port: TpmPort, index: int, base: int) -> None:
        self._port = port
        self._index = index
        self._base = base

    def value(self) -> int:
        """The number; 0 at first.

        Raises:
            AttestationError: the counter is gone, or below where it began.
        """
        found = self._port.read_counter(self._index)
        if found is None or found < self._base:
            raise AttestationError(
                f"the TPM's counter at NV index {self._index:#010x} is not the one that sealed files were counted with",
                hint="somebody removed it: what is sealed may be old, and cannot be told from the newest any more",
            )
        return found - self._base

    def increment(self) -> int:
        """Count up by one, durably, and return the new number."""
        self.value()
        return self._port.increment_counter(self._index) - self._base

    def advance(self, to: int) -> None:
        """Raise the number to `to`; a number that is not higher changes nothing.

        Raises:
            AttestationError: `to` is more than 1,000 steps away.
        """
        behind = to - self.value()
        if behind > _MAX_ADVANCE:
            raise AttestationError(
                f"the TPM's counter would have to go {behind} steps, over the limit of {_MAX_ADVANCE}"
            )
        for _ in range(behind):
            self.increment()
