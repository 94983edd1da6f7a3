"""A client asks the tuned model: the same handshake as in training, then sealed questions and sealed answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cloister.errors import (
    ChannelError,
    FederationError,
    NoSessionError,
    PeerError,
    PolicyRejectedError,
    error_for_code,
)
from cloister.federation._client import ServerLink
from cloister.federation._peer import ROUND
from cloister.federation._split.answers import ANSWER_KIND
from cloister.wire import (
    MAX_PREDICT_BYTES,
    Envelope,
    ErrorAnswer,
    Header,
    PredictAnswer,
    PredictRequest,
    parse_message,
    unpack,
)

if TYPE_CHECKING:
    from cloister.federation._plan import ClientPlan

_log = logging.getLogger(__name__)


class Questioner:
    """One client's sealed conversation with the server enclave.

    Args:
        exchange: carries one opaque blob to the enclave and brings its answer; untrusted.
        link: this client's end of the channel; it decides about the enclave's evidence.
    """

    def __init__(self, plan: ClientPlan, link: ServerLink, exchange: Callable[[bytes], bytes]) -> None:
        self._plan = plan
        self._link = link
        self._exchange = exchange
        self._attempt = 0

    def connect(self) -> None:
        """Handshake F1-F4. Success means: the enclave's evidence was accepted under this client's policy.

        Raises:
            AttestationError: it was not, or the enclave works by another policy; nothing but handshake flights has been
                sent.
        """
        flight1 = self._expect("f1", self._exchange(b""))
        answer = self._exchange(Envelope("f2", self._link.flight2(flight1)).to_bytes())
        if answer and Envelope.parse(answer).kind == "f1":
            raise PolicyRejectedError(
                "the server enclave does not work by the same run, node key and policy as this client",
                hint=f"this client's policy is {self._plan.policy.source or 'not from a file'}; compare policy_sha384",
            )
        flight3 = self._expect("f3", answer)
        self._exchange(Envelope("f4", self._link.flight4(flight3)).to_bytes())

    def ask(self, body: bytes) -> list[dict[str, Any]]:
        """One sealed question (a shard body of boundary tensors), one answer per example in it.

        Raises:
            PeerError: the enclave answers with an error.
        """
        request = PredictRequest(body)
        try:
            reply, plaintext = self._exchange_record(request)
        except NoSessionError:
            # Aged on either side, or this client's policy was changed: attest again and ask again, once.
            self.connect()
            reply, plaintext = self._exchange_record(request)
        if reply.sender != "server" or reply.attempt != self._attempt:
            raise ChannelError("the answer belongs to another question")
        answer = parse_message(plaintext)
        if isinstance(answer, ErrorAnswer):
            raise PeerError(f"the server enclave answered {answer.code}", peer="server", peer_code=answer.code)
        if not isinstance(answer, PredictAnswer):
            raise PeerError(f"the server enclave answered {answer.KIND}", peer="server", peer_code="wire.malformed")
        return unpack(answer.body, ANSWER_KIND, max_bytes=MAX_PREDICT_BYTES)["answers"]

    def _exchange_record(self, request: PredictRequest) -> tuple[Header, bytes]:
        self._attempt += 1
        header = Header(self._plan.run_id, ROUND, request.KIND, self._plan.name, "server", self._attempt)
        record = Envelope("record", self._link.seal(header, request.to_bytes())).to_bytes()
        return self._link.open(self._expect("record", self._exchange(record)))

    def _expect(self, kind: str, blob: bytes) -> bytes:
        if not blob:
            raise FederationError(f"the server enclave sent nothing where {kind} is due", peer="server")
        envelope = Envelope.parse(blob)
        if envelope.kind == "error":
            code = envelope.error_code
            raise error_for_code(code)(f"the server enclave answered {code}")
        if envelope.kind != kind:
            raise ChannelError(f"the server enclave sent {envelope.kind} where {kind} is due")
        return envelope.body
