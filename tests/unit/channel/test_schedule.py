"""The key schedule of spec/wire.md, computed a second time with hashlib alone, fits what the handshake does."""

from __future__ import annotations

import hashlib
import hmac
import secrets

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister import channel, wire

_V = b"cloister-channel/v1"


def _enc(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _h(*parts: bytes) -> bytes:
    return hashlib.sha384(_enc(_V, *parts)).digest()


def _expand(secret: bytes, *labels: bytes, n_bytes: int = 32) -> bytes:
    out, block, i = b"", b"", 1
    while len(out) < n_bytes:
        block = hmac.digest(secret, block + _enc(_V, *labels) + bytes([i]), "sha384")
        out, i = out + block, i + 1
    return out[:n_bytes]


class _Recorder:
    """Keeps what the parties were asked to prove, and the random values in the order they were drawn."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self.prover = channel.NodeKeyProver(key)
        self.proof = b""
        self.bindings: list[channel.Binding] = []
        self.report_data: list[bytes] = []
        self.drawn: list[bytes] = []

    def prove(self, binding: channel.Binding) -> channel.Proof:
        self.bindings.append(binding)
        proof = self.prover.prove(binding)
        self.proof = proof.to_bytes()
        return proof

    def evidence(self, report_data: bytes) -> wire.Evidence:
        self.report_data.append(report_data)
        return wire.Evidence("fake", b"quote", b"")

    def token_bytes(self, n_bytes: int) -> bytes:
        self.drawn.append(hashlib.shake_256(b"%d" % len(self.drawn)).digest(n_bytes))
        return self.drawn[-1]


def test_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    recorder = _Recorder(key)
    monkeypatch.setattr(secrets, "token_bytes", recorder.token_bytes)
    context = channel.SessionContext("run-1", "north", b"\1" * 48, b"\2" * 48, spki)
    server = channel.ServerHandshake(
        context, make_evidence=recorder.evidence, verify_client=channel.NodeKeyVerifier(spki), now=lambda: 0.0
    )
    client = channel.ClientHandshake(
        context,
        prove=recorder,
        verify_server=lambda _, report_data: recorder.report_data.append(report_data),
        now=lambda: 0.0,
    )
    f1 = server.flight1()
    f2 = client.flight2(f1)
    f3 = server.flight3(f2)
    f4, client_session = client.flight4(f3)
    server_session = server.finish(f4)

    suite = b"MLKEM768-X25519+HKDF-SHA256+AES-256-GCM/HKDF-SHA384/C2SP-CHUNKED-AES-256-GCM"
    n_s, n_c, seed_c, seed_s = recorder.drawn[0], recorder.drawn[1], recorder.drawn[2], recorder.drawn[3]
    assert wire.dec(f1, 2)[0] == n_s
    assert wire.dec(f2, 3)[0] == n_c
    th = _h(_enc(b"run-1", b"north", b"\1" * 48, b"\2" * 48, suite, spki), *wire.dec(f1, 2))
    th = _h(th, *wire.dec(f2, 3))
    c2, sealed_evidence = wire.dec(f3, 2)
    th = _h(th, c2)
    hs = hmac.digest(th, _enc(seed_c, seed_s), "sha384")
    ex = _expand(hs, b"exporter", n_bytes=48)
    report_data = hashlib.sha512(_enc(_V, b"report-data", b"server", th, ex)).digest()
    assert recorder.report_data == [report_data, report_data]
    evidence = channel.decrypt_chunked(_expand(hs, b"hs", b"s"), sealed_evidence, _enc(_V, b"flight", th))
    assert evidence == wire.Evidence("fake", b"quote", b"").to_bytes()
    th = _h(th, evidence)
    client_report_data = hashlib.sha512(_enc(_V, b"report-data", b"client", th, ex)).digest()
    assert recorder.bindings == [channel.Binding(th, ex, client_report_data)]
    proof = channel.decrypt_chunked(_expand(hs, b"hs", b"c"), f4, _enc(_V, b"flight", th))
    assert proof == recorder.proof
    th = _h(th, proof)
    session_id = _h(b"session-id", th)[:32]
    assert server_session.session_id == client_session.session_id == session_id

    for direction, session in ((b"s", server_session), (b"c", client_session)):
        chain = _expand(hs, b"app", direction, th, n_bytes=48)
        for seq in range(3):
            number = seq.to_bytes(8, "big")
            header = session.header("prepare", round=seq).to_bytes()
            record = session.seal(session.header("prepare", round=seq), b"text")
            assert record.startswith(number + _enc(header))
            record_context = _enc(session_id, direction, number, header)
            sealed = record[8 + len(_enc(header)) :]
            assert channel.decrypt_chunked(_expand(chain, b"msg", number), sealed, record_context) == b"text"
            chain = _expand(chain, b"next", n_bytes=48)
