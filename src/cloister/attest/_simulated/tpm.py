"""A TPM of Python objects: byte-true quotes under a software key, for tests of all that is above the TPM port.

It is no TPM and no process of its own; swtpm is the one to try sealing and counters against.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cloister.errors import AttestationError

GENERATED, ATTEST_QUOTE = 0xFF544347, 0x8018
_ALG_SHA256, _ALG_RSASSA, _ALG_ECDSA = 0x000B, 0x0014, 0x0018
_N_PCRS = 24
_PCR_BYTES = 32


class SimulatedTpm:
    """A `TpmPort` whose state is this object.

    Args:
        key: the attestation key, RSA or ECDSA P-256.
        nonce_bytes: longest `extraData` that it takes; 50 is what a TPM without SHA-512 takes.
        nv: contents of NV indexes.
    """

    def __init__(
        self,
        key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
        *,
        nonce_bytes: int = 64,
        nv: Mapping[int, bytes] | None = None,
    ) -> None:
        self.key = key
        self.pcrs = [bytes(_PCR_BYTES)] * _N_PCRS
        self.nv = dict(nv or {})
        self.counters: dict[int, int] = {}
        self.sealed: dict[bytes, tuple[bytes, bytes]] = {}
        self._nonce_bytes = nonce_bytes

    def vendor(self) -> str:
        """A name that says what this is."""
        return "SW SIMULATED"

    def nonce_bytes(self) -> int:
        """As given."""
        return self._nonce_bytes

    def attestation_key(self) -> bytes:
        """DER SubjectPublicKeyInfo. Public."""
        encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_key().public_bytes(encoding, form)

    def read_pcrs(self, pcrs: Sequence[int]) -> bytes:
        """Values of the PCRs in this order."""
        return b"".join(self.pcrs[i] for i in pcrs)

    def extend_pcr(self, pcr: int, digest: bytes) -> None:
        """PCR = SHA-256(PCR || digest)."""
        self.pcrs[pcr] = hashlib.sha256(self.pcrs[pcr] + digest).digest()

    def quote(self, nonce: bytes, pcrs: Sequence[int]) -> tuple[bytes, bytes]:
        """TPMS_ATTEST and TPMT_SIGNATURE."""
        if len(nonce) > self._nonce_bytes:
            raise AttestationError(f"this TPM takes {self._nonce_bytes} bytes, not {len(nonce)}")
        message = quote_message(nonce, pcrs, hashlib.sha256(self.read_pcrs(pcrs)).digest())
        return message, sign(self.key, message)

    def read_nv(self, index: int) -> bytes:
        """The contents of an NV index."""
        if index not in self.nv:
            raise AttestationError(f"this TPM has no NV index {index:#010x}")
        return self.nv[index]

    def seal(self, secret: bytes, pcrs: Sequence[int]) -> bytes:
        """A name under which the object keeps `secret`."""
        name = hashlib.sha256(secret).digest()
        self.sealed[name] = (secret, self.read_pcrs(pcrs))
        return name

    def unseal(self, sealed: bytes, pcrs: Sequence[int]) -> bytes:
        """The secret, where the PCRs are what they were. Secret."""
        secret, values = self.sealed.get(sealed, (b"", b""))
        if not secret or values != self.read_pcrs(pcrs):
            raise AttestationError("this TPM does not release the sealed secret")
        return secret

    def read_counter(self, index: int) -> int | None:
        """Value of the counter, None where there is none yet."""
        return self.counters.get(index)

    def increment_counter(self, index: int) -> int:
        """Count up by one. A new counter starts above all others, as in a TPM."""
        self.counters[index] = self.counters.get(index, max(self.counters.values(), default=6)) + 1
        return self.counters[index]


def quote_message(
    nonce: bytes,
    pcrs: Sequence[int],
    digest: bytes,
    *,
    magic: int = GENERATED,
    kind: int = ATTEST_QUOTE,
    safe: int = 1,
    bank: int = _ALG_SHA256,
) -> bytes:
    """TPMS_ATTEST of a quote; the options make what a TPM never signs, or signs for other purposes."""
    selected = sum(1 << i for i in pcrs).to_bytes(_N_PCRS // 8, "little")
    return b"".join(
        (
            struct.pack(">IH", magic, kind),
            _sized(b"\x00\x0b" + bytes(32)),
            _sized(nonce),
            struct.pack(">QIIBQ", 123_456, 7, 1, safe, 0x2024_0125_0001_2000),
            struct.pack(">IHB", 1, bank, len(selected)),
            selected,
            _sized(digest),
        )
    )


def sign(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """TPMT_SIGNATURE with SHA-256."""
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        return struct.pack(">HH", _ALG_RSASSA, _ALG_SHA256) + _sized(signature)
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    numbers = _sized(r.to_bytes(32, "big")) + _sized(s.to_bytes(32, "big"))
    return struct.pack(">HH", _ALG_ECDSA, _ALG_SHA256) + numbers


def _sized(blob: bytes) -> bytes:
    return struct.pack(">H", len(blob)) + blob
