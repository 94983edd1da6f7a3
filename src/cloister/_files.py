"""Files that are written whole or not at all, readable by this user only."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from cloister.errors import StoreError, StoreFullError


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Replaces `path` with `data` in one step: mode 0600, synced, and the old content stays until the new is complete.

    Raises:
        StoreFullError: no space is left; the unfinished file is gone and the old one untouched.
        StoreError: any other failure of the file system; the same holds.
    """
    fresh = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise store_error(error, path) from error


def store_error(error: OSError, path: Path) -> StoreError:
    """The StoreError for an OSError while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(
            f"no space left to write {path}", path=str(path), hint="free some space, then resume: nothing is lost"
        )
    return StoreError(f"cannot write {path}: {error.strerror}", path=str(path))
