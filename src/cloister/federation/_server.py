"""The run inside the server enclave, in what both methods share: the host port, the clients, the report.

    prepare   every client: handshake F1-F4, then what the method needs of it before work begins
    train     the method's work
    evaluate  held-out examples of every client
    finish    the run report, signed by evidence over its hash, sealed to every client
    done      only what the method answers after a run

The host's courier polls and delivers opaque blobs; it decides nothing. What must survive a kill is in sealed files at
phase ends (and in the method's checkpoints), so a restarted enclave of the same measurement continues.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from cloister.channel import ClientVerifier, NodeKeyVerifier, SessionContext
from cloister.errors import (
    FederationError,
    InsufficientClientsError,
    MalformedMessageError,
    PeerError,
    error_for_code,
)
from cloister.wire import ErrorAnswer, FinishAnswer, FinishRequest, RecordMessage

from ._peer import ROUND, Peer
from ._report import run_report, sign_report
from ._state import RunState

if TYPE_CHECKING:
    from cloister.attest import Attester

    from ._plan import ServerPlan

_log = logging.getLogger(__name__)

Emit = Callable[..., None]
"""emit(event, **fields): tells the host something that is public by the job's own declaration."""

ANSWER_TIMEOUT_S = 60.0
"""How long a courier waits for a client's answer before it says that none came; then the message goes out again."""


class ServerRun(ABC):
    """Answers the host port (`handle`) and does the work (`work`), in two threads. A method is a subclass.

    Args:
        plan: the measured job.
        attester: makes evidence and the sealing key of this enclave.
        now: clock in unix seconds.
        emit: where public progress goes.
    """

    def __init__(self, plan: ServerPlan, attester: Attester, *, now: Callable[[], float], emit: Emit) -> None:
        self._plan = plan
        self._attester = attester
        self._now = now
        self._emit = emit
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._stop = threading.Event()
        key, counter = attester.sealing_key("run-state"), attester.counter()
        self._state = RunState.open(plan.work / "state.sealed", key, plan, counter)
        self._peers = {name: self._new_peer(name) for name in sorted(plan.node_keys)}
        self._finished: set[str] = set()
        self._relay_bytes = 0

    def _new_peer(self, name: str) -> Peer:
        plan = self._plan
        context = SessionContext(plan.run_id, name, plan.policy.sha384, plan.policy.sha384, plan.node_keys[name])
        return Peer(
            name,
            context,
            self._attester,
            verify_client=self._client_verifier(plan.node_keys[name]),
            max_age_s=plan.policy.max_session_age_s,
            now=self._now,
        )

    def _client_verifier(self, node_key: bytes) -> ClientVerifier:
        """What a client must prove in F4; by default that it holds its registered node key."""
        return NodeKeyVerifier(node_key)

    # --- what a method says ---------------------------------------------------------------------------------------

    @abstractmethod
    def _work(self) -> None:
        """Every phase up to "finish" that the sealed state does not already hold the result of."""

    @abstractmethod
    def _next_work(self, name: str) -> tuple[int, RecordMessage] | None:
        """Round and request that this client is due, before "finish"; None for nothing."""

    @abstractmethod
    def _take_work(self, name: str, message: RecordMessage) -> bool:
        """Takes a client's answer. False where it is no answer of this method."""

    @abstractmethod
    def _members(self) -> Collection[str]:
        """Clients that have a part in the result, and get the report."""

    @abstractmethod
    def _release(self) -> bytes:
        """What the job lets leave the enclave at the end; empty for nothing."""

    @property
    @abstractmethod
    def is_serving(self) -> bool:
        """Whether the run is done and the tuned model is at hand."""

    def _to_fetch(self) -> list[str]:
        """Shards that the host shall lay in the inbox."""
        return []

    def _exchange(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A question to the tuned model."""
        raise FederationError("this run's server enclave answers no questions", hint="ask in the client's own enclave")

    # --- the host port ------------------------------------------------------------------------------------------

    def handle(self, method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One call of the untrusted host. Every value in `body` is untrusted."""
        if method == "poll":
            return self._poll(body)
        if method == "deliver":
            return self._deliver(body)
        if method == "status":
            return {"phase": self._state.phase, "serving": self.is_serving}
        if method == "exchange":
            return self._exchange(body)
        if method == "stop":
            self.stop()
            return {}
        raise MalformedMessageError(f"unknown host call {method!r}")

    def stop(self) -> None:
        """Ends `work` at the next step; what was trained up to the last checkpoint is kept."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def wait_for_stop(self) -> None:
        """Blocks until the host says stop; meanwhile only predictions are answered."""
        self._stop.wait()

    def close(self) -> None:
        """Erases every session's keys."""
        with self._lock:
            for peer in self._peers.values():
                peer.close()

    def _poll(self, body: Mapping[str, Any]) -> dict[str, Any]:
        named = body.get("carrying")
        carrying = named if isinstance(named, list) else []
        with self._lock:
            for peer in self._peers.values():
                # What was handed out and is not under way is lost: its courier died, or never read the answer.
                peer.in_flight &= peer.name in carrying
            sends = [self._take(peer) for peer in self._peers.values() if self._has_something_for(peer)]
            self._relay_bytes += sum(len(send["blob"]) for send in sends)
            return {
                "send": sends,
                "fetch": self._to_fetch(),
                "inbox": str(self._plan.inbox),
                "store": self._plan.store_url,
                "store_options": dict(self._plan.store_options),
                "done": self._state.phase == "done" or self._stop.is_set(),
                "wait_s": 0.2,
            }

    def _has_something_for(self, peer: Peer) -> bool:
        if peer.failed:
            return False
        if peer.outstanding is None:
            due = self._due(peer.name)
            if due is None:
                return False
            if peer.session is None:
                peer.connect()
            else:
                peer.request(due[1], n_round=due[0])
        return peer.outstanding is not None and not peer.in_flight

    def _take(self, peer: Peer) -> dict[str, Any]:
        peer.in_flight = True
        return {"client": peer.name, "attempt": 0, "blob": peer.outstanding, "timeout_s": ANSWER_TIMEOUT_S}

    def _due(self, name: str) -> tuple[int, RecordMessage] | None:
        if self._state.phase != "finish":
            return self._next_work(name)
        if name in self._finished:
            return None
        return ROUND, FinishRequest(self._state.report, self._state.report_evidence, self._release())

    def _deliver(self, body: Mapping[str, Any]) -> dict[str, Any]:
        name, blob = body.get("client"), body.get("blob")
        with self._lock:
            peer = self._peers.get(str(name))
            if peer is None or peer.failed:
                return {}
            if not isinstance(blob, bytes):
                peer.in_flight = False  # the courier brings nothing back: the same ciphertext goes out again
                return {}
            self._relay_bytes += len(blob)
            try:
                message = peer.receive(blob)
                if message is not None:
                    self._take_answer(peer, message)
            except PeerError as error:
                self._tell_peer_error(error)
            self._changed.notify_all()
        return {}

    def _tell_peer_error(self, error: PeerError) -> None:
        self._emit("error", code=error.peer_code, cause=error.cause, hint=error.hint, peer=error.peer)

    def _take_answer(self, peer: Peer, message: RecordMessage) -> None:
        if isinstance(message, FinishAnswer):
            self._finished.add(peer.name)
        elif isinstance(message, ErrorAnswer):
            peer.fail(message.code)
            raise PeerError(f"client {peer.name} stopped: {message.code}", peer=peer.name, peer_code=message.code)
        elif not self._take_work(peer.name, message):
            raise PeerError(f"client {peer.name} answered {message.KIND}", peer=peer.name, peer_code="wire.malformed")

    # --- the work -----------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Runs every phase that the sealed state does not already hold the result of.

        Raises:
            CloisterError: the run cannot go on; everything finished so far is in sealed files.
        """
        self._work()
        if self._state.phase == "finish":
            self._phase("finish", self._await_finish)
            self._state.advance("done")
        self._emit("done")

    def _sign_report(self, facts: Mapping[str, Any]) -> None:
        """Makes the run report of these and the common facts, and ends the phase."""
        report = run_report(self._plan, self._state, facts, self._attester.claims(), relay_bytes=self._relay_bytes)
        self._state.set_report(report, sign_report(report, self._attester))
        self._state.advance("finish")

    def _phase(self, name: str, body: Callable[[], None]) -> None:
        self._emit("phase", phase=name, status="begin")
        body()
        if not self._stop.is_set():
            self._emit("phase", phase=name, status="end")

    def _await(
        self,
        waiting: Callable[[], list[str]],
        there: Callable[[], int],
        *,
        is_whole: Callable[[], bool] = lambda: True,
    ) -> None:
        """Blocks until no client is waited for, or those that are have been silent for `timeout_s`.

        Args:
            waiting: clients that have not answered and have not failed.
            there: how many have answered.
            is_whole: whether what the host brings is there too.

        Raises:
            InsufficientClientsError, PeerError: fewer than `min_clients` are left.
            FederationError: stopped by the host.
        """
        with self._changed:
            self._begin_waiting()
            while not self._stop.is_set():
                names = waiting()
                if not names and is_whole():
                    break
                if names and all(self._is_late(name) for name in names) and is_whole():
                    self._emit("warning", cause=f"left out, no answer for {self._plan.timeout_s:.0f} s: {names}")
                    break
                self._refuse_if_hopeless()
                self._changed.wait(0.1)
            self._check_stop()
            self._refuse_if_hopeless()
            if there() < self._plan.min_clients:
                raise InsufficientClientsError(
                    f"{there()} of {len(self._peers)} clients delivered, min_clients is {self._plan.min_clients}",
                    hint="see the clients' own logs, or raise federation.timeout_s",
                )

    def _begin_waiting(self) -> None:
        """Silence counts from now on of every client that owed no answer till now: nobody had asked it anything."""
        for peer in self._peers.values():
            if peer.outstanding is None:
                peer.last_seen = self._now()

    def _is_late(self, name: str) -> bool:
        return self._now() - self._peers[name].last_seen > self._plan.timeout_s

    def _refuse_if_hopeless(self) -> None:
        failed = {name: peer.failed for name, peer in self._peers.items() if peer.failed}
        if len(self._peers) - len(failed) >= self._plan.min_clients:
            return
        name, code = next(iter(failed.items()))
        kind = error_for_code(code).__name__
        if cause := self._peers[name].cause:
            hint = f"{self._plan.min_clients} clients are needed"
            raise PeerError(f"{cause} ({code})", peer=name, peer_code=code, hint=hint)
        raise PeerError(
            f"client {name} left the run with {kind} ({code})",
            peer=name,
            peer_code=code,
            hint=f"what went wrong is in that client's own log; {self._plan.min_clients} clients are needed",
        )

    def _await_finish(self) -> None:
        with self._changed:
            self._begin_waiting()
            while not self._stop.is_set():
                waiting = [n for n in self._members() if n not in self._finished and not self._peers[n].failed]
                if not waiting or all(self._is_late(name) for name in waiting):
                    break
                self._changed.wait(0.1)
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise FederationError("stopped by the host", hint="resume the run: its sealed state is kept")
