"""Sealed files: state that outlives a process, on a disk that its host can read and change.

Roll-back to an older file is not detected by sealing; `version` comes back authenticated so that the caller can compare
it with a counter of its own, where it has one.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from cloister import wire
from cloister.channel._chunked import Blob, ciphertext_size, decrypt_chunked, encrypt_chunked
from cloister.channel._kdf import V
from cloister.errors import DecryptionError, StoreError, StoreFullError

_MAGIC = b"CLSF\x01"
_VERSION_BYTES = 8
_HEADER_BYTES = len(_MAGIC) + _VERSION_BYTES
_MAX_VERSION = (1 << 64) - 1
_FULL = (errno.ENOSPC, errno.EDQUOT)


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write_durably(temporary, path, (_MAGIC + version.to_bytes(_VERSION_BYTES, "big"), sealed))
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFullError(
                f"no space left for {path} ({_HEADER_BYTES + len(sealed)} bytes)",
                path=str(path),
                hint="free some space on that disk; the file that was there before is untouched",
            ) from error
        raise StoreError(f"{path} cannot be written: {error.strerror}", path=str(path)) from error


def _write_durably(temporary: Path, path: Path, parts: tuple[bytes, ...]) -> None:
    """Write beside `path`, sync, rename over it, sync the folder: a crash leaves the old file or the new one."""
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_sealed(path: Path | str, *, key: bytes, label: str) -> tuple[int, bytes]:
    """Open a sealed file; returns its version and plaintext (*secret*).

    Success means that a holder of `key` wrote exactly this under `label` and `version`. The caller must still judge
    whether `version` is recent enough: an older file of the same writer opens as well.

    Raises:
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
        return version, decrypt_chunked(key, memoryview(blob)[_HEADER_BYTES:], _context(label, version))
    except DecryptionError:
        raise DecryptionError(f"sealed file {path} does not open") from None


def _context(label: str, version: int) -> bytes:
    return wire.enc(V, b"file", label.encode(), version.to_bytes(_VERSION_BYTES, "big"))
