"""HPKE against the vectors of the package cryptography-vectors.

The library seals and opens in one shot without associated data, which no vector does. So the slow implementation, which
opens HPKE by hand, is held to the vectors here, and production to the slow implementation by test_slow_against_fast.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from tests.oracle.slow_channel import KemKey, hpke_schedule

vectors = pytest.importorskip("cryptography_vectors", reason="the package cryptography-vectors is not installed")
HPKE = Path(vectors.__file__).parent / "HPKE"
HKDF_SHA256, BASE = 1, 0
AEADS = {1: AESGCM, 2: AESGCM, 3: ChaCha20Poly1305}


def load(name: str, kem: int) -> list[dict[str, Any]]:
    """Base mode and HKDF-SHA256 with one KEM, which is what cloister uses; any AEAD."""
    found = json.loads((HPKE / name).read_text())
    return [
        v for v in found if (v["kem_id"], v["kdf_id"], v["mode"]) == (kem, HKDF_SHA256, BASE) and v["aead_id"] in AEADS
    ]


HYBRID = load("hpke-pq-test-vectors.json", 0x647A)
CLASSICAL = load("test-vectors.json", 0x20)


def test_there_are_vectors_of_both_kinds():
    assert HYBRID
    assert {vector["aead_id"] for vector in CLASSICAL} == set(AEADS)


@pytest.mark.parametrize("vector", HYBRID)
def test_the_hybrid_kem(vector: dict[str, Any]):
    expanded = hashes.Hash(hashes.SHAKE256(96))
    expanded.update(bytes.fromhex(vector["skRm"]))
    seed = expanded.finalize()
    key = KemKey(mlkem_seed=seed[:64], x25519_key=seed[64:])
    assert key.public.hex() == vector["pkRm"]
    assert key.shared(bytes.fromhex(vector["enc"])).hex() == vector["shared_secret"]


@pytest.mark.parametrize("vector", [*HYBRID, *CLASSICAL])
def test_the_key_schedule_and_the_first_message(vector: dict[str, Any]):
    suite = f"{vector['kem_id']:04x}{vector['kdf_id']:04x}{vector['aead_id']:04x}"
    n_key = len(vector["key"]) // 2
    key, nonce = hpke_schedule(bytes.fromhex(vector["shared_secret"]), bytes.fromhex(vector["info"]), suite, n_key)
    assert (key.hex(), nonce.hex()) == (vector["key"], vector["base_nonce"])
    first = vector["encryptions"][0]
    opened = AEADS[vector["aead_id"]](key).decrypt(nonce, bytes.fromhex(first["ct"]), bytes.fromhex(first["aad"]))
    assert opened.hex() == first["pt"]
