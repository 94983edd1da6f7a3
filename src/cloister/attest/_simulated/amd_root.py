"""The software AMD: roots, signing keys and reports in AMD's formats, for tests and demonstrations. In memory only.

Success of a verification under such a root proves only that this process issued the evidence. Only a policy that pins
this ARK and says `allow_simulated = true` accepts it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import secrets
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.attest._simulated import snpreport
from cloister.attest._types import REPORT_DATA_BYTES
from cloister.errors import AttestationError
from cloister.wire import Evidence, enc

CERTIFICATE_D = 3650
CRL_D = 30
# What a policy for tests can ask for; one more than this is a level that the platform does not have.
TCB_LEVELS = {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219, "fmc": 2}
SIMULATED_MEASUREMENT = hashlib.sha384(b"cloister SIMULATED measurement").digest()
# ABI 1.55, the bit that is always one, no SMT, no migration agent, no debugging.
GUEST_POLICY = 0x20000 | 0x0137

_OID = "1.3.6.1.4.1.3704.1"
_LEVEL_OIDS = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}
_RESERVED_OIDS = ("3.4", "3.5", "3.6", "3.7")
_PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
_SEALING_LABEL = b"cloister-sealing/v1"
_GUIDS = {
    "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
    "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "issuer": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "crl": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
}


class SimulatedAmdRoot:
    """One simulated product line with one chip: ARK, ASK, ASVK, a VCEK and a VLEK.

    Two RSA keys are made once for each process and shared by all roots in it, since 4096 bits take a second; roots
    still differ, by their certificates. Leaf keys are fresh.

    Args:
        now: Unix seconds; certificates start a day earlier and last ten years.
        product: "milan", "genoa" or "turin".
        levels: part -> security patch level that the VCEK and VLEK certificates state.
        zero_serial: give leaves the serial number 0, as AMD does.
    """

    def __init__(
        self, *, now: int, product: str = "milan", levels: Mapping[str, int] = TCB_LEVELS, zero_serial: bool = True
    ) -> None:
        self.product = product
        self.levels = {part: levels[part] for part in snpreport.TCB_LAYOUTS[product]}
        # A Turin's id is 8 bytes, and fills the report's field with zeros.
        self.hw_id = secrets.token_bytes(8 if product == "turin" else 64)
        self._now = now
        self._zero_serial = zero_serial
        self._fuse_key = secrets.token_bytes(32)
        self._keys = {kind: ec.generate_private_key(ec.SECP384R1()) for kind in ("vcek", "vlek")}
        title = product.capitalize()
        self._names = {
            "ark": f"ARK-{title}",
            "ask": f"SEV-{title}",
            "asvk": f"SEV-VLEK-{title}",
            "vcek": "SEV-VCEK",
            "vlek": "SEV-VLEK",
        }
        self.certificates = {name: self.issue(name) for name in self._names}

    def __repr__(self) -> str:
        return f"SimulatedAmdRoot({self.product}, {self.root_sha256[:16]}…)"

    @property
    def root_sha256(self) -> str:
        """Hex SHA-256 of the ARK certificate's DER, for [roots].amd_ark_sha256."""
        return hashlib.sha256(self.certificates["ark"]).hexdigest()

    @property
    def chip_id(self) -> bytes:
        """The 64 bytes of CHIP_ID in reports."""
        return self.hw_id.ljust(64, b"\0")

    @property
    def fuse_key(self) -> bytes:
        """32 bytes, secret: what the simulated chip derives sealing keys from."""
        return self._fuse_key

    def issue(
        self,
        name: str,
        *,
        now: int | None = None,
        days: int = CERTIFICATE_D,
        signer: str = "",
        common_name: str = "",
        issuer_name: str = "",
        public_key: Any = None,
        is_ca: bool | None = None,
        extensions: Mapping[str, bytes | None] | None = None,
    ) -> bytes:
        """DER of one certificate of the hierarchy; every argument after `name` is for one that is wrong somewhere.

        Args:
            name: "ark", "ask", "asvk", "vcek" or "vlek".
            now, days: start of validity plus one day, and its length.
            signer: "ark" or "sev", whose RSA key signs; "" for the right one.
            common_name, issuer_name: without the mark SIMULATED, which is always put in front.
            public_key: the subject's, in place of the right one.
            is_ca: in place of what fits `name`.
            extensions: OID under AMD's arc ("3.8") -> DER; None leaves it out.
        """
        leaf = name in self._keys
        above = {"vcek": "ask", "vlek": "asvk"}.get(name, "ark")
        start = datetime.fromtimestamp(self._now if now is None else now, UTC) - timedelta(days=1)
        own = self._keys[name].public_key() if leaf else _rsa_key("ark" if name == "ark" else "sev").public_key()
        is_ca = not leaf if is_ca is None else is_ca
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name or self._names[name]))
            .issuer_name(_name(issuer_name or self._names[above]))
            .public_key(own if public_key is None else public_key)
            .serial_number(1 if leaf and self._zero_serial else x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=days))
        )
        if not leaf:
            usage = x509.KeyUsage(False, False, False, False, False, is_ca, is_ca, False, False)
            builder = builder.add_extension(x509.BasicConstraints(is_ca, None), True).add_extension(usage, True)
        for oid, value in (self._extensions(name) | dict(extensions or {}) if leaf else {}).items():
            if value is not None:
                extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{_OID}.{oid}"), value)
                builder = builder.add_extension(extension, False)
        key = _rsa_key(signer or ("sev" if leaf else "ark"))
        der = builder.sign(key, hashes.SHA384(), rsa_padding=_PSS).public_bytes(serialization.Encoding.DER)
        return _with_zero_serial(der, key) if leaf and self._zero_serial else der

    def _extensions(self, name: str) -> dict[str, bytes | None]:
        """AMD's own extensions of a VCEK or VLEK certificate: OID under AMD's arc -> DER."""
        title = self.product.capitalize()
        values: dict[str, bytes | None] = {"1": _integer(0)}
        values["2"] = _ia5(f"{title}-B0" if name == "vcek" else title)
        values |= {_LEVEL_OIDS[part]: _integer(level) for part, level in self.levels.items()}
        values |= {oid: _integer(0) for oid in _RESERVED_OIDS}
        if name == "vlek":
            return values | {"5": _ia5("CN=SIMULATED.cloud.example")}
        # AMD writes the bare bytes into older certificates, and an OCTET STRING into newer ones.
        return values | {"4": self.hw_id if self.product == "milan" else bytes([4, len(self.hw_id)]) + self.hw_id}

    def crl(self, *, now: int | None = None, revoked: tuple[int, ...] = (), issuer: str = "ark") -> bytes:
        """DER of the ARK's revocation list, naming the serial numbers in `revoked`.

        Args:
            now: when it is issued; it expires 30 days later.
            revoked: serial numbers.
            issuer: "ark", or "sev" for a list that claims to be the ARK's and is signed by another key.
        """
        issued = datetime.fromtimestamp(self._now if now is None else now, UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(self._names["ark"]))
            .last_update(issued)
            .next_update(issued + timedelta(days=CRL_D))
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued)
            builder = builder.add_revoked_certificate(entry.build())
        signed = builder.sign(_rsa_key(issuer), hashes.SHA384(), rsa_padding=_PSS)
        return signed.public_bytes(serialization.Encoding.DER)

    def parts(self, kind: str, **changes: bytes) -> dict[str, bytes]:
        """DER by slot ("vcek" or "vlek", "issuer", "ark", perhaps "crl"), in the order of a PEM chain."""
        issuer = self.certificates["ask" if kind == "vcek" else "asvk"]
        return {kind: self.certificates[kind], "issuer": issuer, "ark": self.certificates["ark"], **changes}

    def sign_report(self, body: bytes, kind: str) -> bytes:
        """A report of 1184 bytes: `body` (0x2A0 bytes) and the signature of the VCEK or VLEK."""
        r, s = utils.decode_dss_signature(self._keys[kind].sign(body, ec.ECDSA(hashes.SHA384())))
        return body + snpreport.signature(r, s)


class SimulatedSnpAttester:
    """Issues SNP reports of a simulated chip. Nothing but the process's own hardening protects it.

    Args:
        root: the simulated AMD.
        host_data: 32 bytes, what measures code and job.
        measurement: 48 bytes, what measures firmware and image.
        kind: "vcek" or "vlek", who signs.
        form: "table" or "pem", how certificates are sent along.
        fields: other fields of the report by the names of `snpreport.SnpFields`, for tests.

    Raises:
        AttestationError: a register has the wrong length.
    """

    type = "simulated-snp"
    binding = "ATTESTATION_REPORT.REPORT_DATA of a SIMULATED report"

    def __init__(
        self,
        root: SimulatedAmdRoot,
        *,
        host_data: bytes,
        measurement: bytes = SIMULATED_MEASUREMENT,
        kind: str = "vcek",
        form: str = "table",
        **fields: Any,
    ) -> None:
        if len(host_data) != 32 or len(measurement) != 48:
            raise AttestationError(f"host_data is {len(host_data)} bytes, not 32, or measurement not 48")
        self._root, self._kind, self._form = root, kind, form
        self._registers = {"measurement": bytes(measurement), "host_data": bytes(host_data)}
        self._fields: dict[str, Any] = {"guest_policy": GUEST_POLICY, "tcb": root.levels, "chip_id": root.chip_id}
        self._fields |= fields

    def __repr__(self) -> str:
        return f"SimulatedSnpAttester({self._root.product}, host_data={self._registers['host_data'].hex()[:16]}…)"

    def evidence(self, report_data: bytes) -> Evidence:
        """A fresh report over `report_data` (64 bytes, public), with the certificates to verify it.

        Raises:
            AttestationError: `report_data` is not 64 bytes.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise AttestationError(f"report_data is {len(report_data)} bytes, not {REPORT_DATA_BYTES}")
        fields = snpreport.SnpFields(
            product=self._root.product,
            signing_key=snpreport.SIGNING_KEYS[self._kind],
            report_data=report_data,
            **self._registers,
            **self._fields,
        )
        blob = self._root.sign_report(snpreport.report_body(fields), self._kind)
        parts = self._root.parts(self._kind)
        return Evidence(self.type, blob, certificate_table(parts) if self._form == "table" else pem_chain(parts))

    def sealing_key(self, label: str) -> bytes:
        """32 secret bytes, bound to the simulated chip, to both registers and to `label`."""
        info = enc(_SEALING_LABEL, self._registers["measurement"] + self._registers["host_data"], label.encode())
        return HKDF(hashes.SHA384(), 32, salt=None, info=info).derive(self._root.fuse_key)

    def counter(self) -> None:
        """None: it seals nothing that outlives a test."""

    def claims(self) -> dict[str, Any]:
        """What the reports of this attester state; JSON types only."""
        registers = {name: value.hex() for name, value in self._registers.items()}
        claims = {"tee": "snp", "evidence_type": self.type, "simulated": True, "product": self._root.product}
        return claims | registers


def certificate_table(parts: Mapping[str, bytes]) -> bytes:
    """The GHCB's certificate table of `parts`; a name that is no slot is taken as a GUID."""
    at, entries, items = 24 * (len(parts) + 1), b"", b""
    for name, item in parts.items():
        guid = uuid.UUID(_GUIDS.get(name, name)).bytes
        entries += guid + (at + len(items)).to_bytes(4, "little") + len(item).to_bytes(4, "little")
        items += item
    return entries + bytes(24) + items


def pem_chain(parts: Mapping[str, bytes]) -> bytes:
    """The PEM form of `parts`, in their order."""
    return b"".join(pem_item(item, "X509 CRL" if name == "crl" else "CERTIFICATE") for name, item in parts.items())


def pem_item(der: bytes, label: str = "CERTIFICATE") -> bytes:
    """One PEM item."""
    return f"-----BEGIN {label}-----\n".encode() + base64.encodebytes(der) + f"-----END {label}-----\n".encode()


@functools.cache
def _rsa_key(name: str) -> rsa.RSAPrivateKey:
    """The one key of this process for "ark", or for "sev", which is ASK and ASVK alike."""
    del name
    return rsa.generate_private_key(65537, 4096)


def _with_zero_serial(der: bytes, key: rsa.RSAPrivateKey) -> bytes:
    """The certificate with serial number 0, which the library refuses to issue, signed again."""
    # Outer and inner header are four bytes each, the version five, and the serial number is 02 01 01.
    size = int.from_bytes(der[6:8]) + 4
    signed = der[4:15] + b"\x00" + der[16 : 4 + size]
    return der[:4] + signed + der[4 + size : -512] + key.sign(signed, _PSS, hashes.SHA384())


def _name(common_name: str) -> x509.Name:
    organisation = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "cloister SIMULATED, not AMD")
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"SIMULATED {common_name}"), organisation])


def _integer(value: int) -> bytes:
    # A byte with its top bit set would be read as a negative number.
    return bytes([2, 1, value]) if value < 0x80 else bytes([2, 2, 0, value])


def _ia5(text: str) -> bytes:
    return bytes([0x16, len(text)]) + text.encode()
