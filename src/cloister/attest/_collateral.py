"""What a verifier needs beside a quote or report, and where the vendor publishes it.

Nothing in this package calls these functions: `cloister collateral fetch` does, and only when a person asks. What comes
back is untrusted until a verifier has checked it under a pinned root.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import dcap_qvl  # pyright: ignore[reportMissingTypeStubs]  # its stubs are on an inner module

from cloister.attest._verifiers.snp_report import parse_report, tcb_parts
from cloister.errors import AttestationError, CloisterError, ConfigError, MalformedEvidenceError
from cloister.wire import MAX_EVIDENCE_AUX_BYTES

INTEL_PCS_URL = "https://api.trustedservices.intel.com"
AMD_KDS_URL = "https://kdsintf.amd.com"
_QUERY_NAMES = {"fmc": "fmcSPL", "bootloader": "blSPL", "tee": "teeSPL", "snp": "snpSPL", "microcode": "ucodeSPL"}
_TURIN_ID_BYTES = 8
_URL = re.compile(r"https?://[^\s?#]+")


@dataclass(frozen=True)
class SnpCertificatePaths:
    """Where AMD's key distribution service has the certificates for one report, relative to its address. Public.

    Attributes:
        leaf: of the VCEK certificate, DER. It names the chip: whoever is asked learns which machine is verified.
        chain: of the PEM file with ASK and ARK.
    """

    leaf: str
    chain: str


def fetch_intel_collateral(quote: bytes, url: str, *, timeout_s: float) -> bytes:
    """Collateral for an SGX or TDX quote from Intel's service or a cache of it (PCCS), as JSON. GOES ONLINE.

    Args:
        quote: only the platform's model and certificate authority of it are sent.
        url: of the service, without the path.
        timeout_s: for the whole exchange.

    Raises:
        ConfigError: the address is none.
        MalformedEvidenceError: the quote does not parse, so nothing is asked.
        CloisterError: the service cannot be reached, or answers with something else.
    """
    import asyncio

    check_url(url)
    library: Any = dcap_qvl
    try:
        library.parse_quote(quote)
    except ValueError:
        raise MalformedEvidenceError("not an SGX or TDX quote, so there is nothing to ask for") from None

    async def fetch() -> Any:
        return await asyncio.wait_for(library.get_collateral(url.rstrip("/"), quote), timeout_s)

    try:
        collateral = asyncio.run(fetch())
        text = collateral.to_json().encode()
    except TimeoutError:
        raise CloisterError(
            f"{url} did not answer within {timeout_s:.0f} s", hint="ask again, or name a PCCS"
        ) from None
    except (ValueError, RuntimeError) as error:
        cause = str(error).removeprefix("Failed to get collateral: ").splitlines()[0][:200]
        raise CloisterError(
            f"the collateral could not be fetched: {cause}", hint="is the address right, and the network there?"
        ) from None
    if len(text) > MAX_EVIDENCE_AUX_BYTES:
        raise CloisterError(f"the answer of {url} is larger than {MAX_EVIDENCE_AUX_BYTES} bytes")
    return text


def snp_certificate_paths(report: bytes, *, product: str | None = None) -> SnpCertificatePaths:
    """What to ask AMD's service for (AMD publication 57230, section 4.1), from chip id and reported TCB of a report.

    Args:
        report: 1184 bytes.
        product: needed for a report of version 2, which does not say it.

    Raises:
        MalformedEvidenceError, EvidenceSignatureError: not a report.
        ConfigError: the product is not known.
        AttestationError: AMD has no certificate for this report: its host masks the chip, or a VLEK signed it.
    """
    parsed = parse_report(report)
    if parsed.signer != "vcek":
        raise AttestationError(
            "a VLEK signed this report, and only the cloud provider has its certificate",
            hint="the provider's host hands it to the guest, in the report's auxblob",
        )
    if not any(parsed.chip_id):
        raise AttestationError("the host masks the chip id, so AMD cannot be asked for the certificate")
    named = parsed.product or product
    if named is None:
        raise ConfigError("a report of version 2 does not say its product", hint="name it: milan, genoa or turin")
    if product is not None and product != named:
        raise ConfigError(f"the report is of a {named} processor, not of {product}")
    levels = tcb_parts(parsed.tcb["reported"], named)
    # Turin's ids are of 8 bytes, and the rest of the field is zero.
    chip = parsed.chip_id[:_TURIN_ID_BYTES] if named == "turin" else parsed.chip_id
    query = "&".join(f"{name}={levels[part]:02}" for part, name in _QUERY_NAMES.items() if part in levels)
    folder = f"vcek/v1/{named.capitalize()}"
    return SnpCertificatePaths(f"{folder}/{chip.hex()}?{query}", f"{folder}/cert_chain")


def check_url(url: str) -> None:
    """Refuse what is no address of a service.

    Raises:
        ConfigError: not an http or https address.
    """
    if not _URL.fullmatch(url):
        raise ConfigError(f"{url!r} is not the address of a service", hint="such as https://host:port")
