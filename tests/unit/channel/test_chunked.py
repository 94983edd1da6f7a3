from __future__ import annotations

import pytest

from cloister import channel
from cloister.channel import _chunked
from cloister.errors import ChannelError, DecryptionError

_KEY = bytes(range(32))
_CHUNK = 16 * 1024


@pytest.mark.parametrize("size", [0, 1, _CHUNK - 1, _CHUNK, _CHUNK + 1, 3 * _CHUNK, 3 * _CHUNK + 7])
def test_sizes_are_exact_and_come_back(size: int) -> None:
    plaintext = bytes(i % 251 for i in range(size))
    sealed = channel.encrypt_chunked(_KEY, plaintext, b"context")
    assert type(sealed) is bytes
    assert len(sealed) == channel.ciphertext_size(size)
    assert channel.plaintext_size(len(sealed)) == size
    opened = channel.decrypt_chunked(_KEY, sealed, b"context")
    assert type(opened) is bytes
    assert opened == plaintext


@pytest.mark.parametrize("blob", [bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("I")])
def test_any_buffer_will_do(blob: bytearray | memoryview) -> None:
    sealed = channel.encrypt_chunked(_KEY, blob, b"")
    assert channel.decrypt_chunked(_KEY, memoryview(sealed), b"") == b"abcd"


def test_a_key_seals_many_times() -> None:
    assert channel.encrypt_chunked(_KEY, b"same", b"") != channel.encrypt_chunked(_KEY, b"same", b"")


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_a_key_of_another_length_opens_nothing(key: bytes) -> None:
    # Not even what was sealed under it: HKDF would take a key of any length.
    header = _chunked.ChunkCipher(key, bytes(24), b"").header
    with pytest.raises(DecryptionError):
        _chunked.ChunkCipher.for_opening(key, header, b"")


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ChannelError, match="32 bytes"):
        channel.encrypt_chunked(key, b"", b"")
    with pytest.raises(DecryptionError):
        channel.decrypt_chunked(key, channel.encrypt_chunked(_KEY, b"", b""), b"")


@pytest.mark.parametrize("size", [0, 55, 56, 71, 56 + _CHUNK + 16, 56 + _CHUNK + 16 + 15])
def test_sizes_that_no_ciphertext_has(size: int) -> None:
    with pytest.raises(DecryptionError):
        channel.plaintext_size(size)
    with pytest.raises(DecryptionError):
        channel.decrypt_chunked(_KEY, bytes(size), b"")


def test_errors_have_no_detail() -> None:
    sealed = channel.encrypt_chunked(_KEY, b"secret text", b"right")
    causes = set[str]()
    for key, blob, context in (
        (bytes(32), sealed, b"right"),
        (_KEY, sealed, b"wrong"),
        (_KEY, sealed[:-1], b"right"),
        (_KEY, b"", b"right"),
    ):
        with pytest.raises(DecryptionError) as caught:
            channel.decrypt_chunked(key, blob, context)
        assert caught.value.__cause__ is None
        causes.add(str(caught.value))
    assert causes == {"ciphertext does not open"}


def test_the_chunk_cipher_shows_no_key() -> None:
    assert "header" not in repr(_chunked.ChunkCipher.for_sealing(_KEY, b""))
