"""Byte-true SGX quotes of version 3 under the simulated root (Intel SGX ECDSA QuoteLib reference, appendix A.4).

Only tests use it: it plays the enclaves, honest and not, that the SGX verifier must tell apart.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attest._simulated import intel_pki as pki
from cloister.attest._simulated import tdquote
from cloister.attest._simulated.intel_root import PROVISION_KIND, SimulatedRoot
from cloister.errors import AttestationError
from cloister.wire import Evidence, unpack

SIMULATED_MR_ENCLAVE = hashlib.sha256(b"cloister SIMULATED mr_enclave").digest()
SIMULATED_MR_SIGNER = hashlib.sha256(b"cloister SIMULATED mr_signer").digest()
# INIT and MODE64BIT, then XFRM with x87, SSE, AVX and AVX-512, as of a release enclave.
RELEASE_ATTRIBUTES = bytes.fromhex("0500000000000000e700000000000000")
DEBUG_ATTRIBUTES = bytes.fromhex("0700000000000000e700000000000000")
_QUOTE_VERSION = 3
_TEE_TYPE_SGX = 0


@dataclass(frozen=True)
class SimulatedEnclave:
    """What an SGX enclave would report of itself. Public.

    Attributes:
        mr_enclave, mr_signer: 32 bytes each.
        prod_id, svn: 16-bit numbers that the signer gave.
        attributes: 16 bytes, flags and XFRM.
    """

    mr_enclave: bytes = SIMULATED_MR_ENCLAVE
    mr_signer: bytes = SIMULATED_MR_SIGNER
    prod_id: int = 1
    svn: int = 1
    attributes: bytes = RELEASE_ATTRIBUTES


def sgx_evidence(
    root: SimulatedRoot, enclave: SimulatedEnclave, *, report_data: bytes, declared: str = "simulated-sgx"
) -> Evidence:
    """A fresh quote of `enclave` on the simulated platform of `root`, with the SGX collateral last issued.

    Args:
        root: after `refresh(now, tee="sgx")`.
        enclave: what the report states.
        report_data: 64 bytes, public.
        declared: the evidence's type; tests declare wrong ones.

    Raises:
        AttestationError: `report_data` is not 64 bytes, or the root has no SGX collateral.
    """
    if len(report_data) != tdquote.REPORT_DATA_BYTES:
        raise AttestationError(f"report_data is {len(report_data)} bytes, not {tdquote.REPORT_DATA_BYTES}")
    secrets = unpack(root.provision(tee="sgx"), PROVISION_KIND)
    key = serialization.load_der_private_key(secrets["attestation_key"], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 - the root made it
    report = tdquote.qe_report_bytes(
        cpu_svn=pki.CPU_SVN,
        attributes=enclave.attributes,
        mr_enclave=enclave.mr_enclave,
        mr_signer=enclave.mr_signer,
        prod_id=enclave.prod_id,
        svn=enclave.svn,
        report_data=report_data,
    )
    signed_part = _header(secrets["qe_id"]) + report
    blob = signed_part + _signature_data(
        signature=pki.sign_raw(key, signed_part),
        attestation_key=pki.public_xy(key.public_key()),
        secrets=secrets,
    )
    return Evidence(declared, blob, secrets["collateral"])


def _header(qe_id: bytes) -> bytes:
    return struct.pack(
        "<HHIHH16s16s4s",
        _QUOTE_VERSION,
        tdquote.ATTESTATION_KEY_ECDSA_P256,
        _TEE_TYPE_SGX,
        pki.QE_SVN,
        pki.PCE_SVN,
        tdquote.QE_VENDOR_ID,
        qe_id,
        b"",
    )


def _signature_data(*, signature: bytes, attestation_key: bytes, secrets: dict[str, bytes]) -> bytes:
    """What follows the signed part. Version 3 has no wrapper around the quoting enclave's report, version 4 has."""
    auth, chain = secrets["qe_auth_data"], secrets["pck_chain"]
    data = (
        signature
        + attestation_key
        + secrets["qe_report"]
        + secrets["qe_report_signature"]
        + struct.pack("<H", len(auth))
        + auth
        + struct.pack("<HI", tdquote.CERTIFICATION_PCK_CHAIN, len(chain))
        + chain
    )
    return struct.pack("<I", len(data)) + data
