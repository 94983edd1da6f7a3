from __future__ import annotations

import errno
import hashlib
from io import BytesIO
from pathlib import Path

import pytest

from cloister import channel
from cloister.errors import ChannelError, DecryptionError, LimitExceededError, StoreError

_KEY = bytes(range(32))
_CHUNK = 16 * 1024
_BATCH = 64 * _CHUNK


def _pattern(size: int) -> bytes:
    return (b"0123456789abcdef-" * (size // 17 + 1))[:size]


@pytest.mark.parametrize("size", [0, 5, _CHUNK, _BATCH - 1, _BATCH, _BATCH + _CHUNK, 2 * _BATCH + 3])
@pytest.mark.parametrize("piece", [1000, _BATCH + 5, 10 * _BATCH])
def test_what_is_streamed_opens_whole(size: int, piece: int) -> None:
    plaintext, out = _pattern(size), BytesIO()
    with channel.ChunkedWriter(out, _KEY, b"c") as writer:
        for start in range(0, size, piece):
            assert writer.write(plaintext[start : start + piece]) == len(plaintext[start : start + piece])
    sealed = out.getvalue()
    assert channel.decrypt_chunked(_KEY, sealed, b"c") == plaintext
    assert writer.n_bytes == len(sealed) == channel.ciphertext_size(size)
    assert writer.sha256 == hashlib.sha256(sealed).hexdigest()
    assert repr(writer) == f"ChunkedWriter(n_bytes={len(sealed)})"


def test_the_writer_takes_any_buffer() -> None:
    out = BytesIO()
    with channel.ChunkedWriter(out, _KEY, b"") as writer:
        writer.write(memoryview(b"abcdefgh").cast("I"))
    assert channel.decrypt_chunked(_KEY, out.getvalue(), b"") == b"abcdefgh"


def test_the_writer_ends_once() -> None:
    out = BytesIO()
    writer = channel.ChunkedWriter(out, _KEY, b"")
    writer.close()
    n_bytes = writer.n_bytes
    writer.close()
    assert writer.n_bytes == n_bytes
    with pytest.raises(ChannelError):
        writer.write(b"late")


def test_an_interrupted_stream_does_not_open() -> None:
    out = BytesIO()
    with pytest.raises(KeyboardInterrupt), channel.ChunkedWriter(out, _KEY, b"") as writer:
        writer.write(bytes(_BATCH))
        raise KeyboardInterrupt
    with pytest.raises(DecryptionError):
        channel.decrypt_chunked(_KEY, out.getvalue(), b"")


def test_the_writer_needs_a_key_of_32_bytes() -> None:
    with pytest.raises(ChannelError):
        channel.ChunkedWriter(BytesIO(), bytes(16), b"")


_SIZES = (0, 9, _CHUNK, 2 * _BATCH + 100)
_RANGES = (
    (0, 0),
    (0, 1),
    (_CHUNK - 1, 2),
    (_CHUNK, _CHUNK),
    (5, _BATCH),
    (_BATCH - 1, _BATCH + 50),
    (2 * _BATCH + 99, 1),
)


@pytest.mark.parametrize("size", _SIZES)
def test_random_access_gives_the_same_bytes(size: int, tmp_path: Path) -> None:
    plaintext = _pattern(size)
    sealed = channel.encrypt_chunked(_KEY, plaintext, b"c")
    path = tmp_path / "sealed"
    path.write_bytes(sealed)
    with path.open("rb") as file:
        for reader in (
            channel.ChunkedReader(file, _KEY, b"c"),
            channel.ChunkedReader(sealed, _KEY, b"c"),
            channel.ChunkedReader(memoryview(sealed), _KEY, b"c"),
        ):
            assert reader.size == size
            assert repr(reader) == f"ChunkedReader(size={size})"
            assert reader.read_at(0, size) == plaintext
            for offset, length in _RANGES:
                if offset + length <= size:
                    assert reader.read_at(offset, length) == plaintext[offset : offset + length]


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, 101), (101, 0), (1, 100)])
def test_a_range_outside_is_refused(offset: int, size: int) -> None:
    reader = channel.ChunkedReader(channel.encrypt_chunked(_KEY, bytes(100), b""), _KEY, b"")
    with pytest.raises(LimitExceededError):
        reader.read_at(offset, size)


def test_opening_checks_key_context_and_end() -> None:
    sealed = channel.encrypt_chunked(_KEY, bytes(3 * _CHUNK + 50), b"c")
    cut = sealed[: 56 + 2 * (_CHUNK + 16)]
    for key, blob, context in (
        (bytes(32), sealed, b"c"),
        (_KEY, sealed, b"d"),
        (_KEY, sealed[:-1], b"c"),
        (_KEY, cut, b"c"),
        (_KEY, cut + bytes(20), b"c"),
        (_KEY, b"", b"c"),
    ):
        with pytest.raises(DecryptionError):
            channel.ChunkedReader(blob, key, context)


def test_only_the_chunks_that_are_read_are_checked() -> None:
    sealed = bytearray(channel.encrypt_chunked(_KEY, _pattern(3 * _CHUNK), b""))
    sealed[56 + _CHUNK + 16 + 5] ^= 1  # in chunk 1
    reader = channel.ChunkedReader(sealed, _KEY, b"")
    assert reader.read_at(0, _CHUNK) == _pattern(_CHUNK)
    assert reader.read_at(2 * _CHUNK, _CHUNK) == _pattern(3 * _CHUNK)[2 * _CHUNK :]
    with pytest.raises(DecryptionError):
        reader.read_at(_CHUNK + 100, 1)


def test_a_file_that_shrinks_after_opening_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    path.write_bytes(channel.encrypt_chunked(_KEY, bytes(100_000), b""))
    with path.open("r+b", buffering=0) as file:
        reader = channel.ChunkedReader(file, _KEY, b"")
        file.truncate(1000)
        with pytest.raises(DecryptionError):
            reader.read_at(0, 10)


class _Failing(BytesIO):
    def __init__(self, blob: bytes, n_good: int) -> None:
        super().__init__(blob)
        self.n_good = n_good

    def seek(self, offset: int, whence: int = 0) -> int:
        self.n_good -= 1
        if self.n_good < 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().seek(offset, whence)


@pytest.mark.parametrize("n_good", [0, 1, 3])
def test_a_disk_error_is_a_store_error(n_good: int) -> None:
    file = _Failing(channel.encrypt_chunked(_KEY, b"x", b""), n_good)
    with pytest.raises(StoreError, match="Input/output error"):
        channel.ChunkedReader(file, _KEY, b"").read_at(0, 1)
