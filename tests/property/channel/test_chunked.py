"""Chunked encryption: every way in agrees with every way out, and nothing altered or cut ever opens."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister import channel
from cloister.errors import DecryptionError

_SETTINGS = settings(deadline=None, derandomize=True, max_examples=80)
_KEY = bytes(range(32))
_CHUNK = 16 * 1024
_BATCH = 64 * _CHUNK
# Around the edges of chunks and batches, and anything else small.
_SIZES = (
    st.integers(0, 200)
    | st.builds(lambda n, d: max(0, n * _CHUNK + d), st.integers(0, 4), st.integers(-2, 2))
    | st.builds(lambda d: _BATCH + d, st.integers(-2, _CHUNK + 2))
)


def _pattern(size: int) -> bytes:
    return (b"0123456789abcdef-" * (size // 17 + 1))[:size]


@_SETTINGS
@given(size=_SIZES, cuts=st.lists(st.integers(0, 2 * _BATCH), max_size=4), context=st.binary(max_size=40))
def test_all_ways_agree(size: int, cuts: list[int], context: bytes) -> None:
    plaintext, out = _pattern(size), BytesIO()
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    with channel.ChunkedWriter(out, _KEY, context) as writer:
        for start, end in pairwise(edges):
            writer.write(plaintext[start:end])
    for sealed in (out.getvalue(), channel.encrypt_chunked(_KEY, plaintext, context)):
        assert len(sealed) == channel.ciphertext_size(size)
        assert channel.plaintext_size(len(sealed)) == size
        assert channel.decrypt_chunked(_KEY, sealed, context) == plaintext
        reader = channel.ChunkedReader(sealed, _KEY, context)
        for start, end in pairwise(edges):
            assert reader.read_at(start, end - start) == plaintext[start:end]


@_SETTINGS
@given(size=_SIZES, position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_does_not_open(size: int, position: float, bit: int) -> None:
    sealed = bytearray(channel.encrypt_chunked(_KEY, _pattern(size), b""))
    sealed[int(position * len(sealed))] ^= 1 << bit
    with pytest.raises(DecryptionError):
        channel.decrypt_chunked(_KEY, sealed, b"")
    with pytest.raises(DecryptionError):
        channel.ChunkedReader(sealed, _KEY, b"").read_at(0, size)


@_SETTINGS
@given(size=_SIZES, position=st.floats(0, 1, exclude_max=True), chunks=st.integers(0, 4))
def test_a_cut_ciphertext_does_not_open(size: int, position: float, chunks: int) -> None:
    sealed = channel.encrypt_chunked(_KEY, _pattern(size), b"")
    for cut in (sealed[: int(position * len(sealed))], sealed[: 56 + chunks * (_CHUNK + 16)]):
        if len(cut) < len(sealed):
            with pytest.raises(DecryptionError):
                channel.decrypt_chunked(_KEY, cut, b"")
            with pytest.raises(DecryptionError):
                channel.ChunkedReader(cut, _KEY, b"")


@_SETTINGS
@given(blob=st.binary(max_size=300))
def test_decryption_is_total(blob: bytes) -> None:
    with pytest.raises(DecryptionError):
        channel.decrypt_chunked(_KEY, blob, b"")
