"""Writes SEV-SNP attestation reports byte by byte, field after field, apart from the verifier that reads them.

Layout: AMD publication 56860, "SEV Secure Nested Paging Firmware ABI Specification", table ATTESTATION_REPORT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SIGNING_KEYS = {"vcek": 0, "vlek": 1}
# The parts of a TCB version in the order of its bytes; an empty name is a reserved byte.
TCB_LAYOUTS = {
    "milan": ("bootloader", "tee", "snp", "microcode"),
    "genoa": ("bootloader", "tee", "snp", "microcode"),
    "turin": ("fmc", "bootloader", "tee", "snp", "microcode"),
}
_FAMILY_MODEL_STEP = {"milan": (0x19, 0x01, 1), "genoa": (0x19, 0x11, 1), "turin": (0x1A, 0x02, 1)}


@dataclass(frozen=True)
class SnpFields:
    """What a report states.

    Attributes:
        product: which layout and which CPUID.
        signing_key: 0 for the VCEK, 1 for the VLEK, 7 for none.
        report_data: 64 bytes.
        measurement: 48 bytes.
        host_data: 32 bytes.
        chip_id: 64 bytes.
        guest_policy: 64 bits.
        tcb: part -> level, of all TCB versions that have no other.
        current, committed, launch: levels in place of those of `tcb`.
        version: 2, 3 or 5 of the layout.
        vmpl: of whoever asked.
        algorithm: of the signature.
        mask_chip_key, author_key: bits of the key information.
        cpuid: family, model, stepping in place of the product's.
    """

    product: str
    signing_key: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    chip_id: bytes
    guest_policy: int
    tcb: Mapping[str, int]
    current: Mapping[str, int] | None = None
    committed: Mapping[str, int] | None = None
    launch: Mapping[str, int] | None = None
    version: int = 3
    vmpl: int = 0
    algorithm: int = 1
    mask_chip_key: bool = False
    author_key: bool = False
    cpuid: tuple[int, int, int] | None = None


def report_body(fields: SnpFields) -> bytes:
    """The 0x2A0 bytes that get signed."""
    cpuid = bytes(fields.cpuid or _FAMILY_MODEL_STEP[fields.product]) if fields.version >= 3 else bytes(3)
    key_info = fields.author_key | fields.mask_chip_key << 1 | fields.signing_key << 2
    firmware = bytes([29, 55, 1, 0])  # build, minor, major, reserved
    mitigations = bytes([0xFF] * 16) if fields.version >= 5 else bytes(16)
    parts = (
        _u32(fields.version),
        _u32(4),  # guest SVN
        fields.guest_policy.to_bytes(8, "little"),
        b"SIMULATED family",
        b"SIMULATED image ",
        _u32(fields.vmpl),
        _u32(fields.algorithm),
        tcb_version(fields.current or fields.tcb, fields.product),
        (1).to_bytes(8, "little"),  # platform: SMT is on
        _u32(key_info),
        bytes(4),
        fields.report_data,
        fields.measurement,
        fields.host_data,
        bytes(48),  # ID key
        b"\xaa" * 48,  # author key, which means something only where the bit says so
        b"\x11" * 32,  # report id
        b"\xff" * 32,  # no migration agent
        tcb_version(fields.tcb, fields.product),
        cpuid,
        bytes(21),
        fields.chip_id,
        tcb_version(fields.committed or fields.tcb, fields.product),
        firmware,
        firmware,
        tcb_version(fields.launch or fields.tcb, fields.product),
        mitigations,
        bytes(152),
    )
    return b"".join(parts)


def tcb_version(levels: Mapping[str, int], product: str) -> bytes:
    """The eight bytes of a TCB version: the named parts in order, the microcode last, zeros between."""
    layout = TCB_LAYOUTS[product]
    if product == "turin":
        return bytes([levels[part] for part in layout[:4]]) + bytes(3) + bytes([levels["microcode"]])
    return bytes([levels[part] for part in layout[:2]]) + bytes(4) + bytes([levels[part] for part in layout[2:]])


def signature(r: int, s: int) -> bytes:
    """512 bytes: r and s as little-endian numbers of 72 bytes, then zeros."""
    return (r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(512, b"\0")


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")
