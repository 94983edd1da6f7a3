"""Certificates, revocation lists and signed JSON of the software Intel. Everything here says SIMULATED.

The layout is that of Intel's provisioning certification service, learned by parsing its public collateral:
root CA -> PCK CA -> PCK certificate with the SGX extension; root CA -> TCB signing -> TCB info and QE identity.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

# Certificates outlive any run; the collateral has Intel's usual 30 days and is issued anew by `refresh`.
CERTIFICATE_YEARS_D = 3650
COLLATERAL_D = 30
TCB_EVALUATION_NUMBER = 1
PCE_ID = bytes(2)
PCE_SVN = 1
CPU_SVN = bytes([1] * 8 + [0] * 8)
TEE_TCB_SVN = bytes([1, 1, 1] + [0] * 13)
QE_ATTRIBUTES = bytes.fromhex("1500000000000000e700000000000000")
QE_ATTRIBUTES_VALUE = "11000000000000000000000000000000"
QE_ATTRIBUTES_MASK = "FBFFFFFFFFFFFFFF0000000000000000"
QE_PROD_ID = 2
SGX_QE_PROD_ID = 1
QE_SVN = 1
QE_MR_SIGNER = hashlib.sha256(b"SIMULATED quoting enclave signer").digest()
QE_MR_ENCLAVE = hashlib.sha256(b"SIMULATED quoting enclave").digest()

_SGX_OID = (1, 2, 840, 113741, 1, 13, 1)


def issue_certificate(
    name: str,
    public_key: ec.EllipticCurvePublicKey,
    issuer_name: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    now: int,
    path_length: int | None,
    sgx_extension: bytes | None = None,
) -> x509.Certificate:
    """One certificate of the simulated hierarchy.

    Args:
        name, issuer_name: common names.
        public_key: the subject's.
        issuer_key: secret, of the issuer.
        now: Unix seconds; validity starts one day earlier.
        path_length: of a CA; None for an end entity.
        sgx_extension: DER of Intel's SGX extension, for the PCK certificate.
    """
    start = datetime.fromtimestamp(now, UTC) - timedelta(days=1)
    is_ca = path_length is not None
    usage = x509.KeyUsage(not is_ca, not is_ca, False, False, False, is_ca, is_ca, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer_name))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=CERTIFICATE_YEARS_D))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
        .add_extension(usage, True)
        .add_extension(x509.BasicConstraints(is_ca, path_length), True)
    )
    if sgx_extension is not None:
        oid = x509.ObjectIdentifier(".".join(map(str, _SGX_OID)))
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, sgx_extension), False)
    return builder.sign(issuer_key, hashes.SHA256())


def issue_crl(
    issuer_name: str, issuer_key: ec.EllipticCurvePrivateKey, *, now: int, revoked: tuple[int, ...] = ()
) -> bytes:
    """A DER revocation list that names the serial numbers in `revoked`."""
    issued = datetime.fromtimestamp(now, UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_name(issuer_name))
        .last_update(issued)
        .next_update(issued + timedelta(days=COLLATERAL_D))
        .add_extension(x509.CRLNumber(1), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def sgx_extension(*, ppid: bytes, fmspc: bytes, piid: bytes) -> bytes:
    """DER of the SGX extension of a PCK certificate: a plain multi-package platform, nothing dynamic.

    Args:
        ppid: 16 bytes, the platform's provisioning identity.
        fmspc: 6 bytes, which TCB info applies.
        piid: 16 bytes, the platform instance.
    """
    components = [_entry((2, i + 1), _der_integer(svn)) for i, svn in enumerate(CPU_SVN)]
    components.append(_entry((2, 17), _der_integer(PCE_SVN)))
    components.append(_entry((2, 18), _der(0x04, CPU_SVN)))
    flags = [_entry((7, i), _der(0x01, b"\x00")) for i in (1, 2, 3)]
    return _der(
        0x30,
        _entry((1,), _der(0x04, ppid))
        + _entry((2,), _der(0x30, b"".join(components)))
        + _entry((3,), _der(0x04, PCE_ID))
        + _entry((4,), _der(0x04, fmspc))
        + _entry((5,), _der(0x0A, b"\x01"))
        + _entry((6,), _der(0x04, piid))
        + _entry((7,), _der(0x30, b"".join(flags))),
    )


def tcb_info(
    *, fmspc: bytes, now: int, status: str = "UpToDate", advisories: tuple[str, ...] = (), tee: str = "tdx"
) -> str:
    """The JSON text of TCB info version 3 for TDX or SGX, with one level that the simulated platform meets."""
    tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn} for svn in CPU_SVN], "pcesvn": PCE_SVN}
    level: dict[str, Any] = {"tcb": tcb, "tcbDate": _rfc3339(now), "tcbStatus": status}
    if advisories:
        level["advisoryIDs"] = list(advisories)
    info: dict[str, Any] = {
        "id": tee.upper(),
        "version": 3,
        "issueDate": _rfc3339(now),
        "nextUpdate": _rfc3339(now + COLLATERAL_D * 86400),
        "fmspc": fmspc.hex().upper(),
        "pceId": PCE_ID.hex(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": TCB_EVALUATION_NUMBER,
        "tcbLevels": [level],
    }
    if tee == "sgx":
        return _compact(info)
    # The second TDX component is the module's major version: it is matched by tdxModuleIdentities.
    tcb["tdxtcbcomponents"] = [{"svn": 0 if i == 1 else svn} for i, svn in enumerate(TEE_TCB_SVN)]
    module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    module_level = {"tcb": {"isvsvn": 1}, "tcbDate": _rfc3339(now), "tcbStatus": "UpToDate"}
    identities = [{"id": "TDX_01", **module, "tcbLevels": [module_level]}]
    return _compact({**info, "tdxModule": module, "tdxModuleIdentities": identities})


def qe_identity(*, now: int, tee: str = "tdx") -> str:
    """The JSON text of the identity (version 2) of the simulated quoting enclave, for TDX or SGX."""
    return _compact(
        {
            "id": "TD_QE" if tee == "tdx" else "QE",
            "version": 2,
            "issueDate": _rfc3339(now),
            "nextUpdate": _rfc3339(now + COLLATERAL_D * 86400),
            "tcbEvaluationDataNumber": TCB_EVALUATION_NUMBER,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": QE_ATTRIBUTES_VALUE,
            "attributesMask": QE_ATTRIBUTES_MASK,
            "mrsigner": QE_MR_SIGNER.hex().upper(),
            "isvprodid": QE_PROD_ID if tee == "tdx" else SGX_QE_PROD_ID,
            "tcbLevels": [{"tcb": {"isvsvn": QE_SVN}, "tcbDate": _rfc3339(now), "tcbStatus": "UpToDate"}],
        }
    )


def sign_raw(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA P-256 with SHA-256, as the 64 bytes r || s that quotes and collateral use."""
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def public_xy(key: ec.EllipticCurvePublicKey) -> bytes:
    """The 64 bytes x || y of a P-256 public key."""
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return point[1:]


def pem(*certificates: x509.Certificate) -> str:
    """The certificates as one PEM text, in the order given."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates).decode()


def _name(common_name: str) -> x509.Name:
    organisation = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "cloister SIMULATED, not Intel")
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name), organisation])


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _rfc3339(now: int) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _entry(suffix: tuple[int, ...], value: bytes) -> bytes:
    return _der(0x30, _der_oid(_SGX_OID + suffix) + value)


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + content


def _der_integer(value: int) -> bytes:
    # One more bit than the value needs, so that a set top bit is not read as a sign.
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1))


def _der_oid(arcs: tuple[int, ...]) -> bytes:
    content = bytes([arcs[0] * 40 + arcs[1]])
    for arc in arcs[2:]:
        septets = [arc & 0x7F]
        while arc := arc >> 7:
            septets.append(0x80 | (arc & 0x7F))
        content += bytes(reversed(septets))
    return _der(0x06, content)
