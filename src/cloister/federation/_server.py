"""The run's state machine inside the server enclave (Method 2).

    prepare   every client: handshake F1-F4, then its sealed manifest; the host lays the sealed shards in the inbox
    train     far side over the global shuffle of all clients' features
    evaluate  held-out features of every client, then the baselines the job asks for
    finish    the run report, signed by evidence over its hash, sealed to every client
    done      only prediction is answered

The host's courier polls and delivers opaque blobs; it decides nothing. What must survive a kill is in sealed files at
phase ends (and in the trainer's checkpoint), so a restarted enclave of the same measurement continues.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloister.channel import SessionContext
from cloister.errors import (
    FederationError,
    InsufficientClientsError,
    MalformedMessageError,
    PeerError,
    error_for_code,
)
from cloister.wire import (
    ErrorAnswer,
    FinishAnswer,
    FinishRequest,
    Manifest,
    PrepareProgress,
    PrepareRequest,
    RecordMessage,
)

from ._answers import PredictDesk
from ._far_work import FarWork
from ._peer import Peer
from ._report import run_report, sign_report
from ._state import RunState

if TYPE_CHECKING:
    from cloister.attest import Attester

    from ._plan import ServerPlan

_log = logging.getLogger(__name__)

Emit = Callable[..., None]
"""emit(event, **fields): tells the host something that is public by the job's own declaration."""

LOST_MESSAGE_S = 60.0
"""A message that a courier took and has not answered for this long is handed out again, unchanged."""


class ServerRun:
    """Answers the host port (`handle`) and does the work (`work`), in two threads.

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
        self._courier = ""
        key, counter = attester.sealing_key("run-state"), attester.counter()
        self._state = RunState.open(plan.work / "state.sealed", key, plan, counter)
        self._peers = {name: self._new_peer(name) for name in sorted(plan.node_keys)}
        self._finished: set[str] = set()
        self._relay_bytes = 0
        self._far = FarWork(plan, self._state, attester, emit=emit, stop=self._stop)
        self._desk = PredictDesk(self._new_peer, self._far)

    def _new_peer(self, name: str) -> Peer:
        plan = self._plan
        context = SessionContext(plan.run_id, name, plan.policy.sha384, plan.policy.sha384, plan.node_keys[name])
        return Peer(name, context, self._attester, max_age_s=plan.policy.max_session_age_s, now=self._now)

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
            return self._desk.exchange(body, is_open=self.is_serving)
        if method == "stop":
            self.stop()
            return {}
        raise MalformedMessageError(f"unknown host call {method!r}")

    @property
    def is_serving(self) -> bool:
        """Whether the run is done and the tuned far side is loaded."""
        return self._state.phase == "done" and self._far.is_loaded

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
        self._desk.close()

    def _poll(self, body: Mapping[str, Any]) -> dict[str, Any]:
        courier = str(body.get("courier", ""))
        with self._lock:
            if courier != self._courier:
                # A new courier knows nothing of what the last one carried: hand everything out again, unchanged.
                self._courier = courier
                for peer in self._peers.values():
                    peer.in_flight = False
            sends = [self._take(peer) for peer in self._peers.values() if self._has_something_for(peer)]
            self._relay_bytes += sum(len(send["blob"]) for send in sends)
            return {
                "send": sends,
                "fetch": self._missing_shards(),
                "inbox": str(self._plan.inbox),
                "store": self._plan.store_url,
                "store_options": dict(self._plan.store_options),
                "done": self._state.phase == "done" or self._stop.is_set(),
                "wait_s": 0.2,
            }

    def _has_something_for(self, peer: Peer) -> bool:
        if peer.failed:
            return False
        if peer.in_flight and self._now() - peer.taken_at > LOST_MESSAGE_S + self._plan.patience_s:
            peer.in_flight = False
        if peer.outstanding is None:
            message = self._next_message(peer.name)
            if message is None:
                return False
            if peer.session is None:
                peer.connect()
            else:
                peer.request(message)
        return peer.outstanding is not None and not peer.in_flight

    def _take(self, peer: Peer) -> dict[str, Any]:
        peer.in_flight = True
        peer.taken_at = self._now()
        return {"client": peer.name, "attempt": 0, "blob": peer.outstanding, "timeout_s": LOST_MESSAGE_S}

    def _next_message(self, name: str) -> RecordMessage | None:
        if self._state.phase == "prepare" and name not in self._state.manifests:
            return PrepareRequest(self._plan.job_sha384, self._plan.patience_s)
        if self._state.phase == "finish" and name not in self._finished:
            report, evidence, release = self._state.report, self._state.report_evidence, self._far.release_bytes()
            return FinishRequest(report, evidence, release)
        return None

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
                self._emit("error", code=error.peer_code, cause=error.cause, hint=error.hint, peer=peer.name)
            self._changed.notify_all()
        return {}

    def _take_answer(self, peer: Peer, message: RecordMessage) -> None:
        if isinstance(message, PrepareProgress):
            self._emit("progress", client=peer.name, n_done=message.n_done, n_total=message.n_total,
                       n_bytes=message.n_bytes)  # fmt: skip
        elif isinstance(message, Manifest):
            self._state.accept_manifest(peer.name, message)
        elif isinstance(message, FinishAnswer):
            self._finished.add(peer.name)
        elif isinstance(message, ErrorAnswer):
            peer.fail(message.code)
            raise PeerError(f"client {peer.name} stopped: {message.code}", peer=peer.name, peer_code=message.code)
        else:
            raise PeerError(f"client {peer.name} answered {message.KIND}", peer=peer.name, peer_code="wire.malformed")

    def _missing_shards(self) -> list[str]:
        wanted = [entry for manifest in self._state.manifests.values() for entry in manifest.shards]
        return [e.name for e in wanted if not _is_there(self._plan.inbox / e.name, e.n_bytes)]

    # --- the work -----------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Runs every phase that the sealed state does not already hold the result of.

        Raises:
            CloisterError: the run cannot go on; everything finished so far is in sealed files.
        """
        if self._state.phase == "prepare":
            self._phase("prepare", self._prepare)
            self._state.advance("train")
        else:
            self._far.load()
        if self._state.phase in ("train", "evaluate"):
            self._far.open_features()
        if self._state.phase == "train":
            self._phase("train", self._far.train)
            self._check_stop()
            self._state.advance("evaluate")
        if self._state.phase == "evaluate":
            self._phase("evaluate", self._far.evaluate)
            self._phase("baselines", self._far.baselines)
            self._check_stop()
            report = run_report(self._plan, self._state, self._attester.claims(), relay_bytes=self._relay_bytes)
            self._state.set_report(report, sign_report(report, self._attester))
            self._state.advance("finish")
        if self._state.phase == "finish":
            self._phase("finish", self._await_finish)
            self._state.advance("done")
        self._emit("done")

    def _phase(self, name: str, body: Callable[[], None]) -> None:
        self._emit("phase", phase=name, status="begin")
        body()
        if not self._stop.is_set():
            self._emit("phase", phase=name, status="end")

    def _prepare(self) -> None:
        self._far.load()  # while the clients shake hands and work
        self._await_features()

    def _await_features(self) -> None:
        with self._changed:
            while not self._stop.is_set():
                waiting = [n for n, p in self._peers.items() if n not in self._state.manifests and not p.failed]
                if not waiting and not self._missing_shards():
                    break
                if waiting and all(self._is_late(name) for name in waiting) and not self._missing_shards():
                    self._emit("warning", cause=f"left out, no answer for {self._plan.timeout_s:.0f} s: {waiting}")
                    break
                self._refuse_if_hopeless()
                self._changed.wait(0.1)
            self._check_stop()
            self._refuse_if_hopeless()
            if len(self._state.manifests) < self._plan.min_clients:
                raise InsufficientClientsError(
                    f"{len(self._state.manifests)} of {len(self._peers)} clients delivered, "
                    f"min_clients is {self._plan.min_clients}",
                    hint="see the clients' own logs, or raise federation.timeout_s",
                )

    def _is_late(self, name: str) -> bool:
        return self._now() - self._peers[name].last_seen > self._plan.timeout_s

    def _refuse_if_hopeless(self) -> None:
        failed = {name: peer.failed for name, peer in self._peers.items() if peer.failed}
        if len(self._peers) - len(failed) >= self._plan.min_clients:
            return
        name, code = next(iter(failed.items()))
        kind = error_for_code(code).__name__
        raise PeerError(
            f"client {name} left the run with {kind} ({code})",
            peer=name,
            peer_code=code,
            hint=f"what went wrong is in that client's own log; {self._plan.min_clients} clients are needed",
        )

    def _await_finish(self) -> None:
        with self._changed:
            while not self._stop.is_set():
                waiting = [
                    n for n, p in self._peers.items() if n in self._state.manifests and n not in self._finished
                    and not p.failed
                ]  # fmt: skip
                if not waiting or all(self._is_late(name) for name in waiting):
                    break
                self._changed.wait(0.1)
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise FederationError("stopped by the host", hint="resume the run: its sealed state is kept")


def _is_there(path: Any, n_bytes: int) -> bool:
    try:
        return path.stat().st_size == n_bytes
    except OSError:
        return False
