"""The bytes of an Intel TDX quote of version 4 (Intel TDX DCAP Quoting Library API, appendix A.3).

Only the simulated attester builds quotes. Quotes from outside are parsed by `dcap_qvl`, never by this module.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

QUOTE_VERSION = 4
ATTESTATION_KEY_ECDSA_P256 = 2
TEE_TYPE_TDX = 0x81
# The vendor id of Intel's quoting enclave. The quote format has it as a constant, and verifiers insist on it.
QE_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CERTIFICATION_QE_REPORT = 6
CERTIFICATION_PCK_CHAIN = 5
HEADER_BYTES = 48
TD_REPORT_BYTES = 584
QE_REPORT_BYTES = 384
REGISTER_BYTES = 48
REPORT_DATA_BYTES = 64


@dataclass(frozen=True)
class TdReport:
    """The signed body of a TDX 1.0 quote. Every field is public.

    Attributes:
        tee_tcb_svn: 16 bytes, security versions of the TDX module.
        mr_seam, mr_signer_seam: 48 bytes each, the module and its signer (zero for Intel's own).
        seam_attributes, td_attributes, xfam: 8 bytes each.
        mr_td: 48 bytes, the initial contents of the trust domain.
        mr_config_id, mr_owner, mr_owner_config: 48 bytes each, set by whoever starts the domain.
        rtmr0, rtmr1, rtmr2, rtmr3: 48 bytes each, the run-time registers.
        report_data: 64 bytes that the attester chose.
    """

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    report_data: bytes

    def to_bytes(self) -> bytes:
        """The 584 bytes of the report body, in the order of the fields."""
        return struct.pack(
            "16s48s48s8s8s8s48s48s48s48s48s48s48s48s64s",
            self.tee_tcb_svn,
            self.mr_seam,
            self.mr_signer_seam,
            self.seam_attributes,
            self.td_attributes,
            self.xfam,
            self.mr_td,
            self.mr_config_id,
            self.mr_owner,
            self.mr_owner_config,
            self.rtmr0,
            self.rtmr1,
            self.rtmr2,
            self.rtmr3,
            self.report_data,
        )


def quote_signed_part(report: TdReport, *, qe_id: bytes) -> bytes:
    """Header (48 bytes) and body (584 bytes): what the attestation key signs.

    Args:
        report: the body.
        qe_id: 16 bytes that name the quoting enclave of one platform.
    """
    header = struct.pack(
        "<HHIHH16s16s4s", QUOTE_VERSION, ATTESTATION_KEY_ECDSA_P256, TEE_TYPE_TDX, 0, 0, QE_VENDOR_ID, qe_id, b""
    )
    return header + report.to_bytes()


def quote_bytes(
    signed_part: bytes,
    *,
    signature: bytes,
    attestation_key: bytes,
    qe_report: bytes,
    qe_report_signature: bytes,
    qe_auth_data: bytes,
    pck_chain_pem: bytes,
) -> bytes:
    """A whole quote: the signed part, its signature, and what certifies the key that signed.

    Args:
        signed_part: from `quote_signed_part`.
        signature: 64 bytes, r and s over `signed_part`.
        attestation_key: 64 bytes, x and y of the public key.
        qe_report: 384 bytes, whose report data are SHA-256(attestation_key || qe_auth_data).
        qe_report_signature: 64 bytes, r and s of the PCK key over `qe_report`.
        qe_auth_data: at most 65,535 bytes.
        pck_chain_pem: PCK certificate, its issuer and the root.
    """
    chain = struct.pack("<HI", CERTIFICATION_PCK_CHAIN, len(pck_chain_pem)) + pck_chain_pem
    auth = struct.pack("<H", len(qe_auth_data)) + qe_auth_data
    certification = qe_report + qe_report_signature + auth + chain
    signature_data = (
        signature + attestation_key + struct.pack("<HI", CERTIFICATION_QE_REPORT, len(certification)) + certification
    )
    return signed_part + struct.pack("<I", len(signature_data)) + signature_data


def qe_report_bytes(
    *,
    cpu_svn: bytes,
    attributes: bytes,
    mr_enclave: bytes,
    mr_signer: bytes,
    prod_id: int,
    svn: int,
    report_data: bytes,
) -> bytes:
    """The 384-byte SGX report of a quoting enclave (Intel SDM volume 3D, table of REPORT, first 384 bytes).

    Args:
        cpu_svn: 16 bytes.
        attributes: 16 bytes.
        mr_enclave, mr_signer: 32 bytes each.
        prod_id, svn: 16-bit numbers.
        report_data: up to 64 bytes, padded with zeros.
    """
    return struct.pack(
        "<16sI28s16s32s32s32s96sHH60s64s",
        cpu_svn,
        0,
        b"",
        attributes,
        mr_enclave,
        b"",
        mr_signer,
        b"",
        prod_id,
        svn,
        b"",
        report_data,
    )
