"""What a client's near side has finished, so that an interrupted run goes on instead of starting again.

One file, mode 0600, of JSON lines, each synced to disk before the next step is taken. It holds the feature key, so it
is *secret*: the client's own host, which holds the text itself.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cloister.errors import StoreError
from cloister.train._store import FULL_ERRNOS, full_error

_log = logging.getLogger(__name__)

_VERSION = 1
_KEY_BYTES = 32


@dataclass(frozen=True)
class ShardRecord:
    """One shard that is sealed, in a local file or already on the store.

    Attributes:
        split, index: its place.
        name, n_bytes: of the ciphertext.
        n_examples, n_tokens, n_truncated: in it.
        hidden_size: of its boundary tensors.
    """

    split: str
    index: int
    name: str
    n_bytes: int
    n_examples: int
    n_tokens: int
    n_truncated: int
    hidden_size: int


class Journal:
    """The finished shards of one near-side run.

    Attributes:
        key: *secret*, the feature key of this content and of no other.
        totals: examples of each split.
        shards: sealed so far, in order.
        stored: names of those that are on the store.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.key = b""
        self.totals: dict[str, int] = {}
        self.shards: list[ShardRecord] = []
        self.stored: set[str] = set()

    def __repr__(self) -> str:
        return f"Journal({str(self._path)!r}, {len(self.shards)} shards)"

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Journal | None:
        """The journal of exactly this content; None if there is none, or it is of other content or damaged."""
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed("cannot read", path, error) from None
        # What follows the last line break was cut off by a crash: that step counts as not done.
        lines.pop()
        journal = cls(path)
        try:
            for number, line in enumerate(lines):
                journal._take(number, json.loads(line), fingerprint)
        except (ValueError, TypeError, KeyError):
            _log.warning("%s is of another run or damaged; starting anew with a fresh key", path)
            return None
        if not journal.key:
            return None
        # Write it back without the cut-off end, so that the next line starts on a line of its own.
        journal._rewrite(fingerprint)
        return journal

    @classmethod
    def begin(cls, path: Path, fingerprint: str, *, key: bytes, totals: dict[str, int]) -> Journal:
        """A new journal in place of whatever was there."""
        journal = cls(path)
        journal.key, journal.totals = key, dict(totals)
        journal._rewrite(fingerprint)
        return journal

    def add_sealed(self, record: ShardRecord) -> None:
        """The shard's ciphertext is complete in a local file."""
        self._append({"sealed": asdict(record)})
        self.shards.append(record)

    def add_stored(self, name: str) -> None:
        """The shard is on the store."""
        self._append({"stored": name})
        self.stored.add(name)

    def keep(self, n_shards: int, fingerprint: str) -> None:
        """Forget all but the first `n_shards`: the rest is made again."""
        self.shards = self.shards[:n_shards]
        self.stored &= {record.name for record in self.shards}
        self._rewrite(fingerprint)

    def of_split(self, split: str) -> list[ShardRecord]:
        return [record for record in self.shards if record.split == split]

    def _take(self, number: int, line: Any, fingerprint: str) -> None:
        if number == 0:
            if line["version"] != _VERSION or line["fingerprint"] != fingerprint:
                raise ValueError("another run")
            self.key = bytes.fromhex(line["key"])
            self.totals = {str(split): int(n) for split, n in line["totals"].items()}
            if len(self.key) != _KEY_BYTES:
                raise ValueError("not a key")
        elif "sealed" in line:
            self.shards.append(ShardRecord(**{f.name: line["sealed"][f.name] for f in fields(ShardRecord)}))
        else:
            self.stored.add(str(line["stored"]))

    def _rewrite(self, fingerprint: str) -> None:
        head = {"version": _VERSION, "fingerprint": fingerprint, "key": self.key.hex(), "totals": self.totals}
        lines: list[Any] = [head, *({"sealed": asdict(record)} for record in self.shards)]
        lines += [{"stored": record.name} for record in self.shards if record.name in self.stored]
        temporary = self._path.with_name(self._path.name + ".part")
        try:
            temporary.unlink(missing_ok=True)
            self._write(temporary, os.O_CREAT | os.O_EXCL, lines)
            temporary.replace(self._path)
        except OSError as error:
            raise _failed("cannot write", self._path, error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _append(self, line: Any) -> None:
        try:
            self._write(self._path, os.O_APPEND, [line])
        except OSError as error:
            raise _failed("cannot write", self._path, error) from None

    def _write(self, path: Path, flags: int, lines: list[Any]) -> None:
        handle = os.open(path, os.O_WRONLY | flags, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(handle)


def _failed(what: str, path: Path, error: OSError) -> StoreError:
    if error.errno in FULL_ERRNOS:
        return full_error(what, str(path))
    return StoreError(f"{path}: {what}: {error.strerror or error}", path=str(path), hint="check the run folder")
