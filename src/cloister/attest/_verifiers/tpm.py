"""TPM 2.0 quotes: strict parsing, the signature of the attestation key, PCR values and what the quote is bound to.

Structures and constants are those of the TCG's "TPM 2.0 Library, Part 2: Structures": TPMS_ATTEST, TPMT_SIGNATURE and
TPML_PCR_SELECTION. Only what an attester of ours produces is accepted: one selection, of the
SHA-256 bank, under an RSASSA or ECDSA P-256 key with SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cloister.attest._types import REPORT_DATA_BYTES
from cloister.errors import EvidenceSignatureError, MalformedEvidenceError, WireError
from cloister.wire import unpack

MAX_TPM_BYTES = 16 << 10
QUOTE_FIELDS = ("message", "pcrs", "report_data", "signature")
PCR_BYTES = 32

_GENERATED = 0xFF544347  # TPM_GENERATED_VALUE: the TPM made this itself, and signs nothing from outside that starts so
_ATTEST_QUOTE = 0x8018
_ALG_SHA256, _ALG_RSASSA, _ALG_ECDSA = 0x000B, 0x0014, 0x0018
_SELECT_BYTES = 3  # 24 PCRs, as on every PC client TPM
_MAX_MESSAGE_BYTES = 512
_MAX_NAME_BYTES = 66  # TPM2B_NAME: two bytes of algorithm and a SHA-512
_RSA_BITS = (2048, 3072, 4096)
_P256_BYTES = 32

AttestationKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Quote:
    """A parsed TPMS_ATTEST of type quote. Proves nothing before its signature is checked.

    Attributes:
        extra_data: what the caller of TPM2_Quote gave, at most 64 bytes.
        clock: milliseconds that the TPM was powered.
        reset_count, restart_count: times that the TPM was reset, and resumed.
        safe: False after a power loss, until the clock is ahead of every value it ever gave.
        firmware_version: as the TPM reports it.
        pcrs: selected PCRs, ascending.
        pcr_digest: SHA-256 of their values, in that order.
    """

    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int
    pcrs: tuple[int, ...]
    pcr_digest: bytes


@dataclass(frozen=True)
class QuoteProof:
    """What a verified quote states.

    Attributes:
        report_data: the 64 bytes that it is bound to.
        measurements: "pcr0" to "pcr23" -> hex, those that the quote selects.
        details: counters, firmware version and binding, as text.
    """

    report_data: bytes
    measurements: Mapping[str, str]
    details: Mapping[str, str]


def unpack_evidence(blob: bytes, kind: str, names: tuple[str, ...], *, max_bytes: int) -> dict[str, bytes]:
    """The fields of packed TPM evidence, exactly `names`, each of them bytes.

    Raises:
        MalformedEvidenceError: anything else.
    """
    try:
        body = unpack(blob, kind, max_bytes=max_bytes)
    except WireError as error:
        raise MalformedEvidenceError(f"TPM evidence does not parse: {error.cause}") from None
    if set(body) != set(names) or not all(isinstance(value, bytes) for value in body.values()):
        raise MalformedEvidenceError(f"TPM evidence does not have exactly the fields {', '.join(names)}")
    return body


def parse_quote(message: bytes) -> Quote:
    """Parse the bytes of a TPMS_ATTEST. Total.

    Raises:
        MalformedEvidenceError: not made by a TPM, not a quote, not of one SHA-256 selection, cut short or too long.
    """
    if len(message) > _MAX_MESSAGE_BYTES:
        raise MalformedEvidenceError(f"the TPM quote is longer than {_MAX_MESSAGE_BYTES} bytes")
    reader = _Reader(message)
    if reader.number(4) != _GENERATED:
        raise MalformedEvidenceError("the quote does not say that a TPM generated it")
    if reader.number(2) != _ATTEST_QUOTE:
        raise MalformedEvidenceError("the TPM's statement is not a quote")
    reader.sized(_MAX_NAME_BYTES, "qualifiedSigner")
    extra_data = reader.sized(REPORT_DATA_BYTES, "extraData")
    clock, reset_count, restart_count, safe, firmware = struct.unpack(">QIIBQ", reader.take(25))
    if safe > 1:
        raise MalformedEvidenceError("the TPM quote's clock flag is neither yes nor no")
    if reader.number(4) != 1 or reader.number(2) != _ALG_SHA256 or reader.number(1) != _SELECT_BYTES:
        raise MalformedEvidenceError("the TPM quote does not select from the SHA-256 bank alone")
    selected = int.from_bytes(reader.take(_SELECT_BYTES), "little")
    digest = reader.sized(PCR_BYTES, "pcrDigest")
    if len(digest) != PCR_BYTES:
        raise MalformedEvidenceError("the TPM quote's PCR digest is not a SHA-256")
    reader.finish("quote")
    pcrs = tuple(i for i in range(8 * _SELECT_BYTES) if selected >> i & 1)
    return Quote(extra_data, clock, reset_count, restart_count, bool(safe), firmware, pcrs, digest)


def load_attestation_key(der: bytes) -> AttestationKey:
    """The attestation key of a DER SubjectPublicKeyInfo. Says nothing about who holds it.

    Raises:
        MalformedEvidenceError: not a key, or one that `check_attestation_key` refuses.
    """
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise MalformedEvidenceError("the TPM's attestation key does not parse") from None
    return check_attestation_key(key)


def check_attestation_key(key: object) -> AttestationKey:
    """The key, where it is RSA of 2048, 3072 or 4096 bits, or ECDSA P-256.

    Raises:
        MalformedEvidenceError: another algorithm, or another size.
    """
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise MalformedEvidenceError("the TPM's attestation key is neither RSA of 2048, 3072 or 4096 bits nor ECDSA P-256")


def verify_quote(fields: Mapping[str, bytes], key: AttestationKey) -> QuoteProof:
    """Prove that a TPM holding `key` quoted the PCR values and the report data that came along.

    The report data is `extraData` itself; where the TPM takes fewer than 64 bytes there (50 or 34 without SHA-512, as
    on Azure), `extraData` is SHA-256 of the 64 bytes, which are then sent along.

    Success means that `key` signed a quote over exactly these PCR values and this report data. The caller must still
    know that `key` is one that a TPM keeps and uses for its own statements only (restricted), and that the TPM is the
    right one; compare registers and report data.

    Args:
        fields: `QUOTE_FIELDS`: TPMS_ATTEST; the values of the selected PCRs, ascending, without anything between; the
            64 bytes or nothing; TPMT_SIGNATURE or, for RSA, the bare signature.
        key: the attestation key.

    Raises:
        MalformedEvidenceError: quote, signature, PCR values or report data are of the wrong form.
        EvidenceSignatureError: the signature does not verify, or does not cover what came along.
    """
    quote = parse_quote(fields["message"])
    _check_signature(key, fields["signature"], fields["message"])
    values = fields["pcrs"]
    if len(values) != PCR_BYTES * len(quote.pcrs):
        raise MalformedEvidenceError(f"{len(values)} bytes of PCR values for {len(quote.pcrs)} selected PCRs")
    if not hmac.compare_digest(hashlib.sha256(values).digest(), quote.pcr_digest):
        raise EvidenceSignatureError("the PCR values are not those that the TPM quoted")
    split = [values[at : at + PCR_BYTES].hex() for at in range(0, len(values), PCR_BYTES)]
    return QuoteProof(
        report_data=_report_data(quote, fields["report_data"]),
        measurements={f"pcr{i}": value for i, value in zip(quote.pcrs, split, strict=True)},
        details={
            "binding": "SHA-256 in extraData" if fields["report_data"] else "extraData",
            "clock_ms": str(quote.clock),
            "clock_safe": "yes" if quote.safe else "no",
            "firmware_version": f"{quote.firmware_version:016x}",
            "reset_count": str(quote.reset_count),
            "restart_count": str(quote.restart_count),
        },
    )


def _report_data(quote: Quote, sent: bytes) -> bytes:
    if not sent:
        return quote.extra_data
    if len(sent) != REPORT_DATA_BYTES:
        raise MalformedEvidenceError(f"the TPM evidence's report_data is {len(sent)} bytes, not {REPORT_DATA_BYTES}")
    if not hmac.compare_digest(hashlib.sha256(sent).digest(), quote.extra_data):
        raise EvidenceSignatureError("the TPM quoted another report_data than the one that came along")
    return sent


def _check_signature(key: AttestationKey, signature: bytes, message: bytes) -> None:
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(_rsa_signature(signature, key.key_size // 8), message, padding.PKCS1v15(), hashes.SHA256())
        else:
            key.verify(_ecdsa_signature(signature), message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise EvidenceSignatureError("the TPM quote is not signed by its attestation key") from None


def _rsa_signature(blob: bytes, n_bytes: int) -> bytes:
    """The number inside of a TPMT_SIGNATURE; a bare one is as long as the modulus, and the structure never is."""
    if len(blob) == n_bytes:
        return blob
    reader = _signature_reader(blob, _ALG_RSASSA)
    signature = reader.sized(n_bytes, "signature")
    reader.finish("signature")
    return signature


def _ecdsa_signature(blob: bytes) -> bytes:
    reader = _signature_reader(blob, _ALG_ECDSA)
    r, s = (int.from_bytes(reader.sized(_P256_BYTES, name), "big") for name in ("signatureR", "signatureS"))
    reader.finish("signature")
    return encode_dss_signature(r, s)


def _signature_reader(blob: bytes, algorithm: int) -> _Reader:
    reader = _Reader(blob)
    if reader.number(2) != algorithm or reader.number(2) != _ALG_SHA256:
        raise MalformedEvidenceError("the TPM's signature is not of its key's algorithm with SHA-256")
    return reader


class _Reader:
    """Reads big-endian TPM structures; never past the end, and nothing may be left over."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        part = self._blob[self._at : self._at + count]
        if len(part) != count:
            raise MalformedEvidenceError("a TPM structure is cut short")
        self._at += count
        return part

    def number(self, count: int) -> int:
        """The next unsigned number of `count` bytes."""
        return int.from_bytes(self.take(count), "big")

    def sized(self, maximum: int, name: str) -> bytes:
        """The next TPM2B: its bytes behind a length of two bytes."""
        size = self.number(2)
        if size > maximum:
            raise MalformedEvidenceError(f"{name} of a TPM structure is {size} bytes, over the limit of {maximum}")
        return self.take(size)

    def finish(self, name: str) -> None:
        """Refuse what is left over."""
        if self._at != len(self._blob):
            raise MalformedEvidenceError(f"bytes are left over after the TPM's {name}")
