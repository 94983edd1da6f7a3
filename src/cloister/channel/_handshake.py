"""The handshake F1 to F4: two hybrid seeds, a transcript, and evidence bound to the session's secret.

    F1 S->C  nS, pkS                                        th = H(ctx, nS, pkS)
    F2 C->S  nC, pkC, c1 = HPKE(pkS, seedC, H(th,nC,pkC))   th = H(th, nC, pkC, c1)
    F3 S->C  c2 = HPKE(pkC, seedS, info=th); th = H(th, c2); evS sealed; th = H(th, evS)
    F4 C->S  client verifies the server's evidence FIRST; proof of the client sealed; th = H(th, proof)

Evidence carries SHA-512 over the transcript and an exporter of the secret, so genuine evidence of another session,
relayed between two honest ones, never fits. Normative: spec/wire.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager

from cloister import wire
from cloister.channel._chunked import ciphertext_size, decrypt_chunked, encrypt_chunked
from cloister.channel._hybrid import PUBLIC_KEY_BYTES, SEALED_SEED_BYTES, SEED_BYTES, EphemeralKey, seal_seed
from cloister.channel._kdf import CLIENT, HASH_BYTES, SERVER, V, derive_key, mac, sha512, transcript
from cloister.channel._proof import Binding, ClientProver, ClientVerifier, parse_proof
from cloister.channel._session import DEFAULT_MAX_SESSION_AGE_S, Role, Session, SessionContext
from cloister.errors import LimitExceededError, MalformedMessageError, ReplayError

NONCE_BYTES = 32
_LENGTH_BYTES = 4
_FLIGHT1_BYTES = 2 * _LENGTH_BYTES + NONCE_BYTES + PUBLIC_KEY_BYTES
_FLIGHT2_BYTES = _FLIGHT1_BYTES + _LENGTH_BYTES + SEALED_SEED_BYTES
MAX_FLIGHT_BYTES = 2 * _LENGTH_BYTES + SEALED_SEED_BYTES + ciphertext_size(wire.MAX_EVIDENCE_BYTES)


class _Handshake:
    """What both sides share: each step once and in order, the key schedule, and forgetting secrets."""

    def __init__(
        self, role: Role, context: SessionContext, *, now: Callable[[], float], max_session_age_s: float
    ) -> None:
        self._role: Role = role
        self._context = context
        self._now = now
        self._max_session_age_s = max_session_age_s
        self._next = 0
        self._th = b""
        self._hs = b""
        self._ex = b""
        self._ephemeral: list[EphemeralKey] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._context.node_id})"

    @contextmanager
    def _step(self, number: int) -> Generator[None]:
        """Run step `number` if it is the next; whatever goes wrong inside ends this handshake for good."""
        expected, self._next = self._next, -1
        try:
            if expected != number:
                raise ReplayError("a flight came twice, out of order, or after the handshake failed")
            yield
            self._next = number + 1
        finally:
            if self._next < 0:
                self._forget()

    def _forget(self) -> None:
        self._th = self._hs = self._ex = b""
        self._ephemeral.clear()

    def _absorb(self, *parts: bytes) -> None:
        self._th = transcript(self._th, *parts)

    def _generate_key(self) -> bytes:
        """Make the ephemeral key and return its public half; the private one is popped at its only use."""
        key = EphemeralKey()
        self._ephemeral.append(key)
        return key.public_bytes

    def _derive(self, seed_client: bytes, seed_server: bytes) -> None:
        self._hs = mac(self._th, wire.enc(seed_client, seed_server))
        self._ex = derive_key(self._hs, b"exporter", n_bytes=HASH_BYTES)

    def _binding(self, role: bytes) -> Binding:
        report_data = sha512(wire.enc(V, b"report-data", role, self._th, self._ex))
        return Binding(self._th, self._ex, report_data)

    def _seal(self, direction: bytes, payload: bytes) -> bytes:
        return encrypt_chunked(derive_key(self._hs, b"hs", direction), payload, wire.enc(V, b"flight", self._th))

    def _open(self, direction: bytes, sealed: bytes) -> bytes:
        return decrypt_chunked(derive_key(self._hs, b"hs", direction), sealed, wire.enc(V, b"flight", self._th))

    def _session(self, peer: object) -> Session:
        session = Session(
            role=self._role,
            context=self._context,
            hs=self._hs,
            th=self._th,
            peer=peer,
            now=self._now,
            max_session_age_s=self._max_session_age_s,
        )
        self._forget()
        return session


class ServerHandshake(_Handshake):
    """The server enclave's side: `flight1`, `flight3`, `finish`, each once and in this order.

    After any failure the object is dead: later calls raise `ReplayError`, and a new handshake starts at F1.

    Args:
        context: must be the same on both sides.
        make_evidence: evidence of this enclave over 64 bytes of report data.
        verify_client: accepts the client or raises.
        now: a clock in seconds; only differences count, so a monotonic one is best.
        max_session_age_s: how old the session may get before both sides must shake hands again.
    """

    def __init__(
        self,
        context: SessionContext,
        *,
        make_evidence: Callable[[bytes], wire.Evidence],
        verify_client: ClientVerifier,
        now: Callable[[], float],
        max_session_age_s: float = DEFAULT_MAX_SESSION_AGE_S,
    ) -> None:
        super().__init__("server", context, now=now, max_session_age_s=max_session_age_s)
        self._make_evidence = make_evidence
        self._verify_client = verify_client

    def flight1(self) -> bytes:
        """F1: a nonce and an ephemeral public key. *Public*."""
        with self._step(0):
            nonce, own_key = secrets.token_bytes(NONCE_BYTES), self._generate_key()
            self._th = transcript(self._context.encode(), nonce, own_key)
            return wire.enc(nonce, own_key)

    def flight3(self, flight2: bytes) -> bytes:
        """F3: this side's seed and its sealed evidence. *Public*: the relay learns neither.

        Raises:
            DecryptionError: F2 was altered, or is of another handshake or context.
            WireError: F2 does not parse.
            ReplayError: not the next step.
        """
        with self._step(1):
            client_nonce, client_key, sealed_seed = _parse(
                flight2, _FLIGHT2_BYTES, (NONCE_BYTES, PUBLIC_KEY_BYTES, SEALED_SEED_BYTES)
            )
            info = transcript(self._th, client_nonce, client_key)
            seed_client = self._ephemeral.pop().open_seed(sealed_seed, info)
            self._absorb(client_nonce, client_key, sealed_seed)
            seed_server = secrets.token_bytes(SEED_BYTES)
            own_sealed_seed = seal_seed(client_key, seed_server, self._th)
            self._absorb(own_sealed_seed)
            self._derive(seed_client, seed_server)
            evidence = self._make_evidence(self._binding(b"server").report_data).to_bytes()
            sealed_evidence = self._seal(SERVER, evidence)
            self._absorb(evidence)
            return wire.enc(own_sealed_seed, sealed_evidence)

    def finish(self, flight4: bytes) -> Session:
        """Verify the client's proof in F4.

        Success means that the peer of this session's secret is the client that `verify_client` accepts. Only now may
        the server send data.

        Raises:
            DecryptionError: F4 was altered, or is of another handshake.
            AttestationError: the verifier refuses the client.
            WireError: the proof does not parse.
            ReplayError: not the next step.
        """
        with self._step(2):
            _check_size(flight4)
            payload = self._open(CLIENT, flight4)
            peer = self._verify_client.verify(parse_proof(payload), self._binding(b"client"))
            self._absorb(payload)
            return self._session(peer)


class ClientHandshake(_Handshake):
    """The client's side: `flight2`, `flight4`, each once and in this order.

    After any failure the object is dead: later calls raise `ReplayError`, and a new handshake starts at F1.

    Args:
        context: must be the same on both sides.
        prove: proves this client, by node key or evidence.
        verify_server: takes the server's evidence and the 64 bytes of report data that it must carry; returns what was
            proven (it becomes `Session.peer`) or raises an `AttestationError`.
        now: a clock in seconds; only differences count, so a monotonic one is best.
        max_session_age_s: how old the session may get before both sides must shake hands again.
    """

    def __init__(
        self,
        context: SessionContext,
        *,
        prove: ClientProver,
        verify_server: Callable[[wire.Evidence, bytes], object],
        now: Callable[[], float],
        max_session_age_s: float = DEFAULT_MAX_SESSION_AGE_S,
    ) -> None:
        super().__init__("client", context, now=now, max_session_age_s=max_session_age_s)
        self._prove = prove
        self._verify_server = verify_server
        self._seed = b""

    def flight2(self, flight1: bytes) -> bytes:
        """F2: a nonce, an ephemeral public key and this side's sealed seed. *Public*; says nothing about any data.

        Raises:
            WireError: F1 does not parse.
            ReplayError: not the next step.
        """
        with self._step(0):
            server_nonce, server_key = _parse(flight1, _FLIGHT1_BYTES, (NONCE_BYTES, PUBLIC_KEY_BYTES))
            self._th = transcript(self._context.encode(), server_nonce, server_key)
            nonce, own_key = secrets.token_bytes(NONCE_BYTES), self._generate_key()
            self._seed = secrets.token_bytes(SEED_BYTES)
            sealed_seed = seal_seed(server_key, self._seed, transcript(self._th, nonce, own_key))
            self._absorb(nonce, own_key, sealed_seed)
            return wire.enc(nonce, own_key, sealed_seed)

    def flight4(self, flight3: bytes) -> tuple[bytes, Session]:
        """Verify the server's evidence in F3, and only then make F4 (*public*) and the session.

        Success means that the peer of this session's secret is the enclave that `verify_server` accepts. If it does
        not, there is no F4: nothing that only this client can say has been sent.

        Raises:
            AttestationError: the verifier refuses the server.
            DecryptionError: F3 was altered, or is of another handshake or context.
            WireError: F3 or the evidence does not parse.
            ReplayError: not the next step.
        """
        with self._step(1):
            _check_size(flight3)
            sealed_seed, sealed_evidence = wire.dec(flight3, 2, max_bytes=MAX_FLIGHT_BYTES)
            seed_server = self._ephemeral.pop().open_seed(sealed_seed, self._th)
            self._absorb(sealed_seed)
            self._derive(self._seed, seed_server)
            evidence = self._open(SERVER, sealed_evidence)
            peer = self._verify_server(wire.Evidence.parse(evidence), self._binding(b"server").report_data)
            self._absorb(evidence)
            proof = self._prove.prove(self._binding(b"client")).to_bytes()
            flight4 = self._seal(CLIENT, proof)
            self._absorb(proof)
            return flight4, self._session(peer)

    def _forget(self) -> None:
        super()._forget()
        self._seed = b""


def _parse(flight: bytes, n_bytes: int, lengths: tuple[int, ...]) -> tuple[bytes, ...]:
    parts = wire.dec(flight, len(lengths), max_bytes=n_bytes)
    if tuple(len(part) for part in parts) != lengths:
        raise MalformedMessageError("a part of the flight has the wrong length")
    return parts


def _check_size(flight: bytes) -> None:
    if len(flight) > MAX_FLIGHT_BYTES:
        raise LimitExceededError(f"flight of {len(flight)} bytes is over the limit of {MAX_FLIGHT_BYTES}")
