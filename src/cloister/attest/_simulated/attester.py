"""The attester of a machine without a TEE: byte-true TDX quotes of a software platform, under a simulated root."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.attest._simulated import intel_pki as pki
from cloister.attest._simulated import tdquote
from cloister.attest._simulated.intel_root import PROVISION_KIND
from cloister.attest._types import HARDENING_LAYERS
from cloister.errors import AttestationError, MalformedMessageError, WireError
from cloister.wire import Evidence, enc, unpack

_SEALING_LABEL = b"cloister-sealing/v1"
_MAX_PROVISION_BYTES = 1 << 20
_PROVISION_FIELDS = (
    "attestation_key",
    "qe_report",
    "qe_report_signature",
    "qe_auth_data",
    "qe_id",
    "pck_chain",
    "fuse_key",
    "collateral",
)

# What firmware, kernel and image measure to on the software platform: constants that name themselves, so that a policy
# for a simulated run has something to pin, and so that they can never be taken for those of a real image.
SIMULATED_REGISTERS = {
    name: hashlib.sha384(f"cloister SIMULATED {name}".encode()).digest()
    for name in ("mr_seam", "mr_td", "rtmr0", "rtmr1", "rtmr2")
}
# SEPT_VE_DISABLE, as on every real TD; all debug bits are zero.
TD_ATTRIBUTES = bytes.fromhex("0000001000000000")
XFAM = bytes.fromhex("e702060000000000")


class SimulatedAttester:
    """Issues TDX v4 quotes for this process. Nothing but the process's own hardening protects it.

    Args:
        provision: secret, from `SimulatedRoot.provision`; received after hardening.
        rtmr3: 48 bytes, the run-time register that `expected_rtmr3` describes.
        layers: hardening layers that this process achieved; they are signed into each quote.
        td_attributes: 8 bytes; tests use it to play a debug domain.

    Raises:
        AttestationError: the provision blob does not parse, or `rtmr3` is not 48 bytes.
    """

    type = "simulated"
    binding = "TDREPORT.REPORTDATA of a SIMULATED quote"

    def __init__(
        self, provision: bytes, *, rtmr3: bytes, layers: Iterable[str] = (), td_attributes: bytes = TD_ATTRIBUTES
    ) -> None:
        if len(rtmr3) != tdquote.REGISTER_BYTES:
            raise AttestationError(f"rtmr3 is {len(rtmr3)} bytes, not {tdquote.REGISTER_BYTES}")
        self._secrets = _parse_provision(provision)
        self._key = _load_key(self._secrets["attestation_key"])
        self._registers = {**SIMULATED_REGISTERS, "rtmr3": bytes(rtmr3)}
        self._layers = frozenset(layers)
        self._td_attributes = td_attributes

    def __repr__(self) -> str:
        return f"SimulatedAttester(rtmr3={self._registers['rtmr3'].hex()[:16]}…)"

    def evidence(self, report_data: bytes) -> Evidence:
        """A fresh quote over `report_data` (64 bytes, public), with the collateral to verify it.

        Raises:
            AttestationError: `report_data` is not 64 bytes.
        """
        if len(report_data) != tdquote.REPORT_DATA_BYTES:
            raise AttestationError(f"report_data is {len(report_data)} bytes, not {tdquote.REPORT_DATA_BYTES}")
        report = tdquote.TdReport(
            tee_tcb_svn=pki.TEE_TCB_SVN,
            mr_signer_seam=bytes(48),
            seam_attributes=bytes(8),
            td_attributes=self._td_attributes,
            xfam=XFAM,
            mr_config_id=bytes(48),
            mr_owner=bytes(48),
            mr_owner_config=layers_to_bytes(self._layers),
            report_data=report_data,
            **self._registers,
        )
        signed_part = tdquote.quote_signed_part(report, qe_id=self._secrets["qe_id"])
        quote = tdquote.quote_bytes(
            signed_part,
            signature=pki.sign_raw(self._key, signed_part),
            attestation_key=pki.public_xy(self._key.public_key()),
            qe_report=self._secrets["qe_report"],
            qe_report_signature=self._secrets["qe_report_signature"],
            qe_auth_data=self._secrets["qe_auth_data"],
            pck_chain_pem=self._secrets["pck_chain"],
        )
        return Evidence(type=self.type, blob=quote, aux=self._secrets["collateral"])

    def sealing_key(self, label: str) -> bytes:
        """32 secret bytes, bound to the simulated platform, to all registers and to `label`."""
        measured = b"".join(self._registers[name] for name in sorted(self._registers))
        info = enc(_SEALING_LABEL, measured, label.encode())
        return HKDF(hashes.SHA384(), 32, salt=None, info=info).derive(self._secrets["fuse_key"])

    def counter(self) -> None:
        """None: a software platform has nothing that its host cannot turn back."""

    def claims(self) -> dict[str, Any]:
        """What the quotes of this attester state; JSON types only."""
        registers = {name: value.hex() for name, value in self._registers.items()}
        return {"tee": "tdx", "evidence_type": self.type, "simulated": True, "layers": sorted(self._layers)} | registers


def layers_to_bytes(layers: Iterable[str]) -> bytes:
    """48 bytes for `mr_owner_config`: bit i (least significant first) is `HARDENING_LAYERS[i]`; unknown names drop."""
    achieved = frozenset(layers)
    bits = sum(1 << i for i, name in enumerate(HARDENING_LAYERS) if name in achieved)
    return bits.to_bytes(tdquote.REGISTER_BYTES, "little")


def layers_from_bytes(mr_owner_config: bytes) -> tuple[str, ...]:
    """The inverse of `layers_to_bytes`; bits without a name drop."""
    bits = int.from_bytes(mr_owner_config, "little")
    return tuple(name for i, name in enumerate(HARDENING_LAYERS) if bits >> i & 1)


def _parse_provision(provision: bytes) -> dict[str, bytes]:
    try:
        body = unpack(provision, PROVISION_KIND, max_bytes=_MAX_PROVISION_BYTES)
        if set(body) != set(_PROVISION_FIELDS) or not all(isinstance(v, bytes) for v in body.values()):
            raise MalformedMessageError("provision fields")
    except WireError:
        # No detail: the blob is secret, and only the launcher of this process can have sent it.
        raise AttestationError("the provision blob of the simulated root does not parse") from None
    return body


def _load_key(der: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_der_private_key(der, None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AttestationError("the provision blob of the simulated root holds no usable key")
    return key
