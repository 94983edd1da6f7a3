"""Two honest parties with a fake attester, for a relay that does what it likes in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from cloister import channel, wire
from cloister.errors import EvidenceSignatureError, MeasurementMismatchError

NODE_KEY = ec.generate_private_key(ec.SECP384R1())
NODE_SPKI = NODE_KEY.public_key().public_bytes(
    serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
)
CONTEXT = channel.SessionContext("run-1", "north", b"\1" * 48, b"\2" * 48, NODE_SPKI)


class FakeHardware:
    """Signs report data as a TEE would; its verifier refuses a wrong signature and other report data."""

    def __init__(self) -> None:
        self._key = ed25519.Ed25519PrivateKey.generate()

    def evidence(self, report_data: bytes) -> wire.Evidence:
        return wire.Evidence("fake", report_data + self._key.sign(report_data), b"collateral")

    def verify(self, evidence: wire.Evidence, report_data: bytes) -> str:
        try:
            self._key.public_key().verify(evidence.blob[64:], evidence.blob[:64])
        except InvalidSignature:
            raise EvidenceSignatureError("fake hardware did not sign this") from None
        if evidence.blob[:64] != report_data:
            raise MeasurementMismatchError("evidence is of another session")
        return "the server enclave"


@dataclass
class Parties:
    """Makes handshakes of both sides; `server` and `client` take overrides of the defaults."""

    hardware: FakeHardware = field(default_factory=FakeHardware)
    node_key: ec.EllipticCurvePrivateKey = NODE_KEY
    node_spki: bytes = NODE_SPKI

    def server(self, context: channel.SessionContext = CONTEXT, **overrides: Any) -> channel.ServerHandshake:
        arguments: dict[str, Any] = {
            "make_evidence": self.hardware.evidence,
            "verify_client": channel.NodeKeyVerifier(NODE_SPKI),
            "now": lambda: 0.0,
            **overrides,
        }
        return channel.ServerHandshake(context, **arguments)

    def client(self, context: channel.SessionContext = CONTEXT, **overrides: Any) -> channel.ClientHandshake:
        arguments: dict[str, Any] = {
            "prove": channel.NodeKeyProver(NODE_KEY),
            "verify_server": self.hardware.verify,
            "now": lambda: 0.0,
            **overrides,
        }
        return channel.ClientHandshake(context, **arguments)

    def shake(self) -> tuple[list[bytes], channel.Session, channel.Session]:
        """One honest handshake: its flights, the server's session, the client's."""
        server, client = self.server(), self.client()
        f1 = server.flight1()
        f2 = client.flight2(f1)
        f3 = server.flight3(f2)
        f4, client_session = client.flight4(f3)
        return [f1, f2, f3, f4], server.finish(f4), client_session

    def other_contexts(self) -> list[channel.SessionContext]:
        """Contexts that differ from the usual one in one field each."""
        other = ec.generate_private_key(ec.SECP384R1()).public_key()
        spki = other.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return [
            replace(CONTEXT, run_id="run-2"),
            replace(CONTEXT, node_id="south"),
            replace(CONTEXT, server_policy_sha384=b"\7" * 48),
            replace(CONTEXT, client_policy_sha384=b"\7" * 48),
            replace(CONTEXT, node_public_key=spki),
        ]


@pytest.fixture(scope="session")
def parties() -> Parties:
    return Parties()


@pytest.fixture
def flip() -> Callable[[bytes, int], bytes]:
    """Flip one bit, the index taken modulo the length."""

    def flip_bit(blob: bytes, bit: int) -> bytes:
        bit %= 8 * len(blob)
        altered = bytearray(blob)
        altered[bit // 8] ^= 1 << bit % 8
        return bytes(altered)

    return flip_bit
