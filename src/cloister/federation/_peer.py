"""One client as the server enclave sees it: handshake, session, and the one request that is under way.

Every request is kept until it is answered and is sent again as the same ciphertext, so any courier, SuperNode or
SuperLink between the two ends may die at any moment without a message being lost or counted twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloister.channel import ClientVerifier, NodeKeyVerifier, ServerHandshake, Session, SessionContext
from cloister.errors import (
    AttestationError,
    ChannelError,
    CloisterError,
    MeasurementMismatchError,
    NoSessionError,
    PeerError,
    PolicyRejectedError,
    StaleEvidenceError,
    WireError,
    error_for_code,
)
from cloister.wire import Envelope, Evidence, Header, RecordMessage, parse_message

if TYPE_CHECKING:
    from cloister.attest import Attester

_log = logging.getLogger(__name__)

ROUND = 1
"""Of every message outside of Method 1's rounds: in Method 2 each example crosses once, whatever the epochs."""

MAX_STRIKES = 5
"""Unusable answers from one peer without an answered request in between, before it counts as failed. A handshake that
succeeds does not count as an answer: a session that ages faster than the client answers must end the run some day."""

_HINT = "the relay damages messages, or the client's node key is not the registered one"
_HINT_AT_F2 = (
    "the parties disagree on the run, the client's name, its node key or the policy (compare policy_sha384), or the "
    "relay damages messages"
)


class Peer:
    """The server's end of the link to one client. The caller serialises access.

    Attributes:
        name: the client's name in the job.
        outstanding: envelope bytes (public: ciphertext or handshake flight) that wait for an answer.
        in_flight: whether `outstanding` was handed to a courier, which has not come back with an answer.
        failed: stable error code once the peer is out of the run.
        cause: what this side found of it then; empty where the client alone knows.
    """

    def __init__(
        self,
        name: str,
        context: SessionContext,
        attester: Attester,
        *,
        verify_client: ClientVerifier | None = None,
        max_age_s: float,
        now: Callable[[], float],
    ) -> None:
        self.name = name
        self._context = context
        self._attester = attester
        self._verify_client = verify_client or NodeKeyVerifier(context.node_public_key)
        self._max_age_s = max_age_s
        self._now = now
        self._handshake: ServerHandshake | None = None
        self._awaits = ""
        self._strikes = 0
        self._attempt = 0
        self._round = ROUND
        self.session: Session | None = None
        self.outstanding: bytes | None = None
        self.in_flight = False
        self.last_seen = now()
        self.failed = ""
        self.cause = ""

    def __repr__(self) -> str:
        return f"Peer({self.name!r}, awaits={self._awaits!r}, open={self.session is not None}, failed={self.failed!r})"

    @property
    def is_ready(self) -> bool:
        """Whether a request can be sealed now."""
        return self.session is not None and self.outstanding is None and not self.failed

    def connect(self) -> None:
        """Starts a handshake (F1). Whatever was under way on an older session is given up."""
        self.close()
        self._handshake = ServerHandshake(
            self._context,
            make_evidence=self._make_evidence,
            verify_client=self._verify_client,
            now=self._now,
            max_session_age_s=self._max_age_s,
        )
        self._expect("f2", Envelope("f1", self._handshake.flight1()))

    def request(self, message: RecordMessage, *, n_round: int = ROUND) -> None:
        """Seals one message to the client; its answer comes out of `receive`, in the same round."""
        if self.session is None:
            raise NoSessionError(f"no session with client {self.name}")
        if self._now() - self.session.opened_at > self._max_age_s:
            self.connect()  # full attestation anew; the run asks again once the new session stands
            return
        self._attempt += 1
        self._round = n_round
        header = Header(self._context.run_id, n_round, message.KIND, "server", self.name, self._attempt)
        self._expect("record", Envelope("record", self.session.seal(header, message.to_bytes())))

    def receive(self, blob: bytes) -> RecordMessage | None:
        """Takes what the relay says is the client's answer.

        Returns:
            The opened message, or None when the answer was a handshake flight, stale, or unusable.

        Raises:
            PeerError: the client refused for good (its policy rejects this enclave, or another job).
        """
        self.last_seen = self._now()
        try:
            envelope = Envelope.parse(blob)
            if envelope.kind == "error":
                self._peer_error(envelope.body.decode("ascii", "replace"))
                return None
            if envelope.kind != self._awaits:
                _log.info("%s: ignoring a stale %s", self.name, envelope.kind)
                return None
            message = self._advance(envelope)
        except (AttestationError, ChannelError, WireError) as error:
            self._strike(error)
            return None
        if message is not None:
            self._strikes = 0
        return message

    def close(self) -> None:
        """Erases the session's keys and forgets what was under way."""
        if self.session is not None:
            self.session.close()
        self.session = None
        self._handshake = None
        self.outstanding = None
        self.in_flight = False
        self._awaits = ""

    def _advance(self, envelope: Envelope) -> RecordMessage | None:
        if envelope.kind == "f2" and self._handshake is not None:
            self._expect("f4", Envelope("f3", self._handshake.flight3(envelope.body)))
            return None
        if envelope.kind == "f4" and self._handshake is not None:
            self.session = self._finished(self._handshake, envelope.body)
            self._handshake = None
            self._settle()
            return None
        if envelope.kind == "record" and self.session is not None:
            header, plaintext = self.session.open(envelope.body)
            if (header.run_id, header.round, header.sender, header.receiver, header.attempt) != (
                self._context.run_id,
                self._round,
                self.name,
                "server",
                self._attempt,
            ):
                raise ChannelError(f"record from client {self.name} answers another request")
            self._settle()
            return parse_message(plaintext)
        return None

    def _finished(self, handshake: ServerHandshake, flight4: bytes) -> Session:
        try:
            return handshake.finish(flight4)
        except (MeasurementMismatchError, PolicyRejectedError) as error:
            # The registered node key signed for this evidence: no other try will bring a better one.
            cause = f"the enclave of client {self.name} is refused: {error.cause}"
            self.fail(error.code, cause)
            raise PeerError(cause, peer=self.name, peer_code=error.code, hint=error.hint) from error

    def _expect(self, kind: str, envelope: Envelope) -> None:
        self._awaits = kind
        self.outstanding = envelope.to_bytes()
        self.in_flight = False

    def _settle(self) -> None:
        self._awaits = ""
        self.outstanding = None
        self.in_flight = False

    def _make_evidence(self, report_data: bytes) -> Evidence:
        return self._attester.evidence(report_data)

    def _peer_error(self, code: str) -> None:
        kind = error_for_code(code)
        if issubclass(kind, (ChannelError, WireError)):
            # The client lost its session (it restarted), or the relay damaged a flight: shake hands again.
            self._strike(kind(f"client {self.name} answered {code}"))
            return
        self.fail(code)
        raise PeerError(f"client {self.name} refused: {code}", peer=self.name, peer_code=code)

    def _strike(self, error: CloisterError) -> None:
        """An unusable answer. Keys are never reused for another try: either the same ciphertext goes again, or a new
        handshake starts; after MAX_STRIKES in a row the peer is out."""
        self._strikes += 1
        at_f2 = self._awaits == "f2"
        _log.warning("%s: unusable answer %d (%s)", self.name, self._strikes, error.code)
        if self._strikes >= MAX_STRIKES:
            self.fail(error.code)
            raise PeerError(
                f"client {self.name}: {self._strikes} unusable answers in a row, the last {error.code}",
                peer=self.name,
                peer_code=error.code,
                hint=_HINT_AT_F2 if at_f2 else _HINT,
            ) from error
        if self.session is None or isinstance(error, (NoSessionError, StaleEvidenceError)):
            self.connect()
        else:
            self.in_flight = False

    def fail(self, code: str, cause: str = "") -> None:
        """Puts the peer out of the run."""
        self.close()
        self.failed, self.cause = code, cause
