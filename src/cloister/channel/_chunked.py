"""C2SP chunked encryption (c2sp.org/chunked-encryption@v1) with AES-256-GCM, for everything that is longer than a seed.

    salt (24) || commitment (32) || chunk 0 || chunk 1 || ... || final chunk

Each chunk is AES-256-GCM of 16 KiB (tag behind it), the final one of less, so a plaintext of whole chunks ends with an
empty one: that is what makes truncation visible. Chunk i's nonce is the base nonce xor i. The commitment binds key,
salt and context, so a wrong one is refused before anything is decrypted, and one ciphertext opens under one key only.
"""

from __future__ import annotations

import os
from io import BytesIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import constant_time, hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from cloister.errors import ChannelError, DecryptionError

KEY_BYTES = 32
SALT_BYTES = 24
COMMITMENT_BYTES = 32
HEADER_BYTES = SALT_BYTES + COMMITMENT_BYTES
CHUNK_BYTES = 16 * 1024
TAG_BYTES = 16
SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
_NONCE_BYTES = 12
_INFO = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00"

Blob = bytes | bytearray | memoryview


def ciphertext_size(n_bytes: int) -> int:
    """Exact size in bytes of the ciphertext of a plaintext of `n_bytes`."""
    return HEADER_BYTES + n_bytes + TAG_BYTES * (n_bytes // CHUNK_BYTES + 1)


def plaintext_size(n_bytes: int) -> int:
    """Exact size in bytes of the plaintext of a ciphertext of `n_bytes`.

    Raises:
        DecryptionError: no ciphertext has this size.
    """
    n_full, rest = divmod(n_bytes - HEADER_BYTES, SEALED_CHUNK_BYTES)
    if n_full < 0 or rest < TAG_BYTES:
        raise DecryptionError
    return n_full * CHUNK_BYTES + rest - TAG_BYTES


class ChunkCipher:
    """The chunk key and base nonce of one ciphertext; `header` is the salt and commitment in front of its chunks."""

    __slots__ = ("_aead", "_base_nonce", "header")

    def __init__(self, key: bytes, salt: bytes, context: bytes) -> None:
        derived = HKDFExpand(
            hashes.SHA512(), KEY_BYTES + _NONCE_BYTES + COMMITMENT_BYTES, _INFO + salt + context
        ).derive(key)
        self._aead = AESGCM(derived[:KEY_BYTES])
        self._base_nonce = int.from_bytes(derived[KEY_BYTES : KEY_BYTES + _NONCE_BYTES], "big")
        self.header = salt + derived[KEY_BYTES + _NONCE_BYTES :]

    @classmethod
    def for_sealing(cls, key: bytes, context: bytes) -> ChunkCipher:
        """With a fresh random salt, so that one key may seal any number of plaintexts."""
        if len(key) != KEY_BYTES:
            raise ChannelError(f"a key of {KEY_BYTES} bytes is needed")
        return cls(key, os.urandom(SALT_BYTES), context)

    @classmethod
    def for_opening(cls, key: bytes, header: Blob, context: bytes) -> ChunkCipher:
        """Success means that key, salt and context are those of the sealer. The chunks are still unverified."""
        if len(key) != KEY_BYTES or len(header) != HEADER_BYTES:
            raise DecryptionError
        cipher = cls(key, bytes(header[:SALT_BYTES]), context)
        if not constant_time.bytes_eq(cipher.header, bytes(header)):
            raise DecryptionError
        return cipher

    def seal_into(self, first: int, plaintext: memoryview, out: memoryview) -> None:
        """Seal consecutive chunks from index `first`; `out` has room for them exactly. Only the last may be short."""
        for i in range(-(-len(out) // SEALED_CHUNK_BYTES)):
            self._aead.encrypt_into(
                self._nonce(first + i),
                plaintext[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES],
                None,
                out[i * SEALED_CHUNK_BYTES : (i + 1) * SEALED_CHUNK_BYTES],
            )

    def open_into(self, first: int, ciphertext: memoryview, out: memoryview) -> None:
        """Open consecutive chunks from index `first`; `out` has room for them exactly. Only the last may be short."""
        try:
            for i in range(-(-len(ciphertext) // SEALED_CHUNK_BYTES)):
                self._aead.decrypt_into(
                    self._nonce(first + i),
                    ciphertext[i * SEALED_CHUNK_BYTES : (i + 1) * SEALED_CHUNK_BYTES],
                    None,
                    out[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES],
                )
        except InvalidTag:
            raise DecryptionError from None

    def _nonce(self, index: int) -> bytes:
        return (self._base_nonce ^ index).to_bytes(_NONCE_BYTES, "big")


def allocate(n_bytes: int) -> BytesIO:
    """A zeroed buffer of `n_bytes`. Filled through `getbuffer()`, its `getvalue()` is bytes without another copy."""
    buffer = BytesIO()
    if n_bytes:
        buffer.seek(n_bytes - 1)
        buffer.write(b"\x00")
    return buffer


def encrypt_chunked(key: bytes, plaintext: Blob, context: bytes, *, prefix: bytes = b"") -> bytes:
    """Encrypt `plaintext` under `key`, bound to `context`. The result is *public*: anyone may carry or store it.

    Args:
        key: *secret*, 32 bytes; any number of plaintexts, each gets a fresh salt.
        plaintext: *secret*, any length.
        context: *public*; the opener must give the same. Not part of the result.
        prefix: *public*; put before the ciphertext, unencrypted, so that a frame needs no copy of a large record.

    Raises:
        ChannelError: the key is not of 32 bytes.
    """
    cipher = ChunkCipher.for_sealing(key, context)
    view = memoryview(plaintext).cast("B")
    head = prefix + cipher.header
    buffer = allocate(len(prefix) + ciphertext_size(len(view)))
    with buffer.getbuffer() as out:
        out[: len(head)] = head
        cipher.seal_into(0, view, out[len(head) :])
    return buffer.getvalue()


def decrypt_chunked(key: bytes, ciphertext: Blob, context: bytes) -> bytes:
    """Decrypt what `encrypt_chunked` made with the same key and context.

    Success means that a holder of `key` sealed exactly this plaintext for `context`. The caller must still make sure
    that it is not an older one: nothing here tells repeats apart.

    Raises:
        DecryptionError: anything else; nothing of the plaintext is given out.
    """
    size = plaintext_size(len(ciphertext))
    view = memoryview(ciphertext)
    cipher = ChunkCipher.for_opening(key, view[:HEADER_BYTES], context)
    buffer = allocate(size)
    with buffer.getbuffer() as out:
        cipher.open_into(0, view[HEADER_BYTES:], out)
    return buffer.getvalue()
