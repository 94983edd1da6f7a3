"""Sealed shards on an untrusted store: a folder by default, or any fsspec URL (S3, GCS, ...).

Only ciphertext passes here, under the hex SHA-256 of itself as its name. This file imports no torch: the server's
courier uses it, and knows nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cloister.errors import ShardMismatchError, StoreError, StoreFullError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from cloister.wire import ShardEntry

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{64}")
_COPY_BYTES = 1 << 20
_STORE_HINT = "check the folder's permissions, or the store's address and credentials"
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# Bases of what the object stores' clients raise and that is no OSError, looked up only where the client is loaded.
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)


def open_store(url: str | Path, **storage_options: Any) -> ShardStore:
    """The store at a folder path or fsspec URL.

    Args:
        url: "/some/folder", "s3://bucket/prefix", ... A folder is made if it is not there.
        storage_options: for fsspec, such as `key`, `secret`, `endpoint_url`. Never shown in a message.

    Raises:
        StoreError: unknown protocol, its package is not installed, or the place cannot be reached.
    """
    import fsspec

    text = os.fspath(url) if isinstance(url, Path) else url
    shown = text.split("?", maxsplit=1)[0]
    try:
        with as_store_errors("cannot open the store", shown):
            fs, root = fsspec.url_to_fs(text, **storage_options)
            return _FolderStore(fs, root, shown) if _is_local(fs) else ShardStore(fs, root, shown)
    except ImportError as error:
        cause = f"{shown}: the package for this kind of store is not installed"
        is_s3 = text.startswith(("s3:", "s3a:"))
        raise StoreError(cause, path=shown, hint="pip install 'cloister[s3]'" if is_s3 else str(error)) from None
    except ValueError as error:
        raise StoreError(
            f"{shown}: not a store that fsspec knows ({error})", path=shown, hint="use a folder, s3://..., gs://..."
        ) from None


def verify_shard_file(path: str | Path, entry: ShardEntry, *, client: str = "") -> None:
    """Success means: the file is byte for byte the ciphertext that the manifest entry names.

    The caller must still open it: a manifest says nothing about what is inside.

    Raises:
        ShardMismatchError: missing, another size, or altered; names the shard (and the client, if given).
    """
    path = Path(path)
    whose = f"shard {entry.name}" + (f" of client {client}" if client else "")
    hint = "the store lost or altered it: run again, the client sends it anew"
    try:
        n_bytes = path.stat().st_size
        if n_bytes != entry.n_bytes:
            raise ShardMismatchError(
                f"{whose} has {n_bytes} bytes, its manifest says {entry.n_bytes}", path=str(path), hint=hint
            )
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ShardMismatchError(
            f"{whose} cannot be read: {error.strerror or error}", path=str(path), hint=hint
        ) from None
    if found != entry.name:
        raise ShardMismatchError(f"{whose} was altered: its SHA-256 is {found}", path=str(path), hint=hint)


class ShardStore:
    """Shards under one prefix of an fsspec file system. Made by `open_store`.

    An object store's put is atomic by itself. Every method raises StoreError, naming the store and the shard.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, url: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self.url = url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def put_file(self, name: str, local_path: str | Path) -> None:
        """Store a sealed file under `name`; afterwards it is there whole, or the call raised and it is not there.

        Raises:
            StoreFullError: no space is left.
        """
        with as_store_errors(f"cannot write shard {name}", self.url):
            self._put(self._path(name), Path(local_path))

    def exists(self, name: str, size: int) -> bool:
        """Whether a shard of this name and exactly this size is there."""
        with as_store_errors(f"cannot look for shard {name}", self.url):
            return self._size(self._path(name)) == size

    def size(self, name: str) -> int:
        """Size in bytes of the stored ciphertext."""
        with as_store_errors(f"cannot look for shard {name}", self.url):
            size = self._size(self._path(name))
        if size is None:
            raise self._missing(name)
        return size

    def fetch(self, name: str, dest: str | Path) -> Path:
        """Copy a shard to the file `dest`, or into it under its name where `dest` is a folder; returns the file's path.

        The copy appears whole or not at all, and only if its SHA-256 is its name.

        Raises:
            ShardMismatchError: the store gave other bytes than the name says.
            StoreFullError: no space is left for the copy.
        """
        source = self._path(name)
        dest = Path(dest)
        target = dest / name if dest.is_dir() else dest
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            with as_store_errors(f"cannot fetch shard {name}", self.url):
                if self._size(source) is None:
                    raise self._missing(name)
                with self._fs.open(source, "rb") as reader, temporary.open("xb") as writer:
                    found = _copy_hashing(reader, writer)
                if found != name:
                    raise ShardMismatchError(
                        f"{self.url}: shard {name} was altered on the store: its SHA-256 is {found}",
                        path=f"{self.url}/{name}",
                        hint="delete it there and run again, the client sends it anew",
                    )
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def list(self) -> list[str]:
        """Names of the shards that are there, sorted; anything else on the store is not listed."""
        with as_store_errors("cannot list the store", self.url):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = (str(path).rstrip("/").rsplit("/", maxsplit=1)[-1] for path in found)
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _put(self, target: str, source: Path) -> None:
        self._fs.put_file(os.fspath(source), target)

    def _size(self, path: str) -> int | None:
        # Without this an answer could come from fsspec's listing cache, from before an upload by another process.
        self._fs.invalidate_cache()
        try:
            return int(self._fs.info(path)["size"])
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> str:
        # A name comes from a manifest; nothing but a hash may become a path on this machine.
        if not _NAME.fullmatch(name):
            raise StoreError(f"{self.url}: {name[:80]!r} is not a shard name", path=self.url)
        return f"{self._root}/{name}"

    def _missing(self, name: str) -> StoreError:
        return StoreError(
            f"{self.url}: shard {name} is not there",
            path=f"{self.url}/{name}",
            hint="the upload did not finish or the file was removed: run again, the client sends it anew",
        )


class _FolderStore(ShardStore):
    """A folder on this machine (or mounted on it)."""

    def __init__(self, fs: AbstractFileSystem, root: str, url: str) -> None:
        super().__init__(fs, root, url)
        Path(root).mkdir(parents=True, exist_ok=True, mode=0o700)

    def _put(self, target: str, source: Path) -> None:
        temporary = Path(target).with_name(f".{Path(target).name}.{secrets.token_hex(4)}.part")
        try:
            try:
                # On one file system a second name costs neither time nor space; sealed files are never written again.
                temporary.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, temporary)
                _sync(temporary)
            temporary.replace(target)
            _sync(temporary.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _copy_hashing(reader: Any, writer: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := reader.read(_COPY_BYTES):
        digest.update(block)
        writer.write(block)
    writer.flush()
    os.fsync(writer.fileno())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_local(fs: AbstractFileSystem) -> bool:
    protocol = fs.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def _client_errors() -> tuple[type[BaseException], ...]:
    modules = ((sys.modules.get(module), name) for module, name in _CLIENT_ERRORS)
    return tuple(getattr(module, name) for module, name in modules if hasattr(module, name))


@contextmanager
def as_store_errors(what: str, url: str | Path, *, hint: str = _STORE_HINT) -> Iterator[None]:
    """Turns what file systems and object stores raise into StoreError or StoreFullError naming `url`."""
    url = os.fspath(url)
    try:
        yield
    except OSError as error:
        # s3fs and gcsfs raise plain OSError subclasses, often without errno.
        if error.errno in FULL_ERRNOS:
            raise full_error(what, url) from None
        raise StoreError(
            f"{url}: {what}: {error.strerror or error}",
            path=url,
            hint=hint,
        ) from None
    except _client_errors() as error:
        raise StoreError(
            f"{url}: {what}: {type(error).__name__}: {error}",
            path=url,
            hint=hint,
        ) from None


def full_error(what: str, path: str) -> StoreFullError:
    """What a full disk is called everywhere in this package."""
    return StoreFullError(
        f"{path}: {what}: no space is left",
        path=path,
        hint="free some space and run again with --resume: what was complete is kept and not sent again",
    )
