"""Wycheproof for the primitives as cloister calls them: AES-256-GCM, HKDF, X25519, raw ECDSA signatures, ML-KEM-768."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.testing import shared_dir


def cases(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every test of a file with its group."""
    shared = shared_dir()
    if shared is None:
        pytest.skip("the shared vectors are not here (set CLOISTER_SHARED)")
    found = json.loads((shared / "vectors/attestation/wycheproof" / name).read_text())
    for group in found["testGroups"]:
        for test in group["tests"]:
            yield group, {**test, "what": f"{name} {test['tcId']}"}


def raw(test: dict[str, Any], *names: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(test[name]) for name in names)


def test_aes_256_gcm():
    n = 0
    for group, test in cases("aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
        n += 1
        key, iv, aad, message, ciphertext, tag = raw(test, "key", "iv", "aad", "msg", "ct", "tag")
        if test["result"] == "invalid":
            with pytest.raises(InvalidTag):
                AESGCM(key).decrypt(iv, ciphertext + tag, aad)
            continue
        assert AESGCM(key).decrypt(iv, ciphertext + tag, aad) == message, test["what"]
        assert AESGCM(key).encrypt(iv, message, aad) == ciphertext + tag, test["what"]
    assert n > 50


@pytest.mark.parametrize(("name", "algorithm"), [("256", hashes.SHA256()), ("384", hashes.SHA384())])
def test_hkdf(name: str, algorithm: hashes.HashAlgorithm):
    n = 0
    for _, test in cases(f"hkdf_sha{name}_test.json"):
        n += 1
        key, salt, info = raw(test, "ikm", "salt", "info")
        if test["result"] == "invalid":
            with pytest.raises(ValueError, match="larger than"):
                HKDF(algorithm, test["size"], salt, info)
            continue
        assert HKDF(algorithm, test["size"], salt, info).derive(key).hex() == test["okm"], test["what"]
    assert n > 50


def test_x25519():
    n = 0
    for _, test in cases("x25519_test.json"):
        n += 1
        public, private = raw(test, "public", "private")
        peer = x25519.X25519PublicKey.from_public_bytes(public)
        key = x25519.X25519PrivateKey.from_private_bytes(private)
        if set(test["shared"]) == {"0"}:  # a point of low order: no secret, and so no handshake
            with pytest.raises(ValueError, match="shared key"):
                key.exchange(peer)
            continue
        assert key.exchange(peer).hex() == test["shared"], test["what"]
    assert n > 500


@pytest.mark.parametrize(
    ("name", "algorithm", "size"),
    [("secp256r1_sha256", hashes.SHA256(), 32), ("secp384r1_sha384", hashes.SHA384(), 48)],
)
def test_ecdsa_with_raw_signatures(name: str, algorithm: hashes.HashAlgorithm, size: int):
    n = 0
    for group, test in cases(f"ecdsa_{name}_p1363_test.json"):
        n += 1
        key = serialization.load_der_public_key(bytes.fromhex(group["publicKeyDer"]))
        assert isinstance(key, ec.EllipticCurvePublicKey)
        message, signature = raw(test, "msg", "sig")
        # As the verifiers do: of exactly this length, then the two numbers.
        accepted = len(signature) == 2 * size
        if accepted:
            r, s = int.from_bytes(signature[:size]), int.from_bytes(signature[size:])
            try:
                key.verify(encode_dss_signature(r, s), message, ec.ECDSA(algorithm))
            except InvalidSignature:
                accepted = False
        assert accepted == (test["result"] == "valid"), test["what"]
    assert n > 200


def test_ml_kem_768():
    n = 0
    for _, test in cases("mlkem_768_test.json"):
        n += 1
        seed, ciphertext = raw(test, "seed", "c")
        if test["result"] == "invalid":
            with pytest.raises(ValueError):
                mlkem.MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(ciphertext)
            continue
        key = mlkem.MLKEM768PrivateKey.from_seed_bytes(seed)
        if test.get("ek"):
            assert key.public_key().public_bytes_raw().hex() == test["ek"], test["what"]
        assert key.decapsulate(ciphertext).hex() == test["K"], test["what"]
    assert n > 100
