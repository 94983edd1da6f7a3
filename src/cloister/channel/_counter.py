"""Sealed files whose roll-back is noticed, where something outside of the disk counts.

What can count: a TPM's NV counter, a key broker, another party's memory. Without any of these there is no way to tell
an older sealed file from the newest one, and `read_sealed` does not pretend to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cloister.channel._chunked import Blob
from cloister.channel._sealed import read_sealed, write_sealed
from cloister.errors import RollbackError


class Counter(Protocol):
    """A number that only grows, kept where the host of the sealed files cannot turn it back."""

    def value(self) -> int:
        """The highest number that was ever advanced to; 0 at first."""
        ...

    def advance(self, to: int) -> None:
        """Raise the number to `to`, durably; a number that is not higher changes nothing."""
        ...


class Uncounted:
    """Where nothing outside of the disk counts: versions still grow, and an older file is not told from the newest."""

    def __init__(self) -> None:
        self._seen = 0

    def value(self) -> int:
        """The highest version that this process has seen; 0 at first."""
        return self._seen

    def advance(self, to: int) -> None:
        """Remember `to`, for this process only."""
        self._seen = max(self._seen, to)


class CountedFile:
    """One sealed file and the counter that says which version of it is the newest.

    The file is written first and counted then, so that a crash in between never locks its owner out. The price: of that
    very crash the host may keep two files, the one that was counted last and the one that was not, and choose once.

    Args:
        path: of the sealed file; its folder must exist.
        key: *secret*, 32 bytes, for this file only.
        label: what the file is.
        counter: for this file only.
    """

    def __init__(self, path: Path | str, *, key: bytes, label: str, counter: Counter) -> None:
        self._path = Path(path)
        self._key = key
        self._label = label
        self._counter = counter

    def __repr__(self) -> str:
        return f"CountedFile({str(self._path)!r})"

    def write(self, plaintext: Blob) -> int:
        """Seal `plaintext` (*secret*) as the next version, which is returned.

        Raises:
            StoreError, ChannelError: as `write_sealed`; the counter has not moved.
        """
        version = self._counter.value() + 1
        write_sealed(self._path, plaintext, key=self._key, label=self._label, version=version)
        self._counter.advance(version)
        return version

    def read(self) -> bytes | None:
        """The newest plaintext (*secret*); None where nothing was ever written.

        Success means that no version was counted after this one.

        Raises:
            RollbackError: an older file was put in its place, or the file is gone.
            StoreError, DecryptionError: as `read_sealed`.
        """
        counted = self._counter.value()
        if not self._path.exists():
            if counted:
                raise RollbackError(
                    f"sealed file {self._path} is gone, and version {counted} of it was written",
                    hint="somebody removed it: restore the newest one",
                )
            return None
        version, plaintext = read_sealed(self._path, key=self._key, label=self._label, at_least=counted)
        self._counter.advance(version)  # the crash came between the file and its count
        return plaintext
