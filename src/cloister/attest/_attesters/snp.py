"""Attester of an AMD SEV-SNP guest on Linux: reports through configfs-tsm, sealing keys from /dev/sev-guest.

Played through in tests on a file system and a device that follow the kernel's rules; not yet run on SNP hardware.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.attest._attesters.tsm import FileSystem, HostFileSystem, Sleep, TsmReport, side_file, tsm_report
from cloister.attest._measure import expected_host_data
from cloister.errors import AttestationError
from cloister.wire import Evidence, enc

PROVIDER = "sev_guest"
SEV_GUEST_PATH = Path("/dev/sev-guest")

# AMD SEV-SNP ABI (document 56860), table of ATTESTATION_REPORT: the same places in all its versions.
_REPORT_BYTES = 1184
_REPORT_DATA = slice(0x50, 0x90)
_MEASUREMENT = slice(0x90, 0xC0)
_HOST_DATA = slice(0xC0, 0xE0)

_SEALING_LABEL = b"cloister-sealing/v1"
# linux/sev-guest.h: _IOWR('S', 1, struct snp_guest_request_ioctl), which is 32 bytes long.
_SNP_GET_DERIVED_KEY = (3 << 30) | (32 << 16) | (ord("S") << 8) | 1
_MESSAGE_VERSION = 1
_KEY_REQUEST = struct.Struct("<IIQIIQ")  # root key, reserved, fields, VMPL, guest SVN, TCB version
_KEY_RESPONSE_BYTES = 64
_KEY = slice(32, 64)  # after a status of 4 bytes and 28 reserved ones
# The same document, MSG_KEY_REQ, GUEST_FIELD_SELECT: guest policy, image id, family id, measurement. Not guest SVN and
# TCB version: a guest may ask for any lower one, so they would keep nobody out, and an update would lose the files.
_KEY_FIELDS = 0b1111
_ROOT_KEY = 0  # the chip's own (VCEK; VLEK where the provider has loaded one), not the migration agent's

_CERTIFICATES_HINT = (
    "give a PEM file with the VCEK or VLEK certificate, ASK and ARK of this machine (`cloister collateral fetch`)"
)


class KeyDevice(Protocol):
    """What derives keys: /dev/sev-guest, or a test's."""

    def derive(self, request: bytes) -> bytes:
        """The 64-byte response, SECRET, to a 32-byte struct snp_derived_key_req; OSError where there is none."""
        ...


class _GuestRequest(ctypes.Structure):
    """struct snp_guest_request_ioctl of linux/sev-guest.h."""

    _fields_ = (
        ("msg_version", ctypes.c_uint8),
        ("req_data", ctypes.c_uint64),
        ("resp_data", ctypes.c_uint64),
        ("exitinfo2", ctypes.c_uint64),
    )


class SevGuestDevice:
    """/dev/sev-guest, opened when the object is made: Landlock takes device calls away from files opened later.

    Raises:
        AttestationError: the device is not there, or this user may not open it.
    """

    def __init__(self, path: Path = SEV_GUEST_PATH) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise AttestationError(
                f"cannot open {path}: {error.strerror}",
                hint="needs an SNP guest with the driver sev-guest, and a user who may read and write that device",
            ) from None

    def derive(self, request: bytes) -> bytes:
        """As `KeyDevice.derive`."""
        sent = ctypes.create_string_buffer(request, _KEY_REQUEST.size)
        response = ctypes.create_string_buffer(_KEY_RESPONSE_BYTES)
        call = _GuestRequest(_MESSAGE_VERSION, ctypes.addressof(sent), ctypes.addressof(response), 0)
        try:
            fcntl.ioctl(self._descriptor, _SNP_GET_DERIVED_KEY, call)
            return response.raw
        finally:
            ctypes.memset(response, 0, _KEY_RESPONSE_BYTES)

    def close(self) -> None:
        """Close the device."""
        os.close(self._descriptor)


class SnpAttester:
    """Vouches for a process in an SNP guest, whose launch fixed HOST_DATA to what the process may load.

    Args:
        certificates: PEM chain of the machine (VCEK or VLEK, ASK, ARK), as bytes or as a file that is read anew for
            each evidence; None takes the host's certificate table. Public, never fetched.
        register: 48 bytes, from `expected_rtmr3` of what this process loaded.
        vmpl: privilege level to ask for; None leaves the kernel's default.
        fs: the port; tests play kernels.
        keys: where sealing keys come from; None opens /dev/sev-guest when one is asked for. Give a `SevGuestDevice`
            where the process hardens itself before.
        sleep: between attempts, in seconds.

    Raises:
        AttestationError: no report, no certificates, or HOST_DATA is of something else than `register`.
    """

    type = "snp"
    binding = "ATTESTATION_REPORT.REPORT_DATA"

    def __init__(
        self,
        certificates: bytes | Path | None = None,
        *,
        register: bytes,
        vmpl: int | None = None,
        fs: FileSystem | None = None,
        keys: KeyDevice | None = None,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._certificates = certificates
        self._register = bytes(register)
        self._host_data = expected_host_data(register)
        self._vmpl = vmpl
        self._fs = fs or HostFileSystem()
        self._keys = keys
        self._sleep = sleep
        # 64 zero bytes are the report data of no session: those are SHA-512 values.
        report = self._report(bytes(64))
        self._aux(report)
        self._measurement = report.outblob[_MEASUREMENT]

    def __repr__(self) -> str:
        return f"SnpAttester(host_data={self._host_data.hex()[:16]}…)"

    def evidence(self, report_data: bytes) -> Evidence:
        """A fresh report over `report_data` (64 bytes, public), with the certificates to verify it.

        Raises:
            AttestationError: no report, or one that is over other data or of another launch.
        """
        report = self._report(report_data)
        return Evidence(type=self.type, blob=report.outblob, aux=self._aux(report))

    def sealing_key(self, label: str) -> bytes:
        """32 secret bytes, bound to the chip, guest policy, launch measurement, VMPL, register and `label`.

        The firmware mixes in all but the last two, this function those: the register is what HOST_DATA allowed. Every
        root process of this guest can ask the firmware for the same key. The chip's key depends on its firmware, so an
        update can lose sealed files: keep there only what can be made again. This was not run on SNP hardware.

        Raises:
            AttestationError: the device is not there or refuses.
        """
        request = _KEY_REQUEST.pack(_ROOT_KEY, 0, _KEY_FIELDS, self._vmpl or 0, 0, 0)
        if self._keys is None:
            self._keys = SevGuestDevice()
        try:
            response = self._keys.derive(request)
        except OSError as error:
            raise AttestationError(
                f"{SEV_GUEST_PATH} derives no key: {error.strerror}",
                hint="the kernel's log (dmesg) has the firmware's status; after a disabled VMPCK, start the guest anew",
            ) from None
        status = int.from_bytes(response[:4], "little")
        if len(response) != _KEY_RESPONSE_BYTES or status != 0 or not any(response[_KEY]):
            raise AttestationError(
                f"the firmware derives no key (status {status:#x})",
                hint="the VMPL that is asked for must not be below the guest's own",
            )
        info = enc(_SEALING_LABEL, self._register, label.encode())
        return HKDF(hashes.SHA384(), 32, salt=None, info=info).derive(response[_KEY])

    def counter(self) -> None:
        """None: SNP counts nothing."""

    def claims(self) -> dict[str, Any]:
        """What this attester would claim, unproven; JSON types only."""
        return {
            "tee": "snp",
            "evidence_type": self.type,
            "simulated": False,
            "measurement": self._measurement.hex(),
            "host_data": self._host_data.hex(),
        }

    def _report(self, report_data: bytes) -> TsmReport:
        report = tsm_report(report_data, provider=PROVIDER, fs=self._fs, privlevel=self._vmpl, sleep=self._sleep)
        blob = report.outblob
        if len(blob) != _REPORT_BYTES:
            raise AttestationError(f"the SNP report is {len(blob)} bytes, not {_REPORT_BYTES}")
        if blob[_REPORT_DATA] != report_data:
            raise AttestationError("the SNP report does not carry the report data asked for")
        if blob[_HOST_DATA] != self._host_data:
            raise AttestationError(
                f"HOST_DATA of this guest is {blob[_HOST_DATA].hex()}, what it loaded needs {self._host_data.hex()}",
                hint="start the guest with the HOST_DATA that `cloister measure` prints for this release and job",
            )
        return report

    def _aux(self, report: TsmReport) -> bytes:
        if self._certificates is not None:
            return side_file(self._certificates, what="SNP certificates", hint=_CERTIFICATES_HINT)
        if not report.auxblob:
            raise AttestationError("the host hands out no SNP certificates", hint=_CERTIFICATES_HINT)
        return report.auxblob
