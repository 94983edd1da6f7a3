"""Takes apart the certificates that come along with an SNP report. Untrusted; nothing is parsed deeper than its frame.

Two forms, told apart by their first bytes:

- PEM: the VCEK or VLEK certificate, the ASK or ASVK that signed it, the ARK, and optionally one X509 CRL of the ARK;
  in this order and nothing else.
- The certificate table of AMD publication 56421 (GHCB), as the kernel's `auxblob` hands it on: entries of 24 bytes
  (GUID, offset, length), ended by one of zeros, then the certificates, each DER or PEM. The ASVK has the ASK's GUID.
"""

from __future__ import annotations

import base64
import re
import uuid
from dataclasses import dataclass, field

from cloister.errors import MalformedEvidenceError

# The kernel takes at most 16 KiB from the host (SEV_FW_BLOB_MAX_SIZE); PEM of the same is a third longer.
MAX_AUX_BYTES = 64 << 10
MAX_ITEM_BYTES = 16 << 10
_MAX_ENTRIES = 16
_ENTRY_BYTES = 24

_GUIDS = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes: "vcek",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1").bytes: "vlek",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782").bytes: "ask",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae").bytes: "ark",
    uuid.UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea").bytes: "crl",
}
_BEGIN = b"-----BEGIN "
_PEM = re.compile(rb"-----BEGIN (CERTIFICATE|X509 CRL)-----\s+([A-Za-z0-9+/=\s]+)-----END \1-----\s*")
_NAMES = {
    "vcek": "the VCEK certificate",
    "vlek": "the VLEK certificate",
    "ask": "the certificate of the signing key (ASK or ASVK)",
    "ark": "the root certificate (ARK)",
    "crl": "the revocation list",
}


@dataclass(frozen=True)
class SnpCollateral:
    """What came along, in DER; none of it parsed.

    Attributes:
        leaf: the certificate of the key that signed the report, as the sender says.
        issuer: of the key that signed `leaf`: ASK or ASVK.
        ark: the candidate root.
        crl: the ARK's revocation list, empty where none came.
    """

    leaf: bytes = field(repr=False)
    issuer: bytes = field(repr=False)
    ark: bytes = field(repr=False)
    crl: bytes = field(repr=False, default=b"")


def parse_aux(aux: bytes, signer: str) -> SnpCollateral:
    """The certificates for a report that says it was signed by `signer` ("vcek" or "vlek").

    Raises:
        MalformedEvidenceError: neither form, over a limit, or a certificate is missing.
    """
    if not aux:
        raise MalformedEvidenceError("the SNP certificates are missing", hint="the attester must send them along")
    if len(aux) > MAX_AUX_BYTES:
        raise MalformedEvidenceError(f"the SNP certificates are {len(aux)} bytes, more than {MAX_AUX_BYTES}")
    found = _parse_pem(aux, signer) if aux.startswith(_BEGIN) else _parse_table(aux)
    for name in (signer, "ask", "ark"):
        if name not in found:
            raise MalformedEvidenceError(
                f"{_NAMES[name]} is missing", hint="send VCEK or VLEK, ASK or ASVK, and ARK along with the report"
            )
    return SnpCollateral(found[signer], found["ask"], found["ark"], found.get("crl", b""))


def _parse_pem(aux: bytes, signer: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, (label, der) in zip((signer, "ask", "ark", "crl"), items := _pem_items(aux), strict=False):
        if label != _label(name):
            raise MalformedEvidenceError(f"{_NAMES[name]} is not where it belongs in the SNP certificate chain")
        found[name] = der
    if len(items) > len(found):
        # One item too many would have to be ignored, and this form ignores nothing.
        raise MalformedEvidenceError(f"the SNP certificate chain has {len(items)} items")
    return found


def _parse_table(aux: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for guid, start, length in _entries(aux):
        name = _GUIDS.get(guid)
        if name is None:
            continue  # hosts may add entries of their own
        if name in found:
            raise MalformedEvidenceError("the SNP certificate table names an entry twice")
        if not 0 < length <= MAX_ITEM_BYTES or start + length > len(aux):
            raise MalformedEvidenceError("an entry of the SNP certificate table is empty, too long or outside of it")
        item = aux[start : start + length]
        if item.startswith(_BEGIN):
            items = _pem_items(item)
            if len(items) != 1 or items[0][0] != _label(name):
                raise MalformedEvidenceError(f"{_NAMES[name]} is not one PEM item")
            item = items[0][1]
        found[name] = item
    return found


def _entries(aux: bytes) -> list[tuple[bytes, int, int]]:
    """GUID, offset and length of each entry up to the one of zeros."""
    entries: list[tuple[bytes, int, int]] = []
    for at in range(0, (_MAX_ENTRIES + 1) * _ENTRY_BYTES, _ENTRY_BYTES):
        entry = aux[at : at + _ENTRY_BYTES]
        if len(entry) < _ENTRY_BYTES:
            break
        if not any(entry):
            return entries
        entries.append((entry[:16], int.from_bytes(entry[16:20], "little"), int.from_bytes(entry[20:24], "little")))
    raise MalformedEvidenceError(f"the SNP certificate table does not end within {_MAX_ENTRIES} entries")


def _pem_items(text: bytes) -> list[tuple[bytes, bytes]]:
    """Label and DER of each item. The library's reader would also parse the certificates, which comes later."""
    items: list[tuple[bytes, bytes]] = []
    at = 0
    while at < len(text):
        if (match := _PEM.match(text, at)) is None:
            raise MalformedEvidenceError("the SNP certificates are not PEM")
        try:
            items.append((match[1], base64.b64decode(b"".join(match[2].split()), validate=True)))
        except ValueError:
            raise MalformedEvidenceError("the SNP certificates are not PEM") from None
        at = match.end()
    return items


def _label(name: str) -> bytes:
    return b"X509 CRL" if name == "crl" else b"CERTIFICATE"
