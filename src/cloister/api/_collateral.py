"""Fetches collateral and certificates: the only code of cloister that goes online, and only when a person asks."""

from __future__ import annotations

import base64
import textwrap
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloister.attest import AMD_KDS_URL, INTEL_PCS_URL, check_url, fetch_intel_collateral, snp_certificate_paths
from cloister.errors import CloisterError

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 60.0
_N_ISSUERS = 2  # ASK and ARK
_DER_SEQUENCE = b"\x30\x82"  # with a length of two bytes, as every certificate has
_MAX_ANSWER_BYTES = 64 << 10  # a VCEK certificate is 1.4 KB, a chain 5 KB


def fetch_for_quote(quote: bytes, *, url: str = INTEL_PCS_URL, timeout_s: float = TIMEOUT_S) -> bytes:
    """Collateral of an SGX or TDX quote, JSON. As `fetch_intel_collateral`."""
    return fetch_intel_collateral(quote, url, timeout_s=timeout_s)


def fetch_for_snp_report(
    report: bytes,
    *,
    product: str | None = None,
    url: str = AMD_KDS_URL,
    timeout_s: float = TIMEOUT_S,
    transport: httpx.BaseTransport | None = None,
) -> bytes:
    """VCEK, ASK and ARK of an SNP report in PEM, in this order: what a verifier takes as `aux`. GOES ONLINE.

    Args:
        report: its chip id and reported TCB are sent, so the service learns which machine is verified.
        product: needed where the report does not say it.
        url: of AMD's key distribution service, or a mirror of it.
        timeout_s: for each of two requests.
        transport: tests answer themselves.

    Raises:
        ConfigError, AttestationError: as `snp_certificate_paths`.
        CloisterError: the service cannot be reached, or answers with something else.
    """
    import httpx

    check_url(url)
    paths = snp_certificate_paths(report, product=product)
    with httpx.Client(timeout=timeout_s, transport=transport, follow_redirects=False) as client:
        leaf = _get(client, f"{url.rstrip('/')}/{paths.leaf}")
        chain = _get(client, f"{url.rstrip('/')}/{paths.chain}")
    try:
        issuers = [part.public_bytes(serialization.Encoding.DER) for part in x509.load_pem_x509_certificates(chain)]
    except (ValueError, x509.InvalidVersion):
        issuers = []
    # The leaf is taken as it came: its serial number is 0, which a parser may refuse. The verifier can read it.
    if len(issuers) != _N_ISSUERS or not leaf.startswith(_DER_SEQUENCE):
        raise CloisterError(f"the answer of {url} is not VCEK, ASK and ARK", hint="is it AMD's service?")
    return b"".join(_pem(der) for der in (leaf, *issuers))


def _get(client: httpx.Client, url: str) -> bytes:
    import httpx

    try:
        with client.stream("GET", url) as answer:
            if answer.status_code != httpx.codes.OK:
                hint = "AMD's service limits how often it may be asked" if answer.status_code == 429 else ""
                raise CloisterError(f"{url} answers with the status {answer.status_code}", hint=hint)
            body = bytearray()
            for part in answer.iter_bytes():
                body += part
                if len(body) > _MAX_ANSWER_BYTES:
                    raise CloisterError(f"the answer of {url} is larger than {_MAX_ANSWER_BYTES} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        cause = f"{type(error).__name__}: {error}".rstrip(": ")
        raise CloisterError(
            f"{url} cannot be reached ({cause})", hint="is the address right, and the network there?"
        ) from None
    return bytes(body)


def _pem(der: bytes) -> bytes:
    lines = textwrap.wrap(base64.b64encode(der).decode(), 64)
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""]).encode()
