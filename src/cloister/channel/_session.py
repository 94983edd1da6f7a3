"""A session: the records of one direction each, every one under a key of its own, in exact order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cloister import wire
from cloister.channel._chunked import Blob, decrypt_chunked, encrypt_chunked
from cloister.channel._kdf import CLIENT, HASH_BYTES, SERVER, SUITE_ID, derive_key, transcript
from cloister.errors import LimitExceededError, MalformedMessageError, NoSessionError, ReplayError, StaleEvidenceError

Role = Literal["server", "client"]

DEFAULT_MAX_SESSION_AGE_S = 86_400.0
_SERVER_NAME = "server"
_MAX_NODE_KEY_BYTES = 1024
_SEQ_BYTES = 8
_LENGTH_BYTES = 4


@dataclass(frozen=True)
class SessionContext:
    """What both sides must agree on before they talk; a difference in any field makes the handshake fail. *Public*.

    Attributes:
        run_id: the run.
        node_id: the client's name in the job; "server" is not one.
        server_policy_sha384: SHA-384 of the policy for the server role, 48 bytes.
        client_policy_sha384: SHA-384 of the policy for the client role, 48 bytes.
        node_public_key: the client node's registered key, DER SubjectPublicKeyInfo.

    Raises:
        WireError: a field is not of its form.
    """

    run_id: str
    node_id: str
    server_policy_sha384: bytes
    client_policy_sha384: bytes
    node_public_key: bytes

    def __post_init__(self) -> None:
        # A header has the same forms for its names, and refuses what cannot be sent later.
        wire.Header(self.run_id, 0, "context", _SERVER_NAME, self.node_id)
        if self.node_id == _SERVER_NAME:
            raise MalformedMessageError("a client cannot have the name server")
        if {len(self.server_policy_sha384), len(self.client_policy_sha384)} != {HASH_BYTES}:
            raise MalformedMessageError(f"a policy digest has {HASH_BYTES} bytes")
        if not 0 < len(self.node_public_key) <= _MAX_NODE_KEY_BYTES:
            raise MalformedMessageError(f"a node's public key has 1 to {_MAX_NODE_KEY_BYTES} bytes")

    def encode(self) -> bytes:
        """`ctx`: what the transcript starts with."""
        return wire.enc(
            self.run_id.encode(),
            self.node_id.encode(),
            self.server_policy_sha384,
            self.client_policy_sha384,
            SUITE_ID,
            self.node_public_key,
        )


class _Chain:
    """The key chain of one direction. A message key is used once; `advance` makes the ones before it unreachable."""

    __slots__ = ("_key", "direction", "seq")

    def __init__(self, direction: bytes, key: bytes) -> None:
        self.direction = direction
        self.seq = 0
        self._key = bytearray(key)

    def message_key(self) -> bytes:
        return derive_key(self._key, b"msg", self.seq.to_bytes(_SEQ_BYTES, "big"))

    def advance(self) -> None:
        following = derive_key(self._key, b"next", n_bytes=HASH_BYTES)
        self._key[:] = following
        self.seq += 1

    def erase(self) -> None:
        self._key[:] = bytes(HASH_BYTES)


class Session:
    """An open channel to one attested (or node-key proven) peer. Made by a handshake, lives in memory only.

    Safe to use from several threads; the order of records is the order of the calls.

    Attributes:
        session_id: 32 bytes, *public*, the same on both sides.
        peer: what the verifier proved about the other side.
        opened_at: `now()` when the handshake finished.
    """

    def __init__(
        self,
        *,
        role: Role,
        context: SessionContext,
        hs: bytes,
        th: bytes,
        peer: object,
        now: Callable[[], float],
        max_session_age_s: float,
    ) -> None:
        self.session_id = transcript(b"session-id", th)[:32]
        self.peer = peer
        self.opened_at = now()
        self._now = now
        self._max_session_age_s = max_session_age_s
        self._run_id = context.run_id
        self._lock = threading.Lock()
        self._closed = False
        server = _Chain(SERVER, derive_key(hs, b"app", SERVER, th, n_bytes=HASH_BYTES))
        client = _Chain(CLIENT, derive_key(hs, b"app", CLIENT, th, n_bytes=HASH_BYTES))
        if role == "server":
            self._out, self._in = server, client
            self._me, self._other = _SERVER_NAME, context.node_id
        else:
            self._out, self._in = client, server
            self._me, self._other = context.node_id, _SERVER_NAME

    def __repr__(self) -> str:
        return f"Session({self._me} with {self._other}, {self.session_id.hex()[:16]}, closed={self._closed})"

    def header(self, kind: str, *, round: int = 0, attempt: int = 0) -> wire.Header:  # noqa: A002 - the header's own name
        """The header of a record from this side to the peer."""
        return wire.Header(self._run_id, round, kind, self._me, self._other, attempt)

    def seal(self, header: wire.Header, plaintext: Blob) -> bytes:
        """Seal `plaintext` (*secret*) into the next record, which is *public*.

        A retry must send the same record again, not seal again: the peer accepts each sequence number once.

        Args:
            header: clear and authenticated; of this run, from this side to the peer. See `header`.
            plaintext: for the peer only.

        Raises:
            NoSessionError: the session was closed.
            StaleEvidenceError: the session is older than allowed; it is closed.
            MalformedMessageError: the header is of another run or pair.
            LimitExceededError: the plaintext is over `wire.MAX_MESSAGE_BYTES`.
        """
        if (header.run_id, header.sender, header.receiver) != (self._run_id, self._me, self._other):
            raise MalformedMessageError("the header is not from this side of the session to the other")
        if len(plaintext) > wire.MAX_MESSAGE_BYTES:
            raise LimitExceededError(
                f"plaintext of {len(plaintext)} bytes is over the limit of {wire.MAX_MESSAGE_BYTES}"
            )
        clear = header.to_bytes()
        with self._lock:
            self._check_alive()
            prefix = self._out.seq.to_bytes(_SEQ_BYTES, "big") + wire.enc(clear)
            context = self._context(self._out, clear)
            record = encrypt_chunked(self._out.message_key(), plaintext, context, prefix=prefix)
            self._out.advance()
        return record

    def open(self, record: Blob) -> tuple[wire.Header, bytes]:
        """Open the peer's next record into its header and plaintext (*secret*).

        Success means that the peer of this session sealed exactly this, as its next record, for this run and side. The
        caller must still check that kind, round and attempt are the expected ones. A record that does not open changes
        nothing: the genuine one still opens.

        Raises:
            NoSessionError: the session was closed.
            StaleEvidenceError: the session is older than allowed; it is closed.
            ReplayError: the sequence number is not the next: a repeat, a gap, or out of order.
            DecryptionError: altered anywhere, or of another session or direction.
            WireError: not a record.
        """
        seq, clear, sealed = _split(record)
        with self._lock:
            self._check_alive()
            if seq != self._in.seq:
                raise ReplayError(f"record {seq} came where record {self._in.seq} is next")
            plaintext = decrypt_chunked(self._in.message_key(), sealed, self._context(self._in, clear))
            header = wire.Header.parse(clear)
            if (header.run_id, header.sender, header.receiver) != (self._run_id, self._other, self._me):
                raise MalformedMessageError("the record's header is not from the peer to this side")
            self._in.advance()
        return header, plaintext

    def close(self) -> None:
        """Erase the keys (as far as Python can). Later use raises `NoSessionError`. Safe to call twice."""
        with self._lock:
            self._erase()

    def _erase(self) -> None:
        self._closed = True
        self._out.erase()
        self._in.erase()

    def _check_alive(self) -> None:
        if self._closed:
            raise NoSessionError(f"the session with {self._other} is closed")
        if self._now() - self.opened_at > self._max_session_age_s:
            self._erase()
            raise StaleEvidenceError(
                f"the session with {self._other} is older than {self._max_session_age_s:.0f} s",
                hint="shake hands again; the policy's max_session_age_s sets how long evidence is good for",
            )

    def _context(self, chain: _Chain, clear: bytes) -> bytes:
        return wire.enc(self.session_id, chain.direction, chain.seq.to_bytes(_SEQ_BYTES, "big"), clear)


def peek_header(record: Blob) -> tuple[int, wire.Header]:
    """Sequence number and header of a record, *unauthenticated*: for routing and logs, never for a decision.

    Raises:
        WireError: not a record.
    """
    seq, clear, _ = _split(record)
    return seq, wire.Header.parse(clear)


def _split(record: Blob) -> tuple[int, bytes, memoryview]:
    view = memoryview(record)
    if len(view) > wire.MAX_ENVELOPE_BYTES:
        raise LimitExceededError(f"record of {len(view)} bytes is over the limit of {wire.MAX_ENVELOPE_BYTES}")
    start = _SEQ_BYTES + _LENGTH_BYTES
    if len(view) < start:
        raise MalformedMessageError("record ends inside its sequence number or header")
    end = start + int.from_bytes(view[_SEQ_BYTES:start], "big")
    if end - start > wire.MAX_HEADER_BYTES or end > len(view):
        raise MalformedMessageError("record ends inside its header, or the header is too long")
    return int.from_bytes(view[:_SEQ_BYTES], "big"), bytes(view[start:end]), view[end:]
