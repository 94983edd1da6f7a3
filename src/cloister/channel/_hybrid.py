"""HPKE base mode (RFC 9180) with ML-KEM-768 + X25519, single shot: it carries a 32-byte seed to an ephemeral key."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from cloister.errors import DecryptionError, MalformedMessageError

_MLKEM_PUBLIC_BYTES = 1184
_MLKEM_CIPHERTEXT_BYTES = 1088
_X25519_BYTES = 32
_TAG_BYTES = 16
SEED_BYTES = 32
PUBLIC_KEY_BYTES = _MLKEM_PUBLIC_BYTES + _X25519_BYTES
SEALED_SEED_BYTES = _MLKEM_CIPHERTEXT_BYTES + _X25519_BYTES + SEED_BYTES + _TAG_BYTES


def _suite() -> hpke.Suite:
    return hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class EphemeralKey:
    """A fresh key pair for one handshake. The private half is *secret*, never leaves, and is forgotten with the object.

    Attributes:
        public_bytes: ML-KEM-768 encapsulation key, then X25519 public key; 1,216 bytes, *public*.
    """

    __slots__ = ("_private_key", "public_bytes")

    def __init__(self) -> None:
        mlkem_key = mlkem.MLKEM768PrivateKey.generate()
        x25519_key = x25519.X25519PrivateKey.generate()
        self._private_key = hpke.MLKEM768X25519PrivateKey(mlkem_key, x25519_key)
        self.public_bytes = mlkem_key.public_key().public_bytes_raw() + x25519_key.public_key().public_bytes_raw()

    def open_seed(self, sealed: bytes, info: bytes) -> bytes:
        """Open a seed (*secret*) sealed to this key under `info`.

        Raises:
            DecryptionError: anything else.
        """
        try:
            seed = _suite().decrypt(sealed, self._private_key, info)
        except InvalidTag:
            raise DecryptionError from None
        if len(seed) != SEED_BYTES:
            raise DecryptionError
        return seed


def seal_seed(public_bytes: bytes, seed: bytes, info: bytes) -> bytes:
    """Seal `seed` (*secret*) to an ephemeral public key; 1,168 bytes, *public*.

    Raises:
        MalformedMessageError: the public key is not one that gives a secret.
    """
    try:
        public_key = hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(public_bytes[:_MLKEM_PUBLIC_BYTES]),
            x25519.X25519PublicKey.from_public_bytes(public_bytes[_MLKEM_PUBLIC_BYTES:]),
        )
        return _suite().encrypt(seed, public_key, info)
    except ValueError:
        # Wrong length, ML-KEM coefficients out of range (FIPS 203 section 7.2), or a low-order X25519 point.
        raise MalformedMessageError("the peer's ephemeral public key is not usable") from None
