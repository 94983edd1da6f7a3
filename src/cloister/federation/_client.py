"""One institution's client process (Method 2): answers the server enclave through the untrusted relay.

It releases nothing before it has verified the server enclave's evidence against this institution's own policy. Every
answer is kept until the next request, so a repeated request gets the same sealed bytes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloister._files import write_whole
from cloister.attest import Decision, verify_evidence
from cloister.channel import ClientHandshake, NodeKeyProver, Session, SessionContext
from cloister.errors import (
    AttestationError,
    CloisterError,
    JobMismatchError,
    MalformedMessageError,
    NoSessionError,
)
from cloister.wire import (
    Envelope,
    ErrorAnswer,
    Evidence,
    FinishAnswer,
    FinishRequest,
    Header,
    Manifest,
    PrepareProgress,
    PrepareRequest,
    RecordMessage,
    parse_message,
)

from ._keys import load_node_key, spki
from ._report import parse_report, report_data

if TYPE_CHECKING:
    from cloister.train import NearRun

    from ._plan import ClientPlan

_log = logging.getLogger(__name__)


class ServerLink:
    """The client's end of the channel to the server enclave: handshake, policy decision, session.

    Args:
        prover: proves this client's registered node key in F4.
        on_decision: told of every decision about the server's evidence, accepted or not.
    """

    def __init__(
        self,
        plan: ClientPlan,
        *,
        now: Callable[[], float],
        on_decision: Callable[[Decision | AttestationError], None],
    ) -> None:
        self._plan = plan
        self._now = now
        self._on_decision = on_decision
        key = load_node_key(plan.node_key)
        self._prover = NodeKeyProver(key)
        self._public_key = spki(key.public_key())
        self._handshake: ClientHandshake | None = None
        self.session: Session | None = None

    def context(self) -> SessionContext:
        plan = self._plan
        return SessionContext(plan.run_id, plan.name, plan.server_policy_sha384, plan.policy.sha384, self._public_key)

    def flight2(self, flight1: bytes) -> bytes:
        self._handshake = ClientHandshake(
            self.context(),
            prove=self._prover,
            verify_server=self._verify,
            now=self._now,
            max_session_age_s=self._plan.policy.max_session_age_s,
        )
        return self._handshake.flight2(flight1)

    def flight4(self, flight3: bytes) -> bytes:
        if self._handshake is None:
            raise NoSessionError("no handshake is under way")
        handshake, self._handshake = self._handshake, None
        flight4, session = handshake.flight4(flight3)
        if self.session is not None:
            self.session.close()
        self.session = session
        return flight4

    def require_session(self) -> Session:
        if self.session is None:
            raise NoSessionError("no session with the server enclave")
        return self.session

    def verify(self, evidence: Evidence, data: bytes) -> Decision:
        """Appraises the server's evidence under this client's policy. Success means: an enclave that the policy
        allows made this evidence for exactly these 64 bytes."""
        return verify_evidence(evidence, self._plan.policy, role="server", report_data=data, now=int(self._now()))

    def _verify(self, evidence: Evidence, data: bytes) -> Decision:
        try:
            decision = self.verify(evidence, data)
        except AttestationError as error:
            self._on_decision(error)
            raise
        self._on_decision(decision)
        return decision


class ClientRun:
    """Answers opaque requests that the courier brings (`handle`); works on the data in a thread of its own."""

    def __init__(
        self,
        plan: ClientPlan,
        *,
        near_run: Callable[[Callable[[int, int, int], None], threading.Event], NearRun],
        now: Callable[[], float],
        emit: Callable[..., None],
    ) -> None:
        self._plan = plan
        self._near_run = near_run
        self._emit = emit
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._link = ServerLink(plan, now=now, on_decision=self._tell_decision)
        self._answers: dict[str, tuple[bytes, bytes]] = {}
        self._worker: threading.Thread | None = None
        self._progress = (0, 0, 0)
        self._manifest: Manifest | None = None
        self._failure: CloisterError | None = None
        self._idle = threading.Event()

    def handle(self, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One call of the courier. `body` is untrusted."""
        if method == "request" and isinstance(body.get("blob"), bytes):
            with self._lock:
                return {"blob": self._request(body["blob"])}
        if method == "stop":
            self.stop()
            return {}
        raise MalformedMessageError(f"unknown host call {method!r}")

    def stop(self) -> None:
        self._stop.set()

    def wait_for_stop(self) -> None:
        """Blocks until this institution's own side says stop."""
        self._stop.wait()

    def _request(self, blob: bytes) -> bytes:
        try:
            envelope = Envelope.parse(blob)
            digest = hashlib.sha256(blob).digest()
            last = self._answers.get(envelope.kind)
            if last is not None and last[0] == digest:
                return last[1]
            answer = self._answer(envelope).to_bytes()
        except CloisterError as error:
            # Only the stable code leaves; what happened stands in this institution's own log.
            _log.warning("answering %s: %s", error.code, error.cause)
            return Envelope.for_error(error).to_bytes()
        self._answers[envelope.kind] = (digest, answer)
        return answer

    def _answer(self, envelope: Envelope) -> Envelope:
        if envelope.kind == "f1":
            return Envelope("f2", self._link.flight2(envelope.body))
        if envelope.kind == "f3":
            return Envelope("f4", self._link.flight4(envelope.body))
        if envelope.kind == "record":
            return self._answer_record(envelope.body)
        raise MalformedMessageError(f"a client does not take {envelope.kind}")

    def _answer_record(self, record: bytes) -> Envelope:
        session = self._link.require_session()
        header, plaintext = session.open(record)
        if header.run_id != self._plan.run_id or header.sender != "server" or header.receiver != self._plan.name:
            raise MalformedMessageError("the record is not for this client and run")
        try:
            answer = self._serve(parse_message(plaintext))
        except CloisterError as error:
            self._tell_error(error)
            answer = ErrorAnswer(error.code)
        reply = Header(header.run_id, header.round, answer.KIND, self._plan.name, "server", header.attempt)
        return Envelope("record", session.seal(reply, answer.to_bytes()))

    def _serve(self, message: RecordMessage) -> RecordMessage:
        if isinstance(message, PrepareRequest):
            return self._prepare(message)
        if isinstance(message, FinishRequest):
            return self._finish(message)
        raise MalformedMessageError(f"a client does not answer {message.KIND}")

    # --- prepare ------------------------------------------------------------------------------------------------

    def _prepare(self, request: PrepareRequest) -> RecordMessage:
        if request.job_sha384 != self._plan.job_sha384:
            raise JobMismatchError("the server asks for a job that this client has not approved", peer="server")
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="near-run", daemon=True)
            self._worker.start()
        self._idle.wait(timeout=request.patience_s)
        if self._failure is not None:
            raise self._failure
        if self._manifest is not None:
            return self._manifest
        n_done, n_total, n_bytes = self._progress
        return PrepareProgress(n_done, n_total, n_bytes)

    def _work(self) -> None:
        try:
            self._manifest = self._near_run(self._tell_progress, self._stop).run(self._plan.datasets)
        except CloisterError as error:
            self._failure = error
        finally:
            self._idle.set()

    def _tell_progress(self, n_done: int, n_total: int, n_bytes: int) -> None:
        self._progress = (n_done, n_total, n_bytes)
        self._emit("progress", client=self._plan.name, n_done=n_done, n_total=n_total, n_bytes=n_bytes)

    # --- finish -------------------------------------------------------------------------------------------------

    def _finish(self, request: FinishRequest) -> RecordMessage:
        """Keeps the report only once the evidence over it verifies: it was made by the enclave that trained."""
        self._link.verify(Evidence.parse(request.evidence), report_data(request.report))
        parse_report(request.report)
        work = self._plan.work
        write_whole(work / "report.json", request.report)
        write_whole(work / "report.evidence", request.evidence)
        if request.release:
            write_whole(work / "release.safetensors", request.release)
        self._emit("finished", client=self._plan.name, report=str(work / "report.json"))
        return FinishAnswer(hashlib.sha384(request.report).digest())

    # --- what this institution's own people see -------------------------------------------------------------------

    def _tell_decision(self, decision: Decision | AttestationError) -> None:
        if isinstance(decision, AttestationError):
            self._emit("evidence", client=self._plan.name, accepted=False, reasons=list(decision.reasons),
                       error=decision.code, claims={})  # fmt: skip
            self._tell_error(decision)
        else:
            self._emit("evidence", client=self._plan.name, accepted=True, reasons=list(decision.reasons),
                       claims=decision.claims.to_dict())  # fmt: skip

    def _tell_error(self, error: CloisterError) -> None:
        self._emit("error", code=error.code, cause=error.cause, hint=error.hint, exit_code=error.exit_code,
                   peer=self._plan.name)  # fmt: skip
