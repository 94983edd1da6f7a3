"""Chunked encryption of what is larger than memory: a streaming writer and a random-access reader of one format."""

from __future__ import annotations

import threading
from io import BytesIO
from types import TracebackType
from typing import BinaryIO, Self

from cryptography.hazmat.primitives import hashes

from cloister.channel._chunked import (
    CHUNK_BYTES,
    HEADER_BYTES,
    SEALED_CHUNK_BYTES,
    Blob,
    ChunkCipher,
    allocate,
    plaintext_size,
)
from cloister.errors import ChannelError, DecryptionError, LimitExceededError, StoreError

# 1 MiB at a time: far above the cost of a call, far below the memory of anyone.
_BATCH_CHUNKS = 64
_BATCH_BYTES = _BATCH_CHUNKS * CHUNK_BYTES


class ChunkedWriter:
    """Encrypts what is written to it into `fileobj`, in bounded memory.

    Only after `close` is the file a whole ciphertext. Used as a context manager it closes on success and leaves the
    ciphertext unfinished, thus unreadable, on an exception. It never closes or syncs `fileobj` itself.

    Args:
        fileobj: binary, writable; gets ciphertext only, which is *public*.
        key: *secret*, 32 bytes.
        context: *public*; the reader must give the same.

    Raises:
        ChannelError: the key is not of 32 bytes.
        OSError: from `fileobj`; the caller knows the path and says so.
    """

    def __init__(self, fileobj: BinaryIO, key: bytes, context: bytes) -> None:
        self._file = fileobj
        self._cipher = ChunkCipher.for_sealing(key, context)
        self._pending = bytearray()
        self._n_chunks = 0
        self._hash = hashes.Hash(hashes.SHA256())
        self._closed = False
        self.n_bytes = 0
        self._put(self._cipher.header)

    def __repr__(self) -> str:
        return f"ChunkedWriter(n_bytes={self.n_bytes})"

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the ciphertext written so far."""
        return self._hash.copy().finalize().hex()

    def write(self, data: Blob) -> int:
        """Encrypt `data` (*secret*) behind what came before; returns its length.

        Raises:
            ChannelError: after `close`.
        """
        if self._closed:
            raise ChannelError("the sealed stream is closed")
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BATCH_BYTES):
            self._pending += view[start : start + _BATCH_BYTES]
            if len(self._pending) >= _BATCH_BYTES:
                self._seal(_BATCH_BYTES, _BATCH_CHUNKS * SEALED_CHUNK_BYTES)
        return len(view)

    def close(self) -> None:
        """Write the final chunk. Safe to call twice."""
        if self._closed:
            return
        n_full, rest = divmod(len(self._pending), CHUNK_BYTES)
        self._closed = True
        self._seal(len(self._pending), n_full * SEALED_CHUNK_BYTES + rest + SEALED_CHUNK_BYTES - CHUNK_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    def _seal(self, n_plain: int, n_sealed: int) -> None:
        sealed = bytearray(n_sealed)
        with memoryview(self._pending) as view:
            self._cipher.seal_into(self._n_chunks, view[:n_plain], memoryview(sealed))
        del self._pending[:n_plain]
        self._n_chunks += n_plain // CHUNK_BYTES
        self._put(sealed)

    def _put(self, sealed: bytes | bytearray) -> None:
        self._file.write(sealed)
        self._hash.update(sealed)
        self.n_bytes += len(sealed)


class ChunkedReader:
    """Random access to the plaintext of a ciphertext; decrypts only the chunks that are asked for.

    Making one checks key, context and the final chunk, so `size` is authenticated. Each chunk is checked when read.

    Args:
        source: ciphertext, or a seekable binary file of it; the file stays open and the caller closes it.
        key: *secret*, 32 bytes.
        context: *public*, as the writer's.

    Attributes:
        size: bytes of plaintext.

    Raises:
        DecryptionError: wrong key or context, truncated, or altered in the header or final chunk.
        StoreError: the file cannot be read.
    """

    def __init__(self, source: BinaryIO | Blob, key: bytes, context: bytes) -> None:
        self._file: BinaryIO = BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
        self._lock = threading.Lock()
        try:
            n_sealed = self._file.seek(0, 2)
        except OSError as error:
            raise StoreError(f"sealed file cannot be read: {error.strerror}") from error
        self.size = plaintext_size(n_sealed)
        self._cipher = ChunkCipher.for_opening(key, self._read(0, HEADER_BYTES), context)
        self._open(self.size // CHUNK_BYTES, self.size // CHUNK_BYTES + 1)

    def __repr__(self) -> str:
        return f"ChunkedReader(size={self.size})"

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes of plaintext (*secret*) from `offset`. Safe to call from several threads.

        Raises:
            LimitExceededError: the range is not inside the plaintext.
            DecryptionError: a chunk was altered, or the file was cut after opening.
            StoreError: the file cannot be read.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise LimitExceededError("the range is outside of the sealed plaintext")
        buffer = allocate(size)
        first, last = offset // CHUNK_BYTES, -(-(offset + size) // CHUNK_BYTES)
        with buffer.getbuffer() as out:
            for start in range(first, last, _BATCH_CHUNKS):
                batch = self._open(start, min(start + _BATCH_CHUNKS, last))
                begin, end = start * CHUNK_BYTES, start * CHUNK_BYTES + len(batch)
                low, high = max(begin, offset), min(end, offset + size)
                out[low - offset : high - offset] = batch[low - begin : high - begin]
        return buffer.getvalue()

    def _open(self, first: int, end: int) -> memoryview:
        """Plaintext of the chunks `first..end-1`."""
        n_plain = min(end * CHUNK_BYTES, self.size) - first * CHUNK_BYTES
        n_sealed = n_plain + (end - first) * (SEALED_CHUNK_BYTES - CHUNK_BYTES)
        sealed = self._read(HEADER_BYTES + first * SEALED_CHUNK_BYTES, n_sealed)
        out = memoryview(bytearray(n_plain))
        self._cipher.open_into(first, memoryview(sealed), out)
        return out

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(size)
        except OSError as error:
            raise StoreError(f"sealed file cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DecryptionError
        return data
