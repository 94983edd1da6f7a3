"""A software NVIDIA: root, devices and reports in NVIDIA's formats. Everything here says SIMULATED; only tests use it.

The layout is that of real reports and chains: root -> product line -> device -> firmware, whose key signs the report.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from cloister.attest._verifiers import gpu_report
from cloister.attest._verifiers.gpu import FWID_OID, FWID_PREFIX
from cloister.wire import Evidence

SIMULATED_DRIVER = "000.00.01"
SIMULATED_VBIOS = "96.00.00.00.01"
SIMULATED_FWID = hashlib.sha384(b"cloister SIMULATED GPU firmware").digest()
_VALID_D = 3650


def simulated_measurement(index: int) -> bytes:
    """What measurement `index` of a simulated GPU is: a constant that names itself."""
    return hashlib.sha384(f"cloister SIMULATED GPU measurement {index}".encode()).digest()


def default_fields() -> dict[int, bytes]:
    """The opaque data of an honest report: those fields of a real one that a policy can speak of."""
    return {
        gpu_report.VBIOS: bytes.fromhex("0000009601000000"),
        gpu_report.BOARD_ID: bytes(4),
        gpu_report.CHIP_SKU: b"SIM\0",
        gpu_report.PROJECT: b"SIMULATED\0",
        gpu_report.DRIVER: SIMULATED_DRIVER.encode() + b"\0",
        gpu_report.FWID: SIMULATED_FWID,
        gpu_report.PROTECTED_PCIE: gpu_report.STATUS_OFF,
    }


@dataclass(frozen=True)
class CertificateOptions:
    """What a certificate of the simulated chain says; tests change it to play a broken one."""

    path_length: int | None = None
    is_authority: bool = False
    not_before: datetime | None = None
    key_usage: bool = True
    cert_sign: bool | None = None
    digest: hashes.SHA384 | hashes.SHA256 = field(default_factory=hashes.SHA384)
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = ()


class SimulatedGpuRoot:
    """The keys and certificates of a simulated GPU vendor. In memory only.

    Args:
        now: Unix seconds; certificates are valid from the day before, for ten years.
    """

    def __init__(self, *, now: int) -> None:
        self.now = now
        self.key = ec.generate_private_key(ec.SECP384R1())
        options = CertificateOptions(is_authority=True)
        self.certificate = self.issue("root", self.key.public_key(), "root", self.key, options)
        self.line_key = ec.generate_private_key(ec.SECP384R1())
        self.line = self.issue("product line", self.line_key.public_key(), "root", self.key, options)

    @property
    def root_sha256(self) -> str:
        """Lower-case hex SHA-256 of the root certificate: what a policy pins."""
        return hashlib.sha256(self.certificate.public_bytes(serialization.Encoding.DER)).hexdigest()

    def issue(
        self,
        name: str,
        public_key: Any,
        issuer: str,
        issuer_key: ec.EllipticCurvePrivateKey,
        options: CertificateOptions,
    ) -> x509.Certificate:
        """One certificate; `name` and `issuer` without the word SIMULATED, which is added."""
        start = options.not_before or datetime.fromtimestamp(self.now, UTC) - timedelta(days=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(issuer))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=_VALID_D))
        )
        if options.is_authority:
            builder = builder.add_extension(x509.BasicConstraints(True, options.path_length), True)
        if options.key_usage:
            sign = options.is_authority if options.cert_sign is None else options.cert_sign
            usage = x509.KeyUsage(not sign, False, False, False, False, sign, sign, False, False)
            builder = builder.add_extension(usage, True)
        for extension, critical in options.extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(issuer_key, options.digest)

    def device(self, **changes: CertificateOptions) -> SimulatedGpu:
        """A new GPU. `changes` may give the options of the certificates `device` and `leaf`."""
        return SimulatedGpu(self, changes)


class SimulatedGpu:
    """One simulated GPU, which signs whatever report it is asked for."""

    def __init__(self, root: SimulatedGpuRoot, changes: Mapping[str, CertificateOptions]) -> None:
        self.root = root
        self.device_key = ec.generate_private_key(ec.SECP384R1())
        self.key = ec.generate_private_key(ec.SECP384R1())
        authority = CertificateOptions(is_authority=True, path_length=0)
        self.certificate = root.issue(
            "device", self.device_key.public_key(), "product line", root.line_key, changes.get("device", authority)
        )
        self.leaf = self.issue_leaf(changes.get("leaf"))

    def issue_leaf(self, options: CertificateOptions | None = None, *, public_key: Any = None) -> x509.Certificate:
        """The firmware's certificate, as the device's boot code issues it."""
        options = options or CertificateOptions(extensions=((fwid_extension(), False),))
        return self.root.issue("firmware", public_key or self.key.public_key(), "device", self.device_key, options)

    def chain_pem(self) -> bytes:
        """Leaf first, root last."""
        return pem(self.leaf, self.certificate, self.root.line, self.root.certificate)

    def report(
        self,
        nonce: bytes,
        *,
        fields: Mapping[int, bytes] | None = None,
        measurements: Mapping[int, bytes] | None = None,
        opaque: bytes | None = None,
        record: bytes | None = None,
        count: int | None = None,
        request: bytes = gpu_report.REQUEST_START,
        response: bytes = gpu_report.RESPONSE_START,
    ) -> bytes:
        """A signed report. The arguments replace parts of an honest one.

        Args:
            nonce: 32 bytes.
            fields, measurements: in place of the honest ones.
            opaque, record, count: the raw bytes and number, in place of what those encode to.
            request, response: the bytes that each message starts with.
        """
        values = {i: simulated_measurement(i) for i in range(1, 5)} if measurements is None else measurements
        record = measurement_record(values) if record is None else record
        opaque = opaque_data(default_fields() if fields is None else fields) if opaque is None else opaque
        signed = (
            request
            + nonce
            + b"\0"
            + response
            + bytes(2)
            + bytes([len(values) if count is None else count])
            + len(record).to_bytes(3, "little")
            + record
            + secrets.token_bytes(32)
            + len(opaque).to_bytes(2, "little")
            + opaque
        )
        r, s = utils.decode_dss_signature(self.key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return signed + r.to_bytes(48) + s.to_bytes(48)

    def evidence(self, nonce: bytes, **changes: Any) -> Evidence:
        """The report for `nonce` with its chain, declared as what it is."""
        return Evidence("simulated-gpu", self.report(nonce, **changes), self.chain_pem())


class SimulatedGpus:
    """Simulated GPUs as the source of `WithGpuAttester`."""

    def __init__(self, *gpus: SimulatedGpu) -> None:
        self._gpus = gpus

    def evidence(self, nonce: bytes) -> list[Evidence]:
        """One report per GPU for `nonce` (32 bytes, public)."""
        return [gpu.evidence(nonce) for gpu in self._gpus]

    def claims(self) -> list[dict[str, Any]]:
        """What the reports state; JSON types only."""
        return [{"tee": "gpu", "simulated": True, "driver": SIMULATED_DRIVER} for _ in self._gpus]


def fwid_extension(fwid: bytes = SIMULATED_FWID) -> x509.UnrecognizedExtension:
    """The extension that names the firmware; what comes before the name is the device's key on real hardware."""
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(FWID_OID), b"SIMULATED" + FWID_PREFIX + fwid)


def measurement_record(values: Mapping[int, bytes]) -> bytes:
    """DMTF measurement blocks."""
    return b"".join(struct.pack("<BBHBH", i, 1, len(v) + 3, 1, len(v)) + v for i, v in values.items())


def opaque_data(fields: Mapping[int, bytes]) -> bytes:
    """Type, length, value."""
    return b"".join(struct.pack("<HH", name, len(value)) + value for name, value in fields.items())


def pem(*certificates: x509.Certificate) -> bytes:
    """The certificates as one PEM text, in the order given."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def _name(common_name: str) -> x509.Name:
    organisation = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "cloister SIMULATED, not NVIDIA")
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"SIMULATED GPU {common_name}"), organisation])
