from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from cloister import channel, wire
from cloister.channel import _hybrid, _proof
from cloister.errors import ChannelError, DecryptionError, EvidenceSignatureError, MalformedMessageError, WireError

_BINDING = channel.Binding(b"\1" * 48, b"\2" * 48, b"\3" * 64)


def _spki(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_a_node_key_proves_its_holder() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    proof = channel.NodeKeyProver(key).prove(_BINDING)
    assert _proof.parse_proof(proof.to_bytes()) == proof
    assert channel.NodeKeyVerifier(_spki(key)).verify(proof, _BINDING) == channel.VerifiedNode(_spki(key))


@pytest.mark.parametrize(
    "binding", [channel.Binding(b"\7" * 48, b"\2" * 48, b""), channel.Binding(b"\1" * 48, b"\7" * 48, b"")]
)
def test_a_signature_is_good_for_one_session(binding: channel.Binding) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    proof = channel.NodeKeyProver(key).prove(_BINDING)
    with pytest.raises(EvidenceSignatureError):
        channel.NodeKeyVerifier(_spki(key)).verify(proof, binding)


def test_another_key_or_kind_of_proof_is_refused() -> None:
    key, other = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    verifier = channel.NodeKeyVerifier(_spki(key))
    evidence = wire.Evidence("tdx", b"quote", b"")
    for proof in (
        channel.NodeKeyProver(other).prove(_BINDING),
        channel.NodeProof(b""),
        channel.NodeProof(b"x"),
        evidence,
    ):
        with pytest.raises(EvidenceSignatureError):
            verifier.verify(proof, _BINDING)
    with pytest.raises(EvidenceSignatureError):
        channel.EvidenceVerifier(lambda _, __: None).verify(channel.NodeProof(b""), _BINDING)


def test_evidence_proves_a_client_with_a_tee() -> None:
    proof = channel.EvidenceProver(lambda report_data: wire.Evidence("tdx", report_data, b"")).prove(_BINDING)
    assert _proof.parse_proof(proof.to_bytes()) == proof
    verifier = channel.EvidenceVerifier(lambda evidence, report_data: (evidence.blob, report_data))
    assert verifier.verify(proof, _BINDING) == (_BINDING.report_data, _BINDING.report_data)


def test_both_proofs_travel_as_one() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    proof = channel.AttestedNodeProver(key, lambda data: wire.Evidence("tdx", data, b"")).prove(_BINDING)
    parsed = _proof.parse_proof(proof.to_bytes())
    assert parsed == proof
    verifier = channel.AttestedNodeVerifier(_spki(key), lambda evidence, report_data: (evidence.blob, report_data))
    assert verifier.verify(parsed, _BINDING) == (_BINDING.report_data, _BINDING.report_data)


@pytest.mark.parametrize(
    "change", [{"evidence": b"junk"}, {"evidence": "text"}, {"signature": bytes(105)}, {"more": 1}], ids=str
)
def test_an_attested_proof_has_exactly_a_signature_and_evidence(change: dict[str, object]) -> None:
    body = {"signature": b"s", "evidence": wire.Evidence("tdx", b"", b"").to_bytes(), **change}
    with pytest.raises(WireError):
        _proof.parse_proof(wire.pack("attested-node-proof", body))


def test_node_keys_are_on_p384() -> None:
    for key in (ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()):
        with pytest.raises(ChannelError, match="P-384"):
            channel.NodeKeyVerifier(_spki(key))
    with pytest.raises(ChannelError, match="P-384"):
        channel.NodeKeyProver(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ChannelError, match="does not parse"):
        channel.NodeKeyVerifier(b"junk")


@pytest.mark.parametrize(
    "body", [{}, {"signature": "text"}, {"signature": bytes(105)}, {"signature": b"", "more": 1}, {"sig": b""}]
)
def test_node_proof_has_exactly_a_signature(body: dict[str, object]) -> None:
    with pytest.raises(MalformedMessageError):
        _proof.parse_proof(wire.pack("node-proof", body))
    with pytest.raises(MalformedMessageError):
        _proof.parse_proof(wire.pack("other", body))


def test_the_exporter_is_not_shown() -> None:
    assert "\\x02" not in repr(_BINDING)


def test_hybrid_seed_has_exact_sizes_and_one_opener() -> None:
    key, other = _hybrid.EphemeralKey(), _hybrid.EphemeralKey()
    sealed = _hybrid.seal_seed(key.public_bytes, b"s" * 32, b"info")
    assert (len(key.public_bytes), len(sealed)) == (1216, 1168)
    assert key.open_seed(sealed, b"info") == b"s" * 32
    for opener, blob, info in ((other, sealed, b"info"), (key, sealed, b"other"), (key, sealed[:-1], b"info")):
        with pytest.raises(DecryptionError):
            opener.open_seed(blob, info)
    with pytest.raises(DecryptionError):
        key.open_seed(_hybrid.seal_seed(key.public_bytes, b"s" * 31, b"")[:], b"")


@pytest.mark.parametrize("public_bytes", [b"", b"\xff" * 1216, bytes(1216), bytes(1215)])
def test_unusable_public_keys_are_refused(public_bytes: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        _hybrid.seal_seed(public_bytes, bytes(32), b"")
