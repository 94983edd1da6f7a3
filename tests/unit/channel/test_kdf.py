from __future__ import annotations

import hashlib
import hmac

from cloister import channel, wire
from cloister.channel import _kdf


def test_transcript_hash_is_sha384_over_labelled_parts() -> None:
    assert _kdf.transcript(b"a", b"b") == hashlib.sha384(wire.enc(b"cloister-channel/v1", b"a", b"b")).digest()
    assert _kdf.transcript(b"ab") != _kdf.transcript(b"a", b"b")


def test_sha512_and_mac() -> None:
    assert _kdf.sha512(b"x") == hashlib.sha512(b"x").digest()
    assert _kdf.mac(b"k" * 48, b"x") == hmac.digest(b"k" * 48, b"x", "sha384")


def test_derive_key_is_hkdf_expand_over_labels() -> None:
    secret = bytes(range(48))
    info = wire.enc(b"cloister-channel/v1", b"msg", b"\0" * 8)
    first = hmac.digest(secret, info + b"\x01", "sha384")
    second = hmac.digest(secret, first + info + b"\x02", "sha384")
    assert channel.derive_key(secret, b"msg", b"\0" * 8) == first[:32]
    assert channel.derive_key(bytearray(secret), b"msg", b"\0" * 8, n_bytes=60) == (first + second)[:60]
    assert channel.derive_key(secret, b"a", b"b") != channel.derive_key(secret, b"ab")
