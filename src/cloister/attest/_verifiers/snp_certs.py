"""AMD's certificates for SNP: ARK, the ASK or ASVK that it signed, and the VCEK or VLEK that signs reports.

Formats: AMD publication 57230, "Versioned Chip Endorsement Key Certificate and KDS Interface Specification", and its
VLEK counterpart. Every signature is RSA-PSS with SHA-384 under a key of 4096 bits, every VCEK and VLEK is P-384.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attest._certificates import PARSE_ERRORS
from cloister.attest._policy_rules import SNP_PRODUCTS
from cloister.attest._verifiers.dcap import utc
from cloister.attest._verifiers.snp_aux import SnpCollateral
from cloister.attest._verifiers.snp_report import CHIP_ID_BYTES, SnpReport, tcb_parts
from cloister.errors import EvidenceSignatureError, MalformedEvidenceError, StaleEvidenceError

AMD_OID = "1.3.6.1.4.1.3704.1"
SIMULATED_PREFIX = "SIMULATED "
_PRODUCT_NAME, _HW_ID, _CSP_ID = f"{AMD_OID}.2", f"{AMD_OID}.4", f"{AMD_OID}.5"
_LEVELS = {
    "bootloader": f"{AMD_OID}.3.1",
    "tee": f"{AMD_OID}.3.2",
    "snp": f"{AMD_OID}.3.3",
    "microcode": f"{AMD_OID}.3.8",
    "fmc": f"{AMD_OID}.3.9",
}
_RSA_BITS = 4096
_PSS = padding.PSS(padding.MGF1(SHA384()), 48)
_IA5_STRING, _OCTET_STRING = 0x16, 0x04
_TURIN_ID_BYTES = 8

# How a certificate of up to 64 KiB starts when its serial number is 0: two lengths of two bytes, version 3, integer 0.
_ZERO_SERIAL = bytes.fromhex("a003020102020100")
_ZERO_SERIAL_AT = 8


@dataclass(frozen=True)
class Certificate:
    """What is used of a certificate, all of it parsed once.

    Attributes:
        what: how messages call it.
        subject, issuer: distinguished names.
        common_name: of the subject, without the mark of a simulated one.
        not_before, not_after: Unix seconds.
        serial: 0 for most VCEKs and VLEKs.
        key: the public key.
        is_ca: whether it may sign certificates.
        extensions: OID -> DER of AMD's own extensions.
        signed, signature: the bytes under the signature as they came, and the signature.
    """

    what: str
    subject: x509.Name
    issuer: x509.Name
    common_name: str
    not_before: float
    not_after: float
    serial: int
    key: object
    is_ca: bool
    extensions: Mapping[str, bytes]
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class SnpChain:
    """A chain that verified.

    Attributes:
        issued: Unix seconds, of the VCEK or VLEK certificate or the revocation list, whichever is older.
        expires: Unix seconds, when the first of all parts expires.
        csp_id: who leased a VLEK, by the certificate; empty for a VCEK.
        has_crl: whether a revocation list came along.
    """

    issued: int
    expires: int
    csp_id: str
    has_crl: bool


def load_certificate(der: bytes, what: str) -> Certificate:
    """Parse a certificate; nothing is proven.

    Raises:
        MalformedEvidenceError: it does not parse.
    """
    at = _ZERO_SERIAL_AT
    zero_serial = der[at : at + len(_ZERO_SERIAL)] == _ZERO_SERIAL
    parsed = der
    if zero_serial:
        # Real VCEKs have the serial number 0, which RFC 5280 forbids and later releases of the library refuse. So it
        # parses a copy with another number; the signature is checked over the bytes as they came.
        last = at + len(_ZERO_SERIAL) - 1
        parsed = der[:last] + b"\x01" + der[last + 1 :]
    try:
        certificate = x509.load_der_x509_certificate(parsed)
        extensions = {e.oid.dotted_string: e.value for e in certificate.extensions}
        basic = extensions.get(x509.BasicConstraints.oid.dotted_string)
        usage = extensions.get(x509.KeyUsage.oid.dotted_string)
        return Certificate(
            what=what,
            subject=certificate.subject,
            issuer=certificate.issuer,
            common_name=_common_name(certificate.subject),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
            serial=0 if zero_serial else certificate.serial_number,
            key=certificate.public_key(),
            is_ca=isinstance(basic, x509.BasicConstraints)
            and basic.ca
            and isinstance(usage, x509.KeyUsage)
            and usage.key_cert_sign,
            extensions={o: v.value for o, v in extensions.items() if isinstance(v, x509.UnrecognizedExtension)},
            signed=_signed_part(der),
            signature=certificate.signature,
        )
    except PARSE_ERRORS:
        raise MalformedEvidenceError(f"the {what} certificate does not parse") from None


def product_of(leaf: Certificate) -> str:
    """The product by the certificate's productName, "Milan-B0" or "Milan" say, in lower case.

    Raises:
        MalformedEvidenceError: the extension is missing or names no product that this release knows.
    """
    name = _ia5(leaf, _PRODUCT_NAME).partition("-")[0].lower()
    if name not in SNP_PRODUCTS:
        raise MalformedEvidenceError(f"the {leaf.what} certificate is of an unknown product")
    return name


def verify_chain(
    leaf: Certificate, collateral: SnpCollateral, report: SnpReport, product: str, *, now: int, skew_s: int
) -> SnpChain:
    """Prove that the pinned ARK vouches for `leaf`, and `leaf` for this chip and its reported TCB.

    Success means: names, signatures, validity and (where a list came along) revocation hold from the ARK down to
    `leaf`, which is of the kind that the report names, of `product`, and of the report's chip and TCB. The caller must
    have compared the ARK with a pin, and must still verify the report's signature.

    Raises:
        MalformedEvidenceError: a certificate or list does not parse.
        EvidenceSignatureError: a signature, name or binding does not hold, or a certificate is revoked.
        StaleEvidenceError: something has expired or is from the future.
    """
    ark = load_certificate(collateral.ark, "ARK")
    issuer = load_certificate(collateral.issuer, "ASK" if report.signer == "vcek" else "ASVK")
    _check_names(leaf, issuer, ark, report.signer, product)
    _check_signature(ark, ark)
    _check_signature(issuer, ark)
    _check_signature(leaf, issuer)
    for certificate in (ark, issuer, leaf):
        what = f"{certificate.what} certificate"
        _check_dates(what, certificate.not_before, certificate.not_after, now=now, skew_s=skew_s)
    dates = [(leaf.not_before, min(c.not_after for c in (ark, issuer, leaf)))]
    if collateral.crl:
        dates.append(_check_crl(collateral.crl, ark, (issuer, leaf), now=now, skew_s=skew_s))
    csp_id = _check_binding(leaf, report, product)
    issued, expires = (int(min(times)) for times in zip(*dates, strict=True))
    return SnpChain(issued, expires, csp_id, bool(collateral.crl))


def verify_signature(report_bytes: bytes, r: int, s: int, leaf: Certificate) -> None:
    """Prove that the key of `leaf` signed the report: ECDSA P-384 with SHA-384.

    Raises:
        EvidenceSignatureError: it did not, or it is no P-384 key.
    """
    if not isinstance(leaf.key, ec.EllipticCurvePublicKey) or not isinstance(leaf.key.curve, ec.SECP384R1):
        raise EvidenceSignatureError(f"the key of the {leaf.what} certificate is not of P-384")
    try:
        leaf.key.verify(encode_dss_signature(r, s), report_bytes, ec.ECDSA(SHA384()))
    except InvalidSignature:
        raise EvidenceSignatureError(f"the signature of the SNP report does not verify under the {leaf.what}") from None


def _check_names(leaf: Certificate, issuer: Certificate, ark: Certificate, signer: str, product: str) -> None:
    """Each is what it is used as: an ARK of Genoa must not vouch for a Milan, nor an ASK for a VLEK."""
    title = product.capitalize()
    expected = (
        (leaf, f"SEV-{signer.upper()}"),
        (issuer, f"SEV-{title}" if signer == "vcek" else f"SEV-VLEK-{title}"),
        (ark, f"ARK-{title}"),
    )
    for certificate, name in expected:
        if certificate.common_name != name:
            raise EvidenceSignatureError(f"the {certificate.what} certificate is of another product or key, not {name}")
    for certificate, above in ((leaf, issuer), (issuer, ark), (ark, ark)):
        if certificate.issuer != above.subject:
            raise EvidenceSignatureError(f"the {certificate.what} certificate does not name the {above.what} as issuer")
    for certificate in (issuer, ark):
        if not certificate.is_ca:
            raise EvidenceSignatureError(f"the {certificate.what} certificate must not sign certificates")


def _check_signature(certificate: Certificate, above: Certificate) -> None:
    text = f"the {certificate.what} certificate is not signed by the {above.what}"
    _verify_rsa(above, certificate.signature, certificate.signed, text)


def _verify_rsa(above: Certificate, signature: bytes, signed: bytes, text: str) -> None:
    if not isinstance(above.key, rsa.RSAPublicKey) or above.key.key_size != _RSA_BITS:
        raise EvidenceSignatureError(f"the key of the {above.what} certificate is not RSA of {_RSA_BITS} bits")
    try:
        above.key.verify(signature, signed, _PSS, SHA384())
    except InvalidSignature:
        raise EvidenceSignatureError(text) from None


def _check_dates(what: str, start: float, end: float, *, now: int, skew_s: int) -> None:
    if now > end:
        raise StaleEvidenceError(f"the {what} expired {utc(int(end))}")
    if now + skew_s < start:
        raise StaleEvidenceError(f"the {what} is not valid before {utc(int(start))}")


def _check_crl(
    der: bytes, ark: Certificate, certificates: tuple[Certificate, ...], *, now: int, skew_s: int
) -> tuple[float, float]:
    """When the list was issued and when it expires."""
    try:
        crl = x509.load_der_x509_crl(der)
        issued, next_update = crl.last_update_utc.timestamp(), crl.next_update_utc
        expires = next_update.timestamp() if next_update else issued
        revoked = {entry.serial_number for entry in crl}
        issuer, signature, signed = crl.issuer, crl.signature, _signed_part(der)
    except PARSE_ERRORS:
        raise MalformedEvidenceError("the revocation list does not parse") from None
    if issuer != ark.subject:
        raise EvidenceSignatureError("the revocation list is of another root")
    _verify_rsa(ark, signature, signed, "the revocation list is not signed by the ARK")
    _check_dates("revocation list", issued, expires, now=now, skew_s=skew_s)
    for certificate in certificates:
        # A VCEK's number 0 names no certificate in particular.
        if certificate.serial and certificate.serial in revoked:
            raise EvidenceSignatureError(f"the {certificate.what} certificate is revoked")
    return issued, expires


def _check_binding(leaf: Certificate, report: SnpReport, product: str) -> str:
    """The certificate is of the chip and the TCB that the report states; returns who leased a VLEK."""
    csp_id = ""
    if report.signer == "vcek":
        sizes = (CHIP_ID_BYTES, _TURIN_ID_BYTES) if product == "turin" else (CHIP_ID_BYTES,)
        if _hw_id(leaf, sizes).ljust(CHIP_ID_BYTES, b"\0") != report.chip_id:
            raise EvidenceSignatureError("the VCEK certificate is of another chip than the report, or it is masked")
    else:
        csp_id = _ia5(leaf, _CSP_ID)
    for part, level in tcb_parts(report.tcb["reported"], product).items():
        certified = _level(leaf, part)
        if certified != level:
            text = f"the {leaf.what} certificate is of {part} {certified}, the report's TCB of {level}"
            raise EvidenceSignatureError(text)
    return csp_id


def _extension(leaf: Certificate, oid: str) -> bytes:
    value = leaf.extensions.get(oid)
    if value is None:
        raise MalformedEvidenceError(f"the {leaf.what} certificate has no extension {oid}")
    return value


def _ia5(leaf: Certificate, oid: str) -> str:
    value = _extension(leaf, oid)
    text = value[2:].decode("ascii", "replace")
    if value[:2] != bytes([_IA5_STRING, len(text) & 0x7F]) or not text.isascii() or not text.isprintable():
        raise MalformedEvidenceError(f"extension {oid} of the {leaf.what} certificate is no text")
    return text


def _level(leaf: Certificate, part: str) -> int:
    """A DER INTEGER from 0 to 255 in its only encoding."""
    value = _extension(leaf, _LEVELS[part])
    level = value[-1] if value else 0
    if value != (b"\x02\x01" if level < 0x80 else b"\x02\x02\x00") + bytes([level]):
        raise MalformedEvidenceError(f"the {part} level of the {leaf.what} certificate is no number up to 255")
    return level


def _hw_id(leaf: Certificate, sizes: tuple[int, ...]) -> bytes:
    """The chip's id: older certificates have the bytes alone, newer ones an OCTET STRING of them."""
    value = _extension(leaf, _HW_ID)
    for size in sizes:
        if len(value) == size:
            return value
        if len(value) == size + 2 and value[:2] == bytes([_OCTET_STRING, size]):
            return value[2:]
    raise MalformedEvidenceError(f"the chip id of the {leaf.what} certificate has another length")


def _common_name(name: x509.Name) -> str:
    values = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(values[0].value).removeprefix(SIMULATED_PREFIX) if len(values) == 1 else ""


def _signed_part(der: bytes) -> bytes:
    """The first element inside of a DER sequence that the library has parsed already, with its header, as it came."""
    start, _ = _content(der, 0)
    return der[start : _content(der, start)[1]]


def _content(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the element at `at` starts and ends."""
    size = der[at + 1]
    start = at + 2 + (size & 0x7F if size >= 0x80 else 0)
    return start, start + (int.from_bytes(der[at + 2 : start]) if size >= 0x80 else size)
