"""Attester of an SGX enclave under Gramine: quotes and keys through the pseudo-files in /dev/attestation.

Played through in tests on a folder of plain files; not yet run on SGX hardware. The files are described in Gramine's
documentation, "Attestation and Secret Provisioning", section "Low-level /dev/attestation interface".
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.attest._attesters.tsm import side_file
from cloister.attest._types import REPORT_DATA_BYTES
from cloister.errors import AttestationError
from cloister.wire import Evidence, enc

GRAMINE_FOLDER = Path("/dev/attestation")
_ATTESTATION_TYPE = "dcap"
_SEALING_LABEL = b"cloister-sealing/v1"
_SEALING_KIND = b"sgx-mrenclave"
_KEY_BYTES = 16  # Gramine's special keys are those of AES-GCM-128
# In a quote of version 3, after 48 bytes of header (Intel SGX ECDSA QuoteLib reference, appendix A.4).
_REPORT_DATA = slice(48 + 320, 48 + 384)
_MAX_QUOTE_BYTES = 64 << 10
_MANIFEST_HINT = 'run under Gramine with `sgx.remote_attestation = "dcap"` in the manifest'
_COLLATERAL_HINT = "run `cloister collateral fetch` on a machine with network access and give its file here"


class SgxAttester:
    """Vouches for a process in an SGX enclave that Gramine runs.

    Args:
        collateral: JSON of spec/attestation.md section 1, as bytes or as a file; public. A file is read anew for each
            evidence, so that it can be renewed while the enclave runs. Never fetched.
        folder: Gramine's folder; tests give their own.

    Raises:
        AttestationError: there is no such folder, it offers no DCAP attestation, or there is no collateral.
    """

    type = "sgx"
    binding = "REPORT.REPORTDATA"

    def __init__(self, collateral: bytes | Path, *, folder: Path = GRAMINE_FOLDER) -> None:
        self._folder = folder
        self._source = collateral
        self._lock = threading.Lock()
        offered = self._read("attestation_type", 64).strip(b"\0\n ").decode("ascii", "replace")
        if offered != _ATTESTATION_TYPE:
            raise AttestationError(f'Gramine offers attestation of type "{offered}", not "dcap"', hint=_MANIFEST_HINT)
        self._collateral()

    def __repr__(self) -> str:
        return f"SgxAttester({self._folder})"

    def evidence(self, report_data: bytes) -> Evidence:
        """A fresh quote over `report_data` (64 bytes, public), with the collateral to verify it.

        Raises:
            AttestationError: no quote, or one over other data.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise AttestationError(f"report_data is {len(report_data)} bytes, not {REPORT_DATA_BYTES}")
        collateral = self._collateral()
        # Two steps on files that the whole process shares: another thread must not write in between.
        with self._lock:
            self._write("user_report_data", report_data)
            quote = self._read("quote", _MAX_QUOTE_BYTES)
        if quote[_REPORT_DATA] != report_data:
            raise AttestationError("the quote does not carry the report data asked for")
        return Evidence(type=self.type, blob=quote, aux=collateral)

    def sealing_key(self, label: str) -> bytes:
        """32 secret bytes that only this enclave (same MRENCLAVE) on this processor derives again, bound to `label`.

        They come from 16 secret bytes that the processor derives, so they are worth 128 bits.

        Raises:
            AttestationError: Gramine gives no such key.
        """
        key = self._read("keys/_sgx_mrenclave", _KEY_BYTES)
        if len(key) != _KEY_BYTES:
            raise AttestationError(f"Gramine's sealing key is {len(key)} bytes, not {_KEY_BYTES}")
        info = enc(_SEALING_LABEL, _SEALING_KIND, label.encode())
        return HKDF(hashes.SHA384(), 32, salt=None, info=info).derive(key)

    def counter(self) -> None:
        """None: SGX on servers counts nothing any more."""

    def claims(self) -> dict[str, Any]:
        """What this attester would claim, unproven; JSON types only."""
        return {"tee": "sgx", "evidence_type": self.type, "simulated": False, "attestation_type": _ATTESTATION_TYPE}

    def _collateral(self) -> bytes:
        return side_file(self._source, what="SGX collateral", hint=_COLLATERAL_HINT)

    def _read(self, name: str, max_bytes: int) -> bytes:
        path = self._folder / name
        try:
            with path.open("rb") as stream:
                data = stream.read(max_bytes + 1)
        except OSError as error:
            raise AttestationError(f"cannot read {path}: {error.strerror}", hint=_MANIFEST_HINT) from None
        if len(data) > max_bytes:
            raise AttestationError(f"{path} is over the limit of {max_bytes} bytes")
        return data

    def _write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        try:
            path.write_bytes(data)
        except OSError as error:
            raise AttestationError(f"cannot write {path}: {error.strerror}", hint=_MANIFEST_HINT) from None
