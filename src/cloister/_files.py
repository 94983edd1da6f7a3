"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from cloister.errors import StoreError, StoreFullError


def write_whole(path: Path, *parts: bytes | bytearray | memoryview, mode: int = 0o600) -> None:
    """Replaces `path` with `parts`, one behind the other, in one step that survives a crash.

    Written beside its place, synced, renamed, and the folder synced: a reader, also one after a power cut, sees the old
    content or the new. Its folder must exist.

    Args:
        parts: what the file holds; several, so that a large body needs no copy to get its header.
        mode: for this user only, unless said otherwise; the umask applies.

    Raises:
        StoreFullError: no space is left; the unfinished file is gone and the old one untouched.
        StoreError: any other failure of the file system; the same holds.
    """
    try:
        _replace_durably(path, parts, mode)
    except OSError as error:
        raise store_error(error, path) from error


def _replace_durably(path: Path, parts: tuple[bytes | bytearray | memoryview, ...], mode: int) -> None:
    fresh = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def store_error(error: OSError, path: Path) -> StoreError:
    """The StoreError for an OSError while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(
            f"no space left to write {path}", path=str(path), hint="free some space, then resume: nothing is lost"
        )
    return StoreError(f"{path} cannot be written: {error.strerror}", path=str(path))
