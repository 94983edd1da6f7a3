"""A relay that replays, reorders, reflects, alters and mixes flights gets no session and no second chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister import channel, wire
from cloister.channel import _handshake
from cloister.errors import (
    ChannelError,
    CloisterError,
    DecryptionError,
    EvidenceSignatureError,
    LimitExceededError,
    MalformedMessageError,
    MeasurementMismatchError,
    ReplayError,
    WireError,
)

_SETTINGS = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _is_dead(handshake: channel.ServerHandshake | channel.ClientHandshake) -> None:
    steps: list[Callable[[], Any]] = (
        [handshake.flight1, lambda: handshake.flight3(b""), lambda: handshake.finish(b"")]
        if isinstance(handshake, channel.ServerHandshake)
        else [lambda: handshake.flight2(b""), lambda: handshake.flight4(b"")]
    )
    for step in steps:
        with pytest.raises(ReplayError):
            step()
    assert (handshake._th, handshake._hs, handshake._ex, handshake._ephemeral) == (b"", b"", b"", [])


def test_honest_parties_agree(parties: Any) -> None:
    flights, server, client = parties.shake()
    assert server.session_id == client.session_id
    assert client.peer == "the server enclave"
    assert isinstance(server.peer, channel.VerifiedNode)
    assert [len(flight) for flight in flights[:2]] == [1256, 2428]
    assert max(map(len, flights)) <= channel.MAX_FLIGHT_BYTES
    assert client.open(server.seal(server.header("x"), b"hello"))[1] == b"hello"


def test_two_handshakes_share_nothing(parties: Any) -> None:
    first, second = parties.shake(), parties.shake()
    assert first[1].session_id != second[1].session_id
    assert not set(first[0]) & set(second[0])
    with pytest.raises(DecryptionError):
        second[2].open(first[1].seal(first[1].header("x"), b""))


def test_a_client_with_a_tee_proves_itself_by_evidence(parties: Any) -> None:
    server = parties.server(verify_client=channel.EvidenceVerifier(parties.hardware.verify))
    client = parties.client(prove=channel.EvidenceProver(parties.hardware.evidence))
    flight4, _ = client.flight4(server.flight3(client.flight2(server.flight1())))
    assert server.finish(flight4).peer == "the server enclave"


def test_a_client_enclave_proves_what_runs_and_whose_it_is(parties: Any) -> None:
    server = parties.server(verify_client=channel.AttestedNodeVerifier(parties.node_spki, parties.hardware.verify))
    client = parties.client(prove=channel.AttestedNodeProver(parties.node_key, parties.hardware.evidence))
    flight4, _ = client.flight4(server.flight3(client.flight2(server.flight1())))
    assert server.finish(flight4).peer == "the server enclave"


def test_an_enclave_of_the_job_cannot_take_another_clients_name(parties: Any) -> None:
    impostor = ec.generate_private_key(ec.SECP384R1())
    for prover in (
        channel.AttestedNodeProver(impostor, parties.hardware.evidence),
        channel.EvidenceProver(parties.hardware.evidence),
        channel.NodeKeyProver(parties.node_key),
    ):
        server = parties.server(verify_client=channel.AttestedNodeVerifier(parties.node_spki, parties.hardware.verify))
        client = parties.client(prove=prover)
        flight4, _ = client.flight4(server.flight3(client.flight2(server.flight1())))
        with pytest.raises(EvidenceSignatureError):
            server.finish(flight4)
        _is_dead(server)


def test_the_holder_of_a_node_key_in_another_enclave_is_refused(parties: Any) -> None:
    def refuse(evidence: wire.Evidence, report_data: bytes) -> None:
        raise MeasurementMismatchError("another enclave")

    server = parties.server(verify_client=channel.AttestedNodeVerifier(parties.node_spki, refuse))
    client = parties.client(prove=channel.AttestedNodeProver(parties.node_key, parties.hardware.evidence))
    flight4, _ = client.flight4(server.flight3(client.flight2(server.flight1())))
    with pytest.raises(MeasurementMismatchError):
        server.finish(flight4)
    _is_dead(server)


def test_the_relay_learns_no_evidence_and_no_signature(parties: Any) -> None:
    flights, _, _ = parties.shake()
    assert b"CLST" not in b"".join(flights)
    assert b"fake" not in b"".join(flights)


def test_secrets_are_forgotten_when_done(parties: Any) -> None:
    server, client = parties.server(), parties.client()
    flight4, _ = client.flight4(server.flight3(client.flight2(server.flight1())))
    server.finish(flight4)
    _is_dead(server)
    _is_dead(client)
    assert client._seed == b""
    assert repr(server) == "ServerHandshake(north)"


# Steps out of order, and every step twice.


@pytest.mark.parametrize("n_good", range(4))
@pytest.mark.parametrize("wrong", ["flight1", "flight3", "finish"])
def test_server_steps_come_once_and_in_order(parties: Any, n_good: int, wrong: str) -> None:
    server, client = parties.server(), parties.client()
    steps = ["flight1", "flight3", "finish"]
    flight: bytes = b""
    for step in steps[:n_good]:
        if step == "flight1":
            flight = client.flight2(server.flight1())
        elif step == "flight3":
            flight = client.flight4(server.flight3(flight))[0]
        else:
            server.finish(flight)
    if n_good < 3 and steps[n_good] == wrong:
        return
    with pytest.raises(ReplayError):
        server.flight1() if wrong == "flight1" else getattr(server, wrong)(flight)
    _is_dead(server)


def test_client_steps_come_once_and_in_order(parties: Any) -> None:
    early = parties.client()
    with pytest.raises(ReplayError):
        early.flight4(b"")
    _is_dead(early)
    server, client = parties.server(), parties.client()
    f1 = server.flight1()
    client.flight2(f1)
    with pytest.raises(ReplayError):
        client.flight2(f1)
    _is_dead(client)


# Replay: each flight of an earlier, complete handshake, in a fresh one.


def test_replayed_flight1_gives_no_session(parties: Any) -> None:
    (f1, *_), _, _ = parties.shake()
    server, client = parties.server(), parties.client()
    server.flight1()
    with pytest.raises(DecryptionError):
        server.flight3(client.flight2(f1))
    _is_dead(server)


def test_replayed_flight2_is_refused(parties: Any) -> None:
    (_, f2, *_), _, _ = parties.shake()
    server = parties.server()
    server.flight1()
    with pytest.raises(DecryptionError):
        server.flight3(f2)
    _is_dead(server)


def test_replayed_flight3_is_refused(parties: Any) -> None:
    (_, _, f3, _), _, _ = parties.shake()
    client = parties.client()
    client.flight2(parties.server().flight1())
    with pytest.raises(DecryptionError):
        client.flight4(f3)
    _is_dead(client)


def test_replayed_flight4_is_refused(parties: Any) -> None:
    (*_, f4), _, _ = parties.shake()
    server, client = parties.server(), parties.client()
    server.flight3(client.flight2(server.flight1()))
    with pytest.raises(DecryptionError):
        server.finish(f4)
    _is_dead(server)


def test_a_flight_of_one_session_does_not_fit_another_at_the_same_time(parties: Any) -> None:
    pairs = [(parties.server(), parties.client()) for _ in range(2)]
    thirds = [server.flight3(client.flight2(server.flight1())) for server, client in pairs]
    with pytest.raises(DecryptionError):
        pairs[0][1].flight4(thirds[1])
    fourth, _ = pairs[1][1].flight4(thirds[1])
    with pytest.raises(DecryptionError):
        pairs[0][0].finish(fourth)
    _is_dead(pairs[0][0])


# Reorder and reflection: each flight where it does not belong.


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("step", range(1, 5))
def test_a_flight_at_another_step_is_refused(parties: Any, index: int, step: int) -> None:
    server, client = parties.server(), parties.client()
    f1 = server.flight1()
    f2 = parties.client().flight2(f1) if step == 1 else client.flight2(f1)
    if step == 1:
        receiver: Any = client.flight2
        flights = [f1, f2, *parties.shake()[0][2:]]
    elif step == 2:
        receiver = server.flight3
        flights = [f1, f2, *parties.shake()[0][2:]]
    else:
        f3 = server.flight3(f2)
        if step == 3:
            receiver, flights = client.flight4, [f1, f2, f3, parties.shake()[0][3]]
        else:
            receiver, flights = server.finish, [f1, f2, f3, client.flight4(f3)[0]]
    if index == step - 1:
        receiver(flights[index])
        return
    with pytest.raises((WireError, DecryptionError)):
        receiver(flights[index])
    _is_dead(receiver.__self__)


# Alteration anywhere.


@_SETTINGS
@given(index=st.integers(0, 3), bit=st.integers(0, 1 << 20))
def test_one_flipped_bit_anywhere_gives_no_session(
    parties: Any, flip: Callable[[bytes, int], bytes], index: int, bit: int
) -> None:
    _assert_no_session(parties, lambda i, flight: flip(flight, bit) if i == index else flight, index)


@_SETTINGS
@given(index=st.integers(0, 3), size=st.integers(0, 5000), tail=st.binary(max_size=3))
def test_a_cut_or_longer_flight_gives_no_session(parties: Any, index: int, size: int, tail: bytes) -> None:
    def alter(i: int, flight: bytes) -> bytes:
        altered = flight[: size % len(flight)] if not tail else flight + tail
        return altered if i == index else flight

    _assert_no_session(parties, alter, index)


def _assert_no_session(parties: Any, alter: Callable[[int, bytes], bytes], index: int) -> None:
    """The receiver of flight `index` refuses it; for F1 the server may be the one that notices, in F2."""
    server, client = parties.server(), parties.client()
    sessions: list[channel.Session] = []
    with pytest.raises((ChannelError, WireError)):
        f2 = client.flight2(alter(0, server.flight1()))
        f3 = server.flight3(alter(1, f2))
        f4, session = client.flight4(alter(2, f3))
        sessions.append(session)
        sessions.append(server.finish(alter(3, f4)))
    # An altered F4 leaves the client with a session in which the server never speaks.
    assert len(sessions) == (1 if index == 3 else 0)
    _is_dead(client if index == 2 else server) if index else None


@_SETTINGS
@given(blob=st.binary(max_size=3000))
def test_any_bytes_as_a_flight_raise_only_errors_of_the_tree(parties: Any, blob: bytes) -> None:
    fresh, waiting_server, waiting_client, last = parties.client(), parties.server(), parties.client(), parties.server()
    waiting_client.flight2(waiting_server.flight1())
    last.flight3(parties.client().flight2(last.flight1()))
    for receive in (fresh.flight2, waiting_server.flight3, waiting_client.flight4, last.finish):
        with pytest.raises(CloisterError):
            receive(blob)


def test_a_flight_over_the_limit_is_not_read(parties: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = parties.server(), parties.client()
    with pytest.raises(LimitExceededError):
        parties.client().flight2(bytes(2000))
    f3 = server.flight3(client.flight2(server.flight1()))
    monkeypatch.setattr(_handshake, "MAX_FLIGHT_BYTES", 100)
    with pytest.raises(LimitExceededError):
        client.flight4(f3)
    with pytest.raises(LimitExceededError):
        server.finish(bytes(101))


def test_parts_of_another_length_are_refused(parties: Any) -> None:
    f1 = wire.enc(bytes(31), bytes(1217))
    with pytest.raises(MalformedMessageError, match="wrong length"):
        parties.client().flight2(f1)


def test_an_ephemeral_key_that_gives_no_secret_is_refused(parties: Any) -> None:
    with pytest.raises(MalformedMessageError, match="not usable"):
        parties.client().flight2(wire.enc(bytes(32), bytes(1216)))


# Context, identity, evidence.


@pytest.mark.parametrize("field", range(5))
def test_parties_that_disagree_on_the_context_get_no_session(parties: Any, field: int) -> None:
    context = parties.other_contexts()[field]
    for server, client in (
        (parties.server(context), parties.client()),
        (parties.server(), parties.client(context)),
    ):
        with pytest.raises(DecryptionError):
            server.flight3(client.flight2(server.flight1()))
        _is_dead(server)


class _CountingProver:
    def __init__(self) -> None:
        self.n_calls = 0

    def prove(self, binding: channel.Binding) -> channel.Proof:
        self.n_calls += 1
        raise AssertionError("must not be asked")


def test_refused_evidence_means_no_flight4(parties: Any) -> None:
    def refuse(evidence: wire.Evidence, report_data: bytes) -> object:
        raise MeasurementMismatchError("other code")

    prover = _CountingProver()
    server, client = parties.server(), parties.client(verify_server=refuse, prove=prover)
    f3 = server.flight3(client.flight2(server.flight1()))
    with pytest.raises(MeasurementMismatchError):
        client.flight4(f3)
    assert prover.n_calls == 0
    _is_dead(client)


def test_evidence_of_other_hardware_is_refused(parties: Any) -> None:
    other = type(parties)()
    server, client = other.server(), parties.client()
    f3 = server.flight3(client.flight2(server.flight1()))
    with pytest.raises(EvidenceSignatureError):
        client.flight4(f3)


def test_genuine_evidence_relayed_between_two_honest_sessions_is_refused(parties: Any) -> None:
    """CVE-2026-33697: a relay that ends both handshakes itself and passes genuine evidence on."""
    asked: list[bytes] = []
    inner = parties.server()
    relay_as_client = parties.client(verify_server=lambda evidence, _: evidence)
    genuine = relay_as_client.flight4(inner.flight3(relay_as_client.flight2(inner.flight1())))[1].peer

    def pass_on(report_data: bytes) -> wire.Evidence:
        asked.append(report_data)
        assert isinstance(genuine, wire.Evidence)
        return genuine

    relay_as_server, victim = parties.server(make_evidence=pass_on), parties.client()
    f3 = relay_as_server.flight3(victim.flight2(relay_as_server.flight1()))
    with pytest.raises(MeasurementMismatchError):
        victim.flight4(f3)
    assert asked
    _is_dead(victim)


def test_a_client_without_the_node_key_is_refused(parties: Any) -> None:
    impostor = channel.NodeKeyProver(ec.generate_private_key(ec.SECP384R1()))
    server, client = parties.server(), parties.client(prove=impostor)
    f4, _ = client.flight4(server.flight3(client.flight2(server.flight1())))
    with pytest.raises(EvidenceSignatureError):
        server.finish(f4)
    _is_dead(server)


def test_a_proof_of_the_other_kind_is_refused(parties: Any) -> None:
    server, client = parties.server(), parties.client(prove=channel.EvidenceProver(parties.hardware.evidence))
    f4, _ = client.flight4(server.flight3(client.flight2(server.flight1())))
    with pytest.raises(EvidenceSignatureError):
        server.finish(f4)


def test_sealed_junk_in_place_of_evidence_is_refused(parties: Any) -> None:
    class Junk:
        def to_bytes(self) -> bytes:
            return b"junk"

    server, client = parties.server(make_evidence=lambda _: Junk()), parties.client()
    f3 = server.flight3(client.flight2(server.flight1()))
    with pytest.raises(MalformedMessageError):
        client.flight4(f3)
    _is_dead(client)


def test_an_interrupt_inside_a_step_ends_the_handshake(parties: Any) -> None:
    def interrupted(_: bytes) -> wire.Evidence:
        raise KeyboardInterrupt

    server, client = parties.server(make_evidence=interrupted), parties.client()
    f2 = client.flight2(server.flight1())
    with pytest.raises(KeyboardInterrupt):
        server.flight3(f2)
    _is_dead(server)
