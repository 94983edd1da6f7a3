"""The bytes of an SEV-SNP attestation report, by version and product. Parses, proves nothing.

Layout: AMD publication 56860, "SEV Secure Nested Paging Firmware ABI Specification", table ATTESTATION_REPORT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cloister.errors import EvidenceSignatureError, MalformedEvidenceError

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
VERSIONS = (2, 3, 5)
CHIP_ID_BYTES = 64

_ECDSA_P384_SHA384 = 1
_NUMBER_BYTES = 72  # r and s: little-endian, 72 bytes each, of which P-384 fills 48
_SIGNERS = {0: "vcek", 1: "vlek"}  # SIGNING_KEY, bits 4:2 of the word at 0x48; 7 means that nothing signed
_KEY_INFO_KNOWN = 0x1F  # AUTHOR_KEY_EN, MASK_CHIP_KEY, SIGNING_KEY

# Where a security patch level is in the eight bytes of a TCB version. What is not named is reserved and zero.
_TCB_MILAN = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
_TCB_TURIN = {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7}
_TCB_LAYOUTS = {"milan": _TCB_MILAN, "genoa": _TCB_MILAN, "turin": _TCB_TURIN}
_TCB_OFFSETS = {"current": 0x38, "reported": 0x180, "committed": 0x1E0, "launch": 0x1F0}

# CPUID family and models, in the report from version 3 on. Bergamo and Siena (models A0 to AF) are of Genoa's root.
_PRODUCTS = (
    (0x19, range(0x10), "milan"),
    (0x19, range(0x10, 0x20), "genoa"),
    (0x19, range(0xA0, 0xB0), "genoa"),
    (0x1A, range(0x20), "turin"),
)
_FIRST_WITH_CPUID = 3
_FIRST_WITH_MITIGATIONS = 5


@dataclass(frozen=True)
class SnpReport:
    """The fields of one report. Nothing here is proven before the signature is.

    Attributes:
        version: of the layout, 2, 3 or 5.
        guest_svn: the guest's own security version.
        guest_policy: the 64 bits that the guest was launched with.
        family_id, image_id: 16 bytes each, from the ID block.
        vmpl: privilege level of whoever asked; 0xFFFFFFFF where the host did.
        platform_info: 64 bits on the machine's settings.
        signer: "vcek" or "vlek".
        author_key_enabled: whether `author_key_digest` means anything.
        report_data: the 64 bytes of the guest.
        measurement: SHA-384 launch digest.
        host_data: the 32 bytes that the host gave at launch.
        id_key_digest, author_key_digest: SHA-384 of the keys that signed the ID block; zero where there is none.
        product: by CPUID, None in version 2, which does not say.
        chip_id: 64 bytes, zero where the host masks it.
        tcb: "current", "reported", "committed", "launch" -> 8 bytes, to be read by `tcb_parts`.
        signed: the bytes under the signature.
        r, s: the ECDSA signature.
    """

    version: int
    guest_svn: int
    guest_policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    platform_info: int
    signer: str
    author_key_enabled: bool
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    product: str | None
    chip_id: bytes
    tcb: Mapping[str, bytes]
    signed: bytes = field(repr=False)
    r: int = field(repr=False)
    s: int = field(repr=False)


def parse_report(blob: bytes) -> SnpReport:
    """Read a report. Success means only that the bytes have the form of one.

    Raises:
        MalformedEvidenceError: not a report of a version that this release knows, or a reserved field is not zero.
        EvidenceSignatureError: the report names no signature that there could be a certificate for.
    """
    if len(blob) != REPORT_BYTES:
        raise MalformedEvidenceError(f"the SNP report is {len(blob)} bytes, not {REPORT_BYTES}")
    version = _number(blob, 0x00, 4)
    if version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise MalformedEvidenceError(f"the SNP report is of version {version}", hint=f"this release knows {known}")
    key_info = _number(blob, 0x48, 4)
    _check_reserved(blob, version, key_info)
    if (algorithm := _number(blob, 0x34, 4)) != _ECDSA_P384_SHA384:
        raise EvidenceSignatureError(f"the SNP report's signature algorithm is {algorithm}, not ECDSA P-384 (1)")
    signer = _SIGNERS.get(key_info >> 2)
    if signer is None:
        raise EvidenceSignatureError(f"the SNP report is signed by no VCEK or VLEK (signing key {key_info >> 2})")
    return SnpReport(
        version=version,
        guest_svn=_number(blob, 0x04, 4),
        guest_policy=_number(blob, 0x08, 8),
        family_id=blob[0x10:0x20],
        image_id=blob[0x20:0x30],
        vmpl=_number(blob, 0x30, 4),
        platform_info=_number(blob, 0x40, 8),
        signer=signer,
        author_key_enabled=bool(key_info & 1),
        report_data=blob[0x50:0x90],
        measurement=blob[0x90:0xC0],
        host_data=blob[0xC0:0xE0],
        id_key_digest=blob[0xE0:0x110],
        author_key_digest=blob[0x110:0x140],
        product=_product(blob[0x188], blob[0x189]) if version >= _FIRST_WITH_CPUID else None,
        chip_id=blob[0x1A0:0x1E0],
        tcb={name: blob[at : at + 8] for name, at in _TCB_OFFSETS.items()},
        signed=blob[:SIGNED_BYTES],
        r=_number(blob, SIGNED_BYTES, _NUMBER_BYTES),
        s=_number(blob, SIGNED_BYTES + _NUMBER_BYTES, _NUMBER_BYTES),
    )


def tcb_parts(raw: bytes, product: str) -> dict[str, int]:
    """The security patch levels in one TCB version (8 bytes), by the layout of `product`.

    Raises:
        MalformedEvidenceError: a reserved byte is not zero, so the layout is another one.
    """
    layout = _TCB_LAYOUTS[product]
    if any(value for at, value in enumerate(raw) if at not in layout.values()):
        raise MalformedEvidenceError(f"TCB version {raw.hex()} is not of the layout of {product}")
    return {part: raw[at] for part, at in layout.items()}


def _check_reserved(blob: bytes, version: int, key_info: int) -> None:
    """Fields that the ABI calls zero: what is there may mean something that this release would overlook."""
    reserved = [
        (0x4C, 0x50),
        (0x18B if version >= _FIRST_WITH_CPUID else 0x188, 0x1A0),
        (0x1EB, 0x1EC),
        (0x1EF, 0x1F0),
        (0x208 if version >= _FIRST_WITH_MITIGATIONS else 0x1F8, SIGNED_BYTES),
        (SIGNED_BYTES + 2 * _NUMBER_BYTES, REPORT_BYTES),
    ]
    for start, end in reserved:
        if any(blob[start:end]):
            raise MalformedEvidenceError(f"reserved bytes {start:#x} to {end:#x} of the SNP report are not zero")
    if key_info & ~_KEY_INFO_KNOWN:
        raise MalformedEvidenceError(f"reserved bits of the SNP report's key information {key_info:#x} are not zero")


def _product(family: int, model: int) -> str:
    for known_family, models, product in _PRODUCTS:
        if family == known_family and model in models:
            return product
    raise MalformedEvidenceError(f"the SNP report is of an unknown processor (family {family:#x}, model {model:#x})")


def _number(blob: bytes, at: int, size: int) -> int:
    return int.from_bytes(blob[at : at + size], "little")
