"""Verifies NVIDIA Hopper attestation reports: types "gpu" and "simulated-gpu", by one code path under their own roots.

A report says nothing of the machine that the GPU sits in: it is only ever looked at as a part of "with-gpu" evidence.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from cloister.attest._certificates import PARSE_ERRORS
from cloister.attest._finding import Findings, Proven
from cloister.attest._policy import Policy
from cloister.attest._types import Claims
from cloister.attest._verifiers import gpu_report
from cloister.attest._verifiers.gpu_report import GpuReport, parse_report
from cloister.attest._verifiers.root import check_root
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence, enc

# SHA-256 of the DER of "NVIDIA Device Identity CA" (valid from 2021-11-05, without an end).
NVIDIA_ROOT_SHA256 = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"
GPU_TYPES = ("gpu", "simulated-gpu")
# The leaf's extension that names the firmware its key was made for (TCG DICE, "tcg-dice-CompositeDeviceID").
FWID_OID = "2.23.133.5.4.1"
# SEQUENCE {OID sha384, OCTET STRING (48 bytes)}, which ends that extension.
FWID_PREFIX = bytes.fromhex("303d06096086480165030402020430")
_NONCE_LABEL = b"cloister-gpu-nonce/v1"
# A real chain has five certificates: firmware, device, provisioner, product line, root. The shortest that still tells
# devices apart has three.
_MIN_CHAIN, _MAX_CHAIN = 3, 8
_MAX_CHAIN_BYTES = 64 << 10
_CRITICAL = (x509.BasicConstraints.oid, x509.KeyUsage.oid)
_CC_MODES = {gpu_report.STATUS_OFF: "on", gpu_report.STATUS_ON: "protected_pcie"}
_DETAILS = {
    "chip_sku": gpu_report.CHIP_SKU,
    "project": gpu_report.PROJECT,
    "project_sku": gpu_report.PROJECT_SKU,
}
_LIMITS = (
    "not proven: that the GPU's measurements are NVIDIA's (only those that the policy names; its RIM is not compared)",
    "not proven: that the GPU's confidential mode is on with developer tools off, beyond what the named measurements "
    "and the report's word on protected PCIe say",
    "not proven: that NVIDIA has not revoked the GPU's certificates (no revocation list comes along)",
    "not proven: that this GPU is the one attached to the CPU; its nonce only shows that the CPU's session asked it",
)
_SIMULATED_LIMITS = ("not proven: anything at all about a GPU; its root is SIMULATED",)


def gpu_nonce(report_data: bytes) -> bytes:
    """The nonce (32 bytes, public) that binds a GPU's report to the session of the CPU evidence over `report_data`."""
    return hashlib.sha256(enc(_NONCE_LABEL, report_data)).digest()


def verify_gpu(evidence: Evidence, policy: Policy, *, now: int) -> Proven:
    """Prove what a GPU's report states, under a root that the policy pins, and judge it by [gpu].

    Success means: the report was signed by a key that the device's boot code made for the firmware that the report
    names, and certified; that certificate and the chain up to the pinned root are valid at `now`. `report_data` of the
    claims is the report's nonce. The caller must still refuse when the result has findings, and compare the nonce.

    Args:
        evidence: `blob` is request and response, `aux` the certificates in PEM, leaf first, root last; untrusted.
        policy: this party's own.
        now: Unix seconds.

    Raises:
        MalformedEvidenceError: report or certificates do not parse.
        PolicyRejectedError: the root is not pinned or not allowed.
        StaleEvidenceError: a certificate has expired, or is not yet valid.
        EvidenceSignatureError: a signature, the chain or the firmware id does not verify.
    """
    report = parse_report(evidence.blob)
    chain = _parse_chain(evidence.aux)
    root_sha256 = hashlib.sha256(chain[-1].public_bytes(serialization.Encoding.DER)).hexdigest()
    simulated = root_sha256 != NVIDIA_ROOT_SHA256
    root = check_root(
        evidence.type,
        root_sha256,
        policy,
        vendor="NVIDIA",
        genuine=(NVIDIA_ROOT_SHA256,),
        pinned=policy.nvidia_sha256,
        key="nvidia_sha256",
        real=("gpu",),
        software=("simulated-gpu",),
    )
    findings = Findings([f"gpu: {root}"])
    try:
        _check_validity(chain, now)
        _check_chain(chain)
        _check_report(report, chain[0])
    except PARSE_ERRORS:
        # Certificates are parsed lazily: a field that does not parse shows up only here.
        raise MalformedEvidenceError("a certificate of the GPU does not parse") from None
    findings.passed.append("gpu: report and certificates verify under that root")
    claims = _claims(evidence.type, report, chain, root_sha256)
    _check_policy(claims, policy, findings)
    return Proven(claims, findings, _SIMULATED_LIMITS if simulated else _LIMITS)


def _parse_chain(aux: bytes) -> list[x509.Certificate]:
    if not aux:
        raise MalformedEvidenceError("the GPU's certificates are missing", hint="the attester must send them along")
    if len(aux) > _MAX_CHAIN_BYTES:
        raise MalformedEvidenceError(f"the GPU's certificates are over the limit of {_MAX_CHAIN_BYTES} bytes")
    try:
        chain = x509.load_pem_x509_certificates(aux)
    except PARSE_ERRORS:
        raise MalformedEvidenceError("the GPU's certificates do not parse") from None
    if not _MIN_CHAIN <= len(chain) <= _MAX_CHAIN:
        text = f"the GPU's chain has {len(chain)} certificates, not {_MIN_CHAIN} to {_MAX_CHAIN}"
        raise MalformedEvidenceError(text)
    return chain


def _check_validity(chain: list[x509.Certificate], now: int) -> None:
    # NVIDIA's certificates end in the year 9999, which a datetime holds and a 32-bit time does not.
    at = datetime.fromtimestamp(now, UTC)
    for certificate in chain:
        if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
            raise StaleEvidenceError("a certificate of the GPU has expired or is not valid yet")


def _check_chain(chain: list[x509.Certificate]) -> None:
    """Each certificate is signed by the next, the last by itself; only those that may sign do, with ECDSA P-384.

    Raises:
        EvidenceSignatureError: it is no such chain.
        PARSE_ERRORS: a certificate does not parse.
    """
    for below, (subject, issuer) in enumerate(zip(chain, [*chain[1:], chain[-1]], strict=True)):
        _check_key(subject)
        _check_critical(subject)
        if not isinstance(subject.signature_hash_algorithm, hashes.SHA384):
            raise EvidenceSignatureError("a certificate of the GPU is not signed with ECDSA and SHA-384")
        if below:
            _check_authority(subject, below - 1)
        if subject.issuer != issuer.subject:
            raise EvidenceSignatureError("the GPU's certificates are no chain: an issuer is missing")
        try:
            subject.verify_directly_issued_by(issuer)
        except InvalidSignature:
            raise EvidenceSignatureError("the signature of a certificate of the GPU does not verify") from None
    if _authority(chain[0])[0] or not _usage(chain[0]).digital_signature:
        raise EvidenceSignatureError("the GPU's report is signed with a key that is not for signing reports")


def _check_key(certificate: x509.Certificate) -> None:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceSignatureError("a certificate of the GPU has no P-384 key")


def _check_authority(certificate: x509.Certificate, authorities_below: int) -> None:
    is_authority, path_length = _authority(certificate)
    if not is_authority or (path_length is not None and authorities_below > path_length):
        raise EvidenceSignatureError("the GPU's chain has an issuer that may not issue")
    if not _usage(certificate).key_cert_sign:
        raise EvidenceSignatureError("the GPU's chain has an issuer whose key may not sign certificates")


def _check_critical(certificate: x509.Certificate) -> None:
    """RFC 5280 section 4.2: a critical extension that the verifier does not know refuses the certificate."""
    unknown = [e for e in certificate.extensions if e.critical and e.oid not in _CRITICAL]
    if unknown:
        raise EvidenceSignatureError("a certificate of the GPU has a critical extension that is not known")


def _usage(certificate: x509.Certificate) -> x509.KeyUsage:
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise EvidenceSignatureError("a certificate of the GPU does not say what its key is for") from None


def _authority(certificate: x509.Certificate) -> tuple[bool, int | None]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return False, None
    return found.ca, found.path_length


def _check_report(report: GpuReport, leaf: x509.Certificate) -> None:
    """The leaf's key signed the report, and the firmware that it was certified for is the one that the report names."""
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - `_check_chain` refused every other key
    half = gpu_report.SIGNATURE_BYTES // 2
    r, s = (int.from_bytes(part) for part in (report.signature[:half], report.signature[half:]))
    try:
        key.verify(utils.encode_dss_signature(r, s), report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise EvidenceSignatureError("the signature of the GPU's report does not verify") from None
    fwid = report.fields.get(gpu_report.FWID, b"")
    if len(fwid) != gpu_report.DIGEST_BYTES:
        raise MalformedEvidenceError("the GPU's report does not name its firmware")
    try:
        extension = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier(FWID_OID)).value
    except x509.ExtensionNotFound:
        raise EvidenceSignatureError("the GPU's certificate does not name the firmware it is for") from None
    if not extension.public_bytes().endswith(FWID_PREFIX + fwid):
        raise EvidenceSignatureError("the GPU's certificate was issued for other firmware than the report names")


def _claims(declared: str, report: GpuReport, chain: list[x509.Certificate], root_sha256: str) -> Claims:
    # The firmware's certificate changes with the firmware; the one above it is the device's own.
    device = (
        chain[1].public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    texts = {name: report.text(field) for name, field in _DETAILS.items()}
    return Claims(
        tee="gpu",
        evidence_type=declared,
        simulated=root_sha256 != NVIDIA_ROOT_SHA256,
        root_sha256=root_sha256,
        measurements={str(index): value.hex() for index, value in sorted(report.measurements.items())},
        debug=False,
        report_data=report.nonce,
        platform_id=hashlib.sha256(device).hexdigest(),
        collateral_issued=int(max(c.not_valid_before_utc for c in chain).timestamp()),
        collateral_expires=int(min(c.not_valid_after_utc for c in chain).timestamp()),
        details={
            "driver": report.text(gpu_report.DRIVER),
            "vbios": report.vbios,
            "cc_mode": _CC_MODES.get(report.fields.get(gpu_report.PROTECTED_PCIE, b""), ""),
            "fwid": report.fields[gpu_report.FWID].hex(),
            "board_id": report.fields.get(gpu_report.BOARD_ID, b"").hex(),
            "gpu_info": report.fields.get(gpu_report.GPU_INFO, b"").hex(),
            "feature_flag": report.fields.get(gpu_report.FEATURE_FLAG, b"").hex(),
            **texts,
        },
    )


def _check_policy(claims: Claims, policy: Policy, findings: Findings) -> None:
    rules = policy.gpu
    vbios = tuple(version.lower() for version in rules.vbios)
    for name, allowed in (("driver", rules.drivers), ("vbios", vbios), ("cc_mode", rules.cc_modes)):
        value = claims.details[name]
        findings.check(
            value != "" and value in allowed,
            f"gpu: {name} {value} is allowed",
            f"gpu: {name} is {value or 'not stated'}, the policy allows {', '.join(allowed) or 'nothing'}",
        )
    for index, values in rules.measurements.items():
        value = claims.measurements.get(index, "missing")
        findings.check(
            value in values,
            f"gpu: measurement {index} is a reference value",
            f"gpu: measurement {index} is {value}, which is not a reference value",
            MeasurementMismatchError if values else PolicyRejectedError,
        )
