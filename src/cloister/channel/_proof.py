"""How a client proves itself in F4: by its registered node key, by evidence of its own TEE, or by both (Method 1).

Evidence says what runs, a node key says whose it is: any genuine enclave of the job could take a client's name by
evidence alone. So where clients have enclaves, both are needed, over the same session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister import wire
from cloister.channel._kdf import V
from cloister.errors import ChannelError, EvidenceSignatureError, MalformedMessageError

# A DER ECDSA signature over P-384 has at most 104 bytes.
MAX_SIGNATURE_BYTES = 104
_PROOF_KIND = "node-proof"
_ATTESTED_KIND = "attested-node-proof"


@dataclass(frozen=True)
class Binding:
    """What a client's proof must be bound to, so that it is of use in this session only.

    Attributes:
        th: transcript hash, 48 bytes, *public*.
        ex: exporter of the session secret, 48 bytes, *secret*.
        report_data: SHA-512 of both, 64 bytes; what evidence carries. *Public*.
    """

    th: bytes
    ex: bytes = field(repr=False)
    report_data: bytes


@dataclass(frozen=True)
class NodeProof:
    """A node key's signature over the session: DER ECDSA P-384 with SHA-384."""

    KIND: ClassVar[str] = _PROOF_KIND

    signature: bytes

    def to_bytes(self) -> bytes:
        """The one encoding of this proof."""
        return wire.pack(_PROOF_KIND, {"signature": self.signature})

    @classmethod
    def from_body(cls, body: dict[str, object]) -> NodeProof:
        """Build from an untrusted body; raises `MalformedMessageError`."""
        signature = body.get("signature")
        if set(body) != {"signature"} or not isinstance(signature, bytes) or len(signature) > MAX_SIGNATURE_BYTES:
            raise MalformedMessageError("node-proof does not have exactly a signature")
        return cls(signature)


@dataclass(frozen=True)
class AttestedNodeProof:
    """A node key's signature and evidence of the client's enclave, both over the session."""

    KIND: ClassVar[str] = _ATTESTED_KIND

    signature: bytes
    evidence: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """The one encoding of this proof."""
        return wire.pack(_ATTESTED_KIND, {"signature": self.signature, "evidence": self.evidence})

    @classmethod
    def from_body(cls, body: dict[str, object]) -> AttestedNodeProof:
        """Build from an untrusted body; raises a `WireError`."""
        evidence = body.get("evidence")
        if set(body) != {"signature", "evidence"} or not isinstance(evidence, bytes):
            raise MalformedMessageError("attested-node-proof does not have exactly a signature and evidence")
        signature = NodeProof.from_body({"signature": body["signature"]}).signature
        wire.Evidence.parse(evidence)
        return cls(signature, evidence)


Proof = wire.Evidence | NodeProof | AttestedNodeProof


def parse_proof(blob: bytes) -> Proof:
    """Parse the plaintext of F4. Total: evidence, a node proof, both in one, or a `WireError`."""
    kind, body = wire.unpack_any(blob, max_bytes=wire.MAX_EVIDENCE_BYTES)
    if kind == _PROOF_KIND:
        return NodeProof.from_body(body)
    if kind == _ATTESTED_KIND:
        return AttestedNodeProof.from_body(body)
    return wire.Evidence.parse(blob)


class ClientProver(Protocol):
    """The client's side of F4."""

    def prove(self, binding: Binding) -> Proof:
        """Prove who the client is, bound to this session."""
        ...


class ClientVerifier(Protocol):
    """The server's side of F4."""

    def verify(self, proof: Proof, binding: Binding) -> object:
        """Return what was proven (it becomes `Session.peer`), or raise an `AttestationError`."""
        ...


class NodeKeyProver:
    """Proves a client by its node's EC P-384 private key (*secret*, stays here)."""

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        if not isinstance(private_key.curve, ec.SECP384R1):
            raise ChannelError("a node key is an EC key on P-384")
        self._private_key = private_key

    def prove(self, binding: Binding) -> NodeProof:
        """Sign this session."""
        return NodeProof(self._private_key.sign(_signed(binding), ec.ECDSA(hashes.SHA384())))


@dataclass(frozen=True)
class VerifiedNode:
    """A client that holds the private key of this registered node key (DER SubjectPublicKeyInfo, *public*)."""

    public_key: bytes


class NodeKeyVerifier:
    """Accepts the holder of one registered node key (DER SubjectPublicKeyInfo, EC P-384).

    Raises:
        ChannelError: the registered key is not one.
    """

    def __init__(self, public_key_spki: bytes) -> None:
        try:
            public_key = serialization.load_der_public_key(public_key_spki)
        except (ValueError, UnsupportedAlgorithm):
            raise ChannelError("a registered node key does not parse") from None
        if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP384R1):
            raise ChannelError("a node key is an EC key on P-384")
        self._public_key = public_key
        self._spki = public_key_spki

    def verify(self, proof: Proof, binding: Binding) -> VerifiedNode:
        """Success means that the peer of this very session holds the registered private key.

        Raises:
            EvidenceSignatureError: it does not, or it sent evidence where a signature was agreed.
        """
        if not isinstance(proof, NodeProof):
            raise EvidenceSignatureError("the client sent evidence in place of its node key's signature")
        try:
            self._public_key.verify(proof.signature, _signed(binding), ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            raise EvidenceSignatureError(
                "the client does not hold the registered node key",
                hint="compare the node's public key with the one that the run registered for this client",
            ) from None
        return VerifiedNode(self._spki)


class EvidenceProver:
    """Proves a client by evidence of its own TEE."""

    def __init__(self, make_evidence: Callable[[bytes], wire.Evidence]) -> None:
        self._make_evidence = make_evidence

    def prove(self, binding: Binding) -> wire.Evidence:
        """Evidence over this session's report data."""
        return self._make_evidence(binding.report_data)


class EvidenceVerifier:
    """Accepts a client whose evidence `verify(evidence, report_data)` accepts; that raises an `AttestationError`."""

    def __init__(self, verify: Callable[[wire.Evidence, bytes], object]) -> None:
        self._verify = verify

    def verify(self, proof: Proof, binding: Binding) -> object:
        """Return what the verifier proved about the client.

        Raises:
            EvidenceSignatureError: the client sent a signature where evidence was agreed.
        """
        if not isinstance(proof, wire.Evidence):
            raise EvidenceSignatureError("the client sent a node key's signature in place of evidence")
        return self._verify(proof, binding.report_data)


class AttestedNodeProver:
    """Proves a client by its node key and by evidence of its enclave."""

    def __init__(
        self, private_key: ec.EllipticCurvePrivateKey, make_evidence: Callable[[bytes], wire.Evidence]
    ) -> None:
        self._node = NodeKeyProver(private_key)
        self._enclave = EvidenceProver(make_evidence)

    def prove(self, binding: Binding) -> AttestedNodeProof:
        """Sign this session, and make evidence over its report data."""
        return AttestedNodeProof(self._node.prove(binding).signature, self._enclave.prove(binding).to_bytes())


class AttestedNodeVerifier:
    """Accepts the holder of one registered node key in an enclave that `verify(evidence, report_data)` accepts."""

    def __init__(self, public_key_spki: bytes, verify: Callable[[wire.Evidence, bytes], object]) -> None:
        self._node = NodeKeyVerifier(public_key_spki)
        self._enclave = EvidenceVerifier(verify)

    def verify(self, proof: Proof, binding: Binding) -> object:
        """Return what the verifier proved about the enclave, once the node key's signature is good too.

        Raises:
            EvidenceSignatureError: only one of the two was sent, or the signature is not by the registered key.
            AttestationError: the verifier refuses the enclave.
        """
        if not isinstance(proof, AttestedNodeProof):
            raise EvidenceSignatureError("the client did not send both its node key's signature and evidence")
        self._node.verify(NodeProof(proof.signature), binding)
        return self._enclave.verify(wire.Evidence.parse(proof.evidence), binding)


def _signed(binding: Binding) -> bytes:
    return wire.enc(V, b"node-proof", binding.th, binding.ex)
