"""Parses NVIDIA attestation reports: SPDM 1.1 GET_MEASUREMENTS request and MEASUREMENTS response (DMTF DSP0274).

Parsing proves nothing. The layout of the opaque data is NVIDIA's (nvtrust, local GPU verifier); every length is checked
before it is used, and what is left over or doubled is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cloister.errors import MalformedEvidenceError

NONCE_BYTES = 32
SIGNATURE_BYTES = 96  # r and s of P-384
DIGEST_BYTES = 48
MAX_MEASUREMENTS = 64
# Real reports are 4.1 to 4.3 KB; newer drivers add fields of a few bytes.
MAX_REPORT_BYTES = 16 << 10
# SPDM 1.1, GET_MEASUREMENTS, signature requested, all measurements.
REQUEST_START = bytes.fromhex("11e001ff")
RESPONSE_START = bytes.fromhex("1160")
DMTF_MEASUREMENT = 1

DRIVER, GPU_INFO, VBIOS = 3, 4, 6
BOARD_ID, CHIP_SKU, PROJECT, PROJECT_SKU = 14, 15, 17, 18
FWID, PROTECTED_PCIE, FEATURE_FLAG = 20, 21, 36
STATUS_ON, STATUS_OFF = b"\xaa", b"\x55"

_MAX_FIELDS = 64
_TEXT = re.compile(rb"[0-9A-Za-z._-]{1,32}")


@dataclass(frozen=True)
class GpuReport:
    """A report that parses. Unproven until its signature is checked.

    Attributes:
        nonce: 32 bytes, which whoever asked for the report chose.
        measurements: index -> 48 bytes.
        fields: type of opaque data -> bytes.
        signed: request and response without the signature.
        signature: 96 bytes, r and s.
    """

    nonce: bytes
    measurements: Mapping[int, bytes]
    fields: Mapping[int, bytes]
    signed: bytes
    signature: bytes

    def text(self, field: int) -> str:
        """A field that holds a text padded with zeros; "" where it is missing.

        Raises:
            MalformedEvidenceError: it holds something else.
        """
        value = self.fields.get(field)
        if value is None:
            return ""
        stripped = value.rstrip(b"\0")
        if not _TEXT.fullmatch(stripped):
            raise MalformedEvidenceError(f"field {field} of the GPU report is no text")
        return stripped.decode()

    @property
    def vbios(self) -> str:
        """The VBIOS version as NVIDIA writes it, "96.00.9f.00.01"; "" where it is missing.

        Raises:
            MalformedEvidenceError: the field has another form.
        """
        value = self.fields.get(VBIOS)
        if value is None:
            return ""
        # A little-endian number, then the last part of the version, then zeros.
        if len(value) != 8 or any(value[5:]):
            raise MalformedEvidenceError("the VBIOS version of the GPU report is not of the known form")
        return ".".join(f"{part:02x}" for part in (*reversed(value[:4]), value[4]))


def parse_report(blob: bytes) -> GpuReport:
    """Split a report into its parts.

    Raises:
        MalformedEvidenceError: it is not exactly one request and one signed response.
    """
    if len(blob) > MAX_REPORT_BYTES:
        raise MalformedEvidenceError(f"the GPU report is {len(blob)} bytes, the limit is {MAX_REPORT_BYTES}")
    reader = _Reader(blob)
    if reader.take(len(REQUEST_START)) != REQUEST_START:
        raise MalformedEvidenceError("the GPU report does not start with an SPDM 1.1 request for all measurements")
    nonce = reader.take(NONCE_BYTES)
    reader.take(1)  # the certificate slot: which chain is meant is shown by the chain itself
    if reader.take(len(RESPONSE_START)) != RESPONSE_START:
        raise MalformedEvidenceError("the GPU report has no SPDM 1.1 measurements response")
    reader.take(2)
    count = reader.number(1)
    measurements = _parse_measurements(_Reader(reader.take(reader.number(3))), count)
    reader.take(NONCE_BYTES)  # the responder's own
    fields = _parse_fields(_Reader(reader.take(reader.number(2))))
    signed = blob[: reader.at]
    signature = reader.take(SIGNATURE_BYTES)
    if reader.left:
        raise MalformedEvidenceError(f"{reader.left} bytes are left over after the GPU report's signature")
    return GpuReport(nonce, measurements, fields, signed, signature)


def _parse_measurements(reader: _Reader, count: int) -> dict[int, bytes]:
    if not 1 <= count <= MAX_MEASUREMENTS:
        raise MalformedEvidenceError(f"the GPU report has {count} measurements, not 1 to {MAX_MEASUREMENTS}")
    measurements: dict[int, bytes] = {}
    for _ in range(count):
        index, specification, size, _kind, value_size = struct.unpack("<BBHBH", reader.take(7))
        if specification != DMTF_MEASUREMENT or value_size != DIGEST_BYTES or size != value_size + 3:
            raise MalformedEvidenceError(f"measurement {index} of the GPU report is no DMTF digest of 48 bytes")
        if index in measurements or not 1 <= index <= MAX_MEASUREMENTS:
            raise MalformedEvidenceError(f"measurement {index} of the GPU report comes twice or is out of range")
        measurements[index] = reader.take(value_size)
    if reader.left:
        raise MalformedEvidenceError("bytes are left over after the GPU report's measurements")
    return measurements


def _parse_fields(reader: _Reader) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    while reader.left:
        name, size = reader.number(2), reader.number(2)
        if name in fields or len(fields) == _MAX_FIELDS:
            raise MalformedEvidenceError(f"field {name} of the GPU report comes twice, or there are too many")
        fields[name] = reader.take(size)
    return fields


class _Reader:
    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self.at = 0

    @property
    def left(self) -> int:
        return len(self._blob) - self.at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise MalformedEvidenceError("the GPU report is cut short")
        self.at += size
        return self._blob[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")
