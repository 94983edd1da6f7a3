"""Prediction: the client asks, sealed; the tuned far side answers, sealed, and never leaves the enclave."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloister.errors import (
    CloisterError,
    FederationError,
    MalformedMessageError,
    NoSessionError,
    StaleEvidenceError,
)
from cloister.federation._peer import ROUND, Peer
from cloister.wire import (
    Envelope,
    ErrorAnswer,
    Header,
    PredictAnswer,
    PredictRequest,
    RecordMessage,
    pack,
    parse_message,
)

if TYPE_CHECKING:
    from cloister.federation._split.far_work import FarWork


_log = logging.getLogger(__name__)

ANSWER_KIND = "predictions"
"""Kind tag of a prediction answer's body (spec/wire.md)."""


class PredictDesk:
    """Sessions of clients that ask for predictions; the handshake is the same F1-F4 as in training.

    Only the job's own clients may ask: each proves its registered node key in F4.
    """

    def __init__(self, new_peer: Callable[[str], Peer], far: FarWork) -> None:
        self._new_peer = new_peer
        self._far = far
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}

    def exchange(self, body: Mapping[str, Any], *, is_open: bool) -> dict[str, Any]:
        """One step: no blob starts a handshake and gives F1; F2 gives F3; F4 gives nothing; a record gives a record."""
        name, blob = body.get("client"), body.get("blob")
        if not isinstance(name, str) or not isinstance(blob, bytes):
            raise MalformedMessageError("exchange takes a client name and a blob")
        if not is_open:
            raise FederationError("the model is not trained yet", hint="wait until the run is done")
        with self._lock:
            if not blob:
                try:
                    self._peers[name] = self._new_peer(name)
                except KeyError as error:
                    raise FederationError(f"{name} is no client of this run", peer=name) from error
                self._peers[name].connect()
                return {"blob": self._peers[name].outstanding or b""}
            peer = self._peers.get(name)
            if peer is None:
                raise FederationError(f"client {name} has not started a handshake", peer=name)
            return {"blob": self._advance(peer, blob)}

    def close(self) -> None:
        with self._lock:
            for peer in self._peers.values():
                peer.close()
            self._peers.clear()

    def _advance(self, peer: Peer, blob: bytes) -> bytes:
        if peer.session is None:
            peer.receive(blob)
            return peer.outstanding or b""
        try:
            header, plaintext = peer.session.open(Envelope.parse(blob).body)
        except (NoSessionError, StaleEvidenceError):
            return Envelope.for_error(NoSessionError).to_bytes()  # it aged: the client shakes hands again
        if header.sender != peer.name or header.receiver != "server":
            raise MalformedMessageError("the record is not from this client")
        try:
            answer: RecordMessage = self._answer(parse_message(plaintext))
        except CloisterError as error:
            _log.warning("a question of %s failed: %s", peer.name, error.cause)
            answer = ErrorAnswer(error.code)
        reply = Header(header.run_id, ROUND, answer.KIND, "server", peer.name, header.attempt)
        return Envelope("record", peer.session.seal(reply, answer.to_bytes())).to_bytes()

    def _answer(self, message: RecordMessage) -> RecordMessage:
        from cloister.train import decode_shard

        if not isinstance(message, PredictRequest):
            raise MalformedMessageError(f"{message.KIND} is no question")
        shard = decode_shard(message.body, hidden_size=self._far.hidden_size, task=self._far.task, labelled=False)
        return PredictAnswer(pack(ANSWER_KIND, {"answers": self._far.predict(shard)}))
