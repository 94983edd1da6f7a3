"""All Wycheproof vectors of C2SP chunked encryption with AES-256-GCM, through every way of decrypting."""

from __future__ import annotations

import hashlib
import json
import zlib
from io import BytesIO
from typing import Any

import pytest

from cloister import channel
from cloister.errors import DecryptionError
from cloister.testing import shared_dir

_SHARED = shared_dir()
if _SHARED is None:
    pytest.skip("the shared vectors are not here (set CLOISTER_SHARED)", allow_module_level=True)
_FILE = _SHARED / "vectors/attestation/wycheproof/c2sp_chunked_encryption_aes_256_gcm_test.json"
_VECTORS: list[dict[str, Any]] = [
    test for group in json.loads(_FILE.read_text())["testGroups"] for test in group["tests"]
]


def _inputs(vector: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    return bytes.fromhex(vector["key"]), zlib.decompress(bytes.fromhex(vector["ct"])), bytes.fromhex(vector["ctx"])


def test_there_are_all_vectors() -> None:
    assert len(_VECTORS) == 35
    assert {vector["result"] for vector in _VECTORS} == {"valid", "invalid"}


@pytest.mark.parametrize("vector", _VECTORS, ids=lambda vector: f"{vector['tcId']}-{vector['comment']}")
def test_whole(vector: dict[str, Any]) -> None:
    key, ciphertext, context = _inputs(vector)
    if vector["result"] == "invalid":
        with pytest.raises(DecryptionError):
            channel.decrypt_chunked(key, ciphertext, context)
        return
    plaintext = channel.decrypt_chunked(key, ciphertext, context)
    assert len(plaintext) == vector["msgLength"]
    assert hashlib.sha512(plaintext).hexdigest() == vector["msgSha512"]
    assert channel.ciphertext_size(len(plaintext)) == len(ciphertext)


@pytest.mark.parametrize("vector", _VECTORS, ids=lambda vector: f"{vector['tcId']}-{vector['comment']}")
def test_random_access(vector: dict[str, Any]) -> None:
    key, ciphertext, context = _inputs(vector)
    flags = set(vector["flags"])
    if vector["result"] == "invalid" and "ValidFinalChunk" not in flags:
        with pytest.raises(DecryptionError):
            channel.ChunkedReader(BytesIO(ciphertext), key, context)
        return
    reader = channel.ChunkedReader(BytesIO(ciphertext), key, context)
    if vector["result"] == "invalid":
        with pytest.raises(DecryptionError):
            reader.read_at(0, reader.size)
        return
    plaintext = reader.read_at(0, reader.size)
    assert hashlib.sha512(plaintext).hexdigest() == vector["msgSha512"]
