"""Hashes and key derivation of the channel; the labels and their order are those of spec/wire.md."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from cloister import wire

V = b"cloister-channel/v1"
SUITE_ID = b"MLKEM768-X25519+HKDF-SHA256+AES-256-GCM/HKDF-SHA384/C2SP-CHUNKED-AES-256-GCM"

HASH_BYTES = wire.SHA384_BYTES
KEY_BYTES = wire.KEY_BYTES

# Direction and traffic labels name the sender.
SERVER = b"s"
CLIENT = b"c"


def transcript(*parts: bytes) -> bytes:
    """`H(parts)` = SHA-384 of enc(V, parts): 48 bytes, *public*."""
    digest = hashes.Hash(hashes.SHA384())
    digest.update(wire.enc(V, *parts))
    return digest.finalize()


def sha512(data: bytes) -> bytes:
    """SHA-512, for the 64 bytes of report data."""
    digest = hashes.Hash(hashes.SHA512())
    digest.update(data)
    return digest.finalize()


def mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA384: 48 bytes, *secret* where the message is."""
    keyed = hmac.HMAC(key, hashes.SHA384())
    keyed.update(message)
    return keyed.finalize()


def derive_key(secret: bytes | bytearray, *labels: bytes, n_bytes: int = KEY_BYTES) -> bytes:
    """`Expand(secret, labels)` = HKDF-Expand-SHA384 (RFC 5869 section 2.3) with info = enc(V, labels). *Secret*.

    Args:
        secret: uniform, 48 bytes (the hash length, as RFC 5869 asks of a pseudo-random key).
        labels: what the key is for; enc keeps two lists of labels apart.
        n_bytes: length of the result.
    """
    return HKDFExpand(hashes.SHA384(), n_bytes, wire.enc(V, *labels)).derive(secret)
