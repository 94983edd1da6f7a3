"""An encrypted connection between an enclave and its pad helper, who hold one key; spec/pad.md, otp-2.

Each side sends 32 fresh bytes of X25519, so that who learns the key later reads nothing of before; the key proves who
both are. What goes one way is a sequence of AES-256-GCM records, whose nonces count them: one that is altered, missing,
repeated, out of order or of another session does not open. Both sides know the size of everything before it comes, so
no length travels. What goes wrong is an OSError, as in `_transport`.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import ConfigError
from cloister.offload._transport import StreamLink
from cloister.wire import ACCELERATOR_HEADER_BYTES, KEY_BYTES, enc

_V = b"cloister-pad-helper/v1"
_RECORD_BYTES = 1 << 20
_TAG_BYTES = 16
_NONCE_BYTES = 12
_SHARE_BYTES = 32


def read_helper_key(path: Path) -> bytes:
    """The key that an enclave and its pad helper share: a file of 32 random bytes. *Secret*.

    Raises:
        ConfigError: it cannot be read, is of another size, or others than its owner may read or write it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the key of the pad helper {path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode) or mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others may open the key of the pad helper {path}", hint=f"chmod 600 {path}")
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"the key of the pad helper {path} is not of {KEY_BYTES} bytes",
            hint=f"(umask 077; head -c {KEY_BYTES} /dev/urandom > {path})",
        )
    return key


class SealedLink(StreamLink):
    """One end. Success of the constructor means that the other one holds the key, and is there now.

    Args:
        connection: of TCP; owned from here on. Its timeout holds for the handshake.
        key: *secret*, 32 bytes.
        is_client: whether this is the enclave's end.

    Raises:
        ConnectionAbortedError: the other end holds another key, speaks another version, or a record was altered.
        OSError: the connection broke.
    """

    def __init__(self, connection: socket.socket, key: bytes, *, is_client: bool) -> None:
        super().__init__(connection, lambda n_bytes: np.empty(n_bytes, dtype=np.uint8))
        self._n_sent = self._n_received = 0
        self._sealed = bytearray(_RECORD_BYTES + _TAG_BYTES)
        own = X25519PrivateKey.generate()
        public, found = own.public_key().public_bytes_raw(), bytearray(len(_V) + _SHARE_BYTES)
        super().send(_V + public)
        super().read_into(memoryview(found))
        peer = bytes(found.removeprefix(_V))
        try:
            shared = own.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:  # another version, whose share is not in its place, or a point of small order
            raise ConnectionAbortedError("this is no pad helper, or one of another version") from None
        info = enc(_V, *((public, peer) if is_client else (peer, public)))
        keys = HKDF(hashes.SHA256(), 2 * KEY_BYTES, None, info).derive(key + shared)
        ciphers = AESGCM(keys[:KEY_BYTES]), AESGCM(keys[KEY_BYTES:])  # of the client, of the server
        self._sending, self._receiving = ciphers if is_client else reversed(ciphers)
        super().send(self._seal(b""))
        self._open(memoryview(bytearray()), 0)

    def send(self, *parts: bytes | memoryview) -> None:
        """See `Link.send`. Each part is records of its own."""
        for part in parts:
            for start in range(0, len(part), _RECORD_BYTES):
                super().send(self._seal(memoryview(part)[start : start + _RECORD_BYTES]))

    def receive(self) -> bytes:
        """See `Link.receive`. That the other side ended here on purpose is not proven."""
        header = memoryview(bytearray(ACCELERATOR_HEADER_BYTES))
        n_read = self._socket.recv_into(memoryview(self._sealed)[: len(header) + _TAG_BYTES])
        if not n_read:
            return b""
        self._open(header, n_read)
        return bytes(header)

    def read_into(self, view: memoryview) -> None:
        """See `Link.read_into`. Success means that the other end sent this, here and in this order."""
        deadline = self._deadline()
        for start in range(0, len(view), _RECORD_BYTES):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            self._open(view[start : start + _RECORD_BYTES], 0)

    def _seal(self, plain: bytes | memoryview) -> memoryview:
        sealed = memoryview(self._sealed)[: len(plain) + _TAG_BYTES]
        self._sending.encrypt_into(_nonce(self._n_sent), plain, None, sealed)
        self._n_sent += 1
        return sealed

    def _open(self, out: memoryview, n_read: int) -> None:
        """The next record, of which `n_read` bytes are there already."""
        sealed = memoryview(self._sealed)[: len(out) + _TAG_BYTES]
        super().read_into(sealed[n_read:])
        try:
            self._receiving.decrypt_into(_nonce(self._n_received), sealed, None, out)
        except InvalidTag:
            raise ConnectionAbortedError("a record of the pad helper's connection does not open") from None
        self._n_received += 1


def _nonce(count: int) -> bytes:
    return count.to_bytes(_NONCE_BYTES, "big")
