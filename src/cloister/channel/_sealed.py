"""Sealed files: state that outlives a process, on a disk that its host can read and change.

Sealing alone does not tell an older file from the newest; `version` comes back authenticated, and `at_least` refuses
one below what a counter outside of that disk says (`CountedFile`).
"""

from __future__ import annotations

from pathlib import Path

from cloister import wire
from cloister._files import write_whole
from cloister.channel._chunked import Blob, ciphertext_size, decrypt_chunked, encrypt_chunked
from cloister.channel._kdf import V
from cloister.errors import DecryptionError, RollbackError, StoreError

_MAGIC = b"CLSF\x01"
_VERSION_BYTES = 8
_HEADER_BYTES = len(_MAGIC) + _VERSION_BYTES
_MAX_VERSION = (1 << 64) - 1


def write_sealed(path: Path | str, plaintext: Blob, *, key: bytes, label: str, version: int) -> None:
    """Seal `plaintext` into `path`: whole or not at all, readable by its owner only.

    Args:
        path: replaced if it exists; its folder must exist.
        plaintext: *secret*, for holders of `key` only.
        key: *secret*, 32 bytes, for this kind of file only.
        label: what the file is; the reader must ask for the same.
        version: the caller's counter, 0 to 2^64 - 1; authenticated, in the clear.

    Raises:
        StoreFullError: no space left; what was at `path` before is untouched.
        StoreError: the file cannot be written.
        ChannelError: the key is not of 32 bytes.
    """
    path = Path(path)
    if not 0 <= version <= _MAX_VERSION:
        raise StoreError(f"version of sealed file {path} is outside of 64 bits", path=str(path))
    sealed = encrypt_chunked(key, plaintext, _context(label, version))
    write_whole(path, _MAGIC + version.to_bytes(_VERSION_BYTES, "big"), sealed)


def read_sealed(path: Path | str, *, key: bytes, label: str, at_least: int = 0) -> tuple[int, bytes]:
    """Open a sealed file; returns its version and plaintext (*secret*).

    Success means that a holder of `key` wrote exactly this under `label` and `version`, and that `version` is not below
    `at_least`. Without `at_least` an older file of the same writer opens as well, and the caller must live with that.

    Args:
        at_least: what a counter says, that whoever can replace the file cannot turn back.

    Raises:
        RollbackError: the file is genuine, and older than `at_least`.
        StoreError: there is no such file, or it cannot be read.
        DecryptionError: wrong key or label, or one bit was changed anywhere in the file.
    """
    path = Path(path)
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", path=str(path)) from error
    version = int.from_bytes(blob[len(_MAGIC) : _HEADER_BYTES], "big")
    try:
        if len(blob) < _HEADER_BYTES + ciphertext_size(0) or not blob.startswith(_MAGIC):
            raise DecryptionError
        plaintext = decrypt_chunked(key, memoryview(blob)[_HEADER_BYTES:], _context(label, version))
    except DecryptionError:
        raise DecryptionError(f"sealed file {path} does not open") from None
    if version < at_least:
        raise RollbackError(
            f"sealed file {path} is of version {version}, and version {at_least} was written after it",
            hint="somebody put an older file back: restore the newest one",
        )
    return version, plaintext


def _context(label: str, version: int) -> bytes:
    return wire.enc(V, b"file", label.encode(), version.to_bytes(_VERSION_BYTES, "big"))
