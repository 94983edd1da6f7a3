"""A round's updates on the host's disk, each piece sealed, for rules that must see all clients at one place at a time.

The key is drawn for the spool and dies with it, so that nothing of an earlier round or process opens; client and piece
are bound into each ciphertext, so that the host can exchange none. It sees sizes, and in which order pieces are read,
which does not depend on what is in them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from cloister._files import store_error
from cloister.channel import ciphertext_size, decrypt_chunked, encrypt_chunked
from cloister.errors import StoreError
from cloister.wire import enc

_LABEL = b"cloister-spool/v1"


class Spool:
    """Vectors of float32 numbers, one list of pieces for each client; written once, read piece by piece.

    Args:
        folder: on the host's disk; the file in it has no name and goes when the spool does.
        sizes: how many numbers each piece has, the same for every client.
    """

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder = folder
        self._sizes = tuple(sizes)
        sealed = [ciphertext_size(4 * size) for size in self._sizes]
        self._at = [0, *np.cumsum(sealed).tolist()]
        self._key = os.urandom(32)
        self._n_tries = 0
        self._tries: list[int] = []  # of each client, the one that was written whole
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise store_error(error, folder) from error

    def __repr__(self) -> str:
        return f"Spool(n={len(self)}, pieces={len(self._sizes)})"

    def __len__(self) -> int:
        return len(self._tries)

    def append(self, pieces: Iterator[Float32[np.ndarray, " numbers"]]) -> None:
        """One client's pieces. What was written of them does not count when one fails.

        Raises:
            StoreFullError, StoreError: the disk does not take them.
        """
        start = len(self) * self._at[-1]
        # Pieces of a try that failed must not open in the place of those of the next.
        self._n_tries += 1
        for index, (piece, size) in enumerate(zip(pieces, self._sizes, strict=True)):
            plaintext = np.ascontiguousarray(piece, dtype="<f4").tobytes()
            if len(plaintext) != 4 * size:
                raise ValueError(f"piece {index} has {len(piece)} numbers, expected {size}")
            sealed = encrypt_chunked(self._key, plaintext, self._context(self._n_tries, index))
            try:
                _write(self._file.fileno(), sealed, start + self._at[index])
            except OSError as error:
                raise store_error(error, self._folder) from error
        self._tries.append(self._n_tries)

    def read(self, index: int) -> Iterator[Float32[np.ndarray, " numbers"]]:
        """One piece of every client, in the order of `append`.

        Raises:
            DecryptionError: the host changed it.
            StoreError: it cannot be read.
        """
        n_bytes = self._at[index + 1] - self._at[index]
        for client, attempt in enumerate(self._tries):
            try:
                sealed = os.pread(self._file.fileno(), n_bytes, client * self._at[-1] + self._at[index])
            except OSError as error:
                raise StoreError(f"the spool in {self._folder} cannot be read: {error.strerror}") from error
            yield np.frombuffer(decrypt_chunked(self._key, sealed, self._context(attempt, index)), dtype="<f4")

    def close(self) -> None:
        """Forgets the key and gives the disk back."""
        self._key = b""
        self._file.close()

    def _context(self, attempt: int, index: int) -> bytes:
        return enc(_LABEL, attempt.to_bytes(8, "big"), index.to_bytes(8, "big"))


def _write(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        n_written = os.pwrite(descriptor, view, at)
        view, at = view[n_written:], at + n_written
