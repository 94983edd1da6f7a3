"""One institution's client process: answers the server enclave through the untrusted relay, in either method.

It releases nothing before it has verified the server enclave's evidence against this institution's own policy. Every
answer is kept until the next request, so a repeated request gets the same sealed bytes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cloister._files import write_whole
from cloister.attest import Decision, verify_evidence
from cloister.channel import ClientHandshake, ClientProver, NodeKeyProver, Session, SessionContext
from cloister.errors import (
    AttestationError,
    ChannelError,
    CloisterError,
    JobMismatchError,
    MalformedMessageError,
    NoSessionError,
    PolicyRejectedError,
    RollbackError,
    StaleEvidenceError,
    WireError,
)
from cloister.wire import (
    Envelope,
    ErrorAnswer,
    Evidence,
    FinishAnswer,
    FinishRequest,
    Header,
    RecordMessage,
    parse_message,
)

from ._keys import load_node_key, spki
from ._policy_file import PolicyFile
from ._report import parse_report, report_data

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from cloister.attest import Policy

    from ._plan import ClientPlan

_log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_UNANSWERED = 3
"""Handshakes under a changed policy that the server does not answer, before the policy is taken for the reason. Below
the server's own patience (`MAX_STRIKES`), so that the clear error comes first."""

REPORT_FILE = "report.json"
"""What a client keeps of a finished run; also its memory of how far the server has come."""


EVIDENCE_FILE, REPORT_DATA_FILE = "server.evidence", "server.report-data"
"""The server enclave's evidence of the last handshake, and the 64 bytes (hex) that this client expected in it."""


class ServerLink:
    """The client's end of the channel to the server enclave: handshake, policy decision, session.

    The session ends when it is older than the policy's `max_session_age_s`, and when the policy changes: every use of
    it then raises `NoSessionError`, and only a new handshake, under the policy of that moment, opens another.

    Args:
        prove: makes the prover of F4 from the node's private key; by default the key alone.
        on_decision: told of every decision about the server's evidence, accepted or not.
        policy_source: this client's policy now; by default what the file of `plan.policy` holds.
    """

    def __init__(
        self,
        plan: ClientPlan,
        *,
        now: Callable[[], float],
        on_decision: Callable[[Decision | AttestationError], None],
        policy_source: Callable[[], Policy] | None = None,
        prove: Callable[[ec.EllipticCurvePrivateKey], ClientProver] = NodeKeyProver,
    ) -> None:
        self._plan = plan
        self._now = now
        self._on_decision = on_decision
        self._current_policy = policy_source or PolicyFile(plan.policy)
        self._policy = plan.policy
        self._n_unanswered = 0
        key = load_node_key(plan.node_key)
        self._prover = prove(key)
        self._public_key = spki(key.public_key())
        self._handshake: ClientHandshake | None = None
        self.session: Session | None = None

    def context(self) -> SessionContext:
        """What this client binds into a handshake; where the run has one policy for both roles, its hash twice."""
        plan, mine = self._plan, self._policy.sha384
        server = mine if plan.server_policy_sha384 == plan.policy.sha384 else plan.server_policy_sha384
        return SessionContext(plan.run_id, plan.name, server, mine, self._public_key)

    def flight2(self, flight1: bytes) -> bytes:
        """Answers F1, under the policy of this moment.

        Raises:
            PolicyRejectedError: the policy was changed, and the server enclave does not work by the new one.
            ConfigError: the policy cannot be read.
        """
        policy = self._current_policy()
        if policy.sha384 != self._policy.sha384:
            self._policy, self._n_unanswered = policy, 0
            self.close()
        self._n_unanswered += 1
        if policy.sha384 != self._plan.policy.sha384 and self._n_unanswered > MAX_UNANSWERED:
            self._n_unanswered = 0  # a server that is started anew is met without prejudice
            raise PolicyRejectedError(
                f"the policy {policy.source} was changed during the run (SHA-384 {policy.sha384.hex()[:16]}…), and the "
                "server enclave does not work by it",
                hint="start the server enclave anew with the same policy, or put the old policy back",
            )
        self._handshake = ClientHandshake(
            self.context(),
            prove=self._prover,
            verify_server=self._verify,
            now=self._now,
            max_session_age_s=policy.max_session_age_s,
        )
        return self._handshake.flight2(flight1)

    def flight4(self, flight3: bytes) -> bytes:
        """Verifies the server in F3, and only then proves this client and opens the session."""
        handshake, self._handshake = self._handshake, None
        if handshake is None:
            raise NoSessionError("no handshake is under way")
        self._require_same_policy()
        flight4, session = handshake.flight4(flight3)
        self.close()
        self.session = session
        self._n_unanswered = 0
        return flight4

    def open(self, record: bytes) -> tuple[Header, bytes]:
        """Opens the server's next record.

        Raises:
            NoSessionError: none is open, or it ended by age or by a change of policy: shake hands again.
            ChannelError, WireError: as `Session.open`.
        """
        return self._use(lambda session: session.open(record))

    def seal(self, header: Header, plaintext: bytes) -> bytes:
        """Seals the next record to the server; raises as `open` does."""
        return self._use(lambda session: session.seal(header, plaintext))

    def close(self) -> None:
        """Erases the session's keys."""
        if self.session is not None:
            self.session.close()
        self.session = None

    def verify(self, evidence: Evidence, data: bytes) -> Decision:
        """Appraises the server's evidence under this client's policy. Success means: an enclave that the policy
        allows made this evidence for exactly these 64 bytes."""
        return verify_evidence(evidence, self._policy, role="server", report_data=data, now=int(self._now()))

    def _use(self, use: Callable[[Session], T]) -> T:
        if self.session is None:
            raise NoSessionError("no session with the server enclave")
        self._require_same_policy()
        try:
            return use(self.session)
        except StaleEvidenceError as error:
            self.close()
            raise NoSessionError(error.cause, hint=error.hint) from error

    def _require_same_policy(self) -> None:
        if self._current_policy().sha384 != self._policy.sha384:
            self.close()
            raise NoSessionError(f"the policy {self._policy.source} was changed: shake hands under the new one")

    def _verify(self, evidence: Evidence, data: bytes) -> Decision:
        # Kept before it is judged: a person can look at what was refused, and make a policy of what was not.
        write_whole(self._plan.work / EVIDENCE_FILE, evidence.to_bytes())
        write_whole(self._plan.work / REPORT_DATA_FILE, data.hex().encode())
        try:
            decision = self.verify(evidence, data)
        except AttestationError as error:
            self._on_decision(error)
            raise
        self._on_decision(decision)
        return decision


class ClientWork(Protocol):
    """What one method does on a client's side."""

    def serve(self, message: RecordMessage) -> RecordMessage:
        """Answer a request of the verified server enclave; within the request's patience, by progress if need be.

        Raises:
            CloisterError: the work failed; the server is told the code.
        """
        ...

    def stop(self) -> None:
        """End at the next step."""
        ...

    def keep_release(self, release: bytes) -> None:
        """Keep what the job lets leave the server enclave. *Secret* until here; from now on this institution's own."""
        ...


class ClientRun:
    """Answers opaque requests that the courier brings (`handle`). What a method asks for, its `ClientWork` does.

    Args:
        work: this institution's part of the method; told through `emit`, ended by `stop`.
        prove: makes the prover of F4 from the node's private key; by default the key alone (a client without a TEE).
    """

    def __init__(
        self,
        plan: ClientPlan,
        work: ClientWork,
        *,
        now: Callable[[], float],
        emit: Callable[..., None],
        prove: Callable[[ec.EllipticCurvePrivateKey], ClientProver] = NodeKeyProver,
    ) -> None:
        self._plan = plan
        self._work = work
        self._emit = emit
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._link = ServerLink(plan, now=now, on_decision=self._tell_decision, prove=prove)
        self._answers: dict[str, tuple[bytes, bytes]] = {}
        self._told: CloisterError | None = None

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
        """Ends this side's work at its next step."""
        self._work.stop()
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
            if error is not self._told and not isinstance(error, (ChannelError, WireError)):
                self._tell_error(error)
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
        header, plaintext = self._link.open(record)
        if header.run_id != self._plan.run_id or header.sender != "server" or header.receiver != self._plan.name:
            raise MalformedMessageError("the record is not for this client and run")
        try:
            answer = self._serve(parse_message(plaintext))
        except CloisterError as error:
            self._tell_error(error)
            answer = ErrorAnswer(error.code)
        reply = Header(header.run_id, header.round, answer.KIND, self._plan.name, "server", header.attempt)
        # The session may have ended by now: then the server asks again in the next one, which changes nothing here.
        return Envelope("record", self._link.seal(reply, answer.to_bytes()))

    def _serve(self, message: RecordMessage) -> RecordMessage:
        if isinstance(message, FinishRequest):
            return self._finish(message)
        if self._kept_report() is not None:
            raise RollbackError(
                "the server enclave asks for data of a run whose report it has already delivered",
                hint="its sealed state was replaced by an older one, or removed; predictions still work on the newest",
            )
        job_sha384 = getattr(message, "job_sha384", self._plan.job_sha384)
        if job_sha384 != self._plan.job_sha384:
            raise JobMismatchError("the server asks for a job that this client has not approved", peer="server")
        return self._work.serve(message)

    # --- finish -------------------------------------------------------------------------------------------------

    def _finish(self, request: FinishRequest) -> RecordMessage:
        """Keeps the report only once the evidence over it verifies: it was made by the enclave that trained."""
        self._link.verify(Evidence.parse(request.evidence), report_data(request.report))
        parse_report(request.report)
        if self._kept_report() not in (None, request.report):
            raise RollbackError(
                "the server enclave delivers a second, different report of this run",
                hint="its sealed state was replaced by an older one, and the run went again; the first report is kept",
            )
        work = self._plan.work
        write_whole(work / REPORT_FILE, request.report)
        write_whole(work / "report.evidence", request.evidence)
        if request.release:
            self._work.keep_release(request.release)
        self._emit("finished", client=self._plan.name, report=str(work / REPORT_FILE))
        return FinishAnswer(hashlib.sha384(request.report).digest())

    def _kept_report(self) -> bytes | None:
        """What this client remembers of the server's progress: the host can turn back the server's files, not these."""
        path = self._plan.work / REPORT_FILE
        return path.read_bytes() if path.exists() else None

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
        self._told = error
        self._emit("error", code=error.code, cause=error.cause, hint=error.hint, exit_code=error.exit_code,
                   peer=self._plan.name)  # fmt: skip
