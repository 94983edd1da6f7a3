"""Method 1 inside the server enclave.

    prepare   every client's enclave says which backbone, tokenizer and adapter it has loaded, and how many examples
    train     rounds: the global adapter out, updates in, aggregated one at a time
    evaluate  the final adapter out, sums over each client's held-out examples in
    done      nothing: a client asks its own enclave, which keeps the final adapter sealed

Every finished round is in a sealed file of its own before the next begins, and the sealed state says which file counts,
so a restarted enclave goes on with the round that was interrupted, and no update is counted twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from cloister.channel import AttestedNodeVerifier, ClientVerifier, read_sealed, write_sealed
from cloister.errors import FederationError, MalformedMessageError, PeerError, RollbackError, UpdateRejectedError
from cloister.federation._aggregate import Aggregator
from cloister.federation._server import Emit, ServerRun
from cloister.wire import AdmitAnswer, AdmitRequest, RecordMessage, RoundAnswer, RoundProgress, RoundRequest

if TYPE_CHECKING:
    from cloister.adapters import AdapterState
    from cloister.attest import Attester, Decision
    from cloister.federation._plan import EnclaveServerPlan
    from cloister.wire import Evidence

Work = Literal["train", "evaluate"]
_MAX_COUNT = (1 << 53) - 1  # as in every message
_KEYS = {
    "tokenizer_sha384": "model.path (tokenizer)",
    "backbone_sha384": "model.path",
    "adapter_sha384": "adapter",
}


class EnclaveServer(ServerRun):
    """The server enclave's run of Method 1.

    Args:
        load: gives the global adapter before the first round, as every client draws it too (*secret* from then
            on), and the digests of what the clients must have loaded. Called once, while the clients shake hands.
        verify_client: appraises a client enclave's evidence over 64 bytes; raises an `AttestationError`.
        plan, attester, now, emit: as of `ServerRun`.
    """

    _plan: EnclaveServerPlan

    def __init__(
        self,
        plan: EnclaveServerPlan,
        attester: Attester,
        *,
        load: Callable[[], tuple[AdapterState, dict[str, bytes]]],
        verify_client: Callable[[Evidence, bytes], Decision],
        now: Callable[[], float],
        emit: Emit,
    ) -> None:
        self._verify_client = verify_client
        super().__init__(plan, attester, now=now, emit=emit)
        self._load = load
        self._loaded: dict[str, bytes] = {}
        self._early: dict[str, AdmitAnswer] = {}
        self._key = attester.sealing_key("adapter")
        self._opened: Aggregator | None = None
        self._work_of_round: tuple[Work, int] = ("train", 0)
        self._adapter = b""
        self._waiting: set[str] = set()
        self._sent: set[str] = set()
        self._answers: dict[str, dict[str, Any]] = {}
        self._offload: dict[str, Any] = {}  # of each client, what it told last of its masked layers
        self._decisions: dict[str, dict[str, Any]] = {}  # what the accepted evidence of each client states

    def _client_verifier(self, node_key: bytes) -> ClientVerifier:
        name = next(name for name, key in self._plan.node_keys.items() if key == node_key)

        def verify(evidence: Evidence, data: bytes) -> Decision:
            found = self._verify_client(evidence, data)
            self._decisions[name] = found.claims.to_dict()
            return found

        return AttestedNodeVerifier(node_key, verify)

    def _due(self, name: str) -> tuple[int, RecordMessage] | None:
        # A restarted enclave has nothing to release before it has read the adapter again.
        return None if self._state.phase == "finish" and self._opened is None else super()._due(name)

    @property
    def is_serving(self) -> bool:
        """False: clients ask their own enclaves."""
        return False

    def close(self) -> None:
        """Erases every session's keys and gives up an open round."""
        super().close()
        with self._lock:
            if self._opened is not None:
                self._opened.close()

    @property
    def _aggregator(self) -> Aggregator:
        if self._opened is None:
            raise FederationError("the adapter is not loaded yet")
        return self._opened

    # --- messages -------------------------------------------------------------------------------------------------

    def _next_work(self, name: str) -> tuple[int, RecordMessage] | None:
        plan = self._plan
        if self._state.phase == "prepare" and name not in self._state.admitted and name not in self._early:
            return 1, AdmitRequest(plan.job_sha384, plan.patience_s)
        if name not in self._waiting:
            return None
        work, n_round = self._work_of_round
        adapter = b"" if name in self._sent else self._adapter
        return n_round, RoundRequest(n_round, work, adapter, plan.patience_s)

    def _take_work(self, name: str, message: RecordMessage) -> bool:
        if isinstance(message, RoundProgress):
            # Only a client that works on an adapter has it: from then on polls go without.
            (self._sent.discard if message.is_lost else self._sent.add)(name)
            self._emit("progress", client=name, n_done=message.n_done, n_total=message.n_total, n_bytes=0)
        elif isinstance(message, AdmitAnswer):
            self._admit(name, message)
        elif isinstance(message, RoundAnswer):
            self._take_answer_of_round(name, message)
        else:
            return False
        return True

    def _admit(self, name: str, answer: AdmitAnswer) -> None:
        if not self._loaded:
            self._early[name] = answer
            return
        for field, key in _KEYS.items():
            if getattr(answer, field) != self._loaded[field]:
                cause = f"client {name} has another {key} than this run's job"
                hint = f"compare {field} on both sides: the same files must lie at both"
                self._refuse(name, "federation.job", cause, hint=hint)
        if answer.n_train < 1:
            self._refuse(name, "data", f"client {name} has no training examples (clients.train)")
        self._state.admit(name, answer)

    def _refuse(self, name: str, code: str, cause: str, *, hint: str = "") -> NoReturn:
        self._peers[name].fail(code, cause)
        raise PeerError(cause, peer=name, peer_code=code, hint=hint)

    def _take_answer_of_round(self, name: str, answer: RoundAnswer) -> None:
        if (answer.work, answer.round) != self._work_of_round or name not in self._waiting:
            return  # of a round that is over: the client was late
        try:
            told = _facts_of(answer)
        except MalformedMessageError as error:
            self._refuse(name, error.code, f"client {name}: {error.cause}")
        if answer.work == "train":
            try:
                self._aggregator.add(name, answer.n_examples, answer.adapter, round=answer.round)
            except UpdateRejectedError as error:
                self._emit("warning", cause=f"round {answer.round}: {error.cause}", peer=name)
        self._waiting.discard(name)
        self._offload[name] = told.pop("offload", {})
        self._answers[name] = told

    def _members(self) -> Collection[str]:
        return self._state.admitted

    # --- the work -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self._state.phase == "prepare":
            self._phase("prepare", self._prepare)
            self._state.advance("train")
        else:
            self._open()
        if self._state.phase == "train":
            self._phase("train", self._rounds)
            self._check_stop()
            self._state.advance("evaluate")
        if self._state.phase == "evaluate":
            self._phase("evaluate", self._evaluate)
            self._check_stop()
            self._sign_report(self._facts())

    def _open(self) -> None:
        plan = self._plan
        start, loaded = self._load()
        opened = Aggregator(
            plan.aggregation, start, min_clients=plan.min_clients, folder=plan.work, memory_bytes=plan.memory_bytes
        )
        self._restore(opened)
        with self._lock:  # not before: what the poll sees of it may be released
            self._opened, self._loaded = opened, loaded

    def _prepare(self) -> None:
        self._open()  # while the clients shake hands and load
        with self._lock:
            early, self._early = self._early, {}
            for name, answer in early.items():
                try:
                    self._admit(name, answer)
                except PeerError as error:
                    self._tell_peer_error(error)
        self._await(
            lambda: [n for n, peer in self._peers.items() if n not in self._state.admitted and not peer.failed],
            lambda: len(self._state.admitted),
        )

    def _rounds(self) -> None:
        for n_round in range(self._aggregator.n_rounds + 1, self._plan.n_rounds + 1):
            with self._lock:
                clients = self._present()
                if self._aggregator.begin(clients) != n_round:
                    raise FederationError(f"the aggregation is not at round {n_round}")
            self._exchange_round("train", n_round, clients)
            with self._lock:
                result = self._aggregator.finish()
                per_client = dict(sorted(self._answers.items()))
                self._keep(n_round, {**result.facts(), "per_client": per_client})
            self._emit(
                "round", n_round=n_round, n_rounds=self._plan.n_rounds, clients=list(result.clients),
                rejected=sorted(result.rejected), missing=list(result.missing), epsilon=result.epsilon,
                **({"loss": _mean_loss(per_client)} if self._plan.live_metrics else {}),
            )  # fmt: skip

    def _evaluate(self) -> None:
        from cloister.train import EvalSums, merge_sums

        if "metric" in self._state.results:
            return
        self._exchange_round("evaluate", self._plan.n_rounds + 1, self._present())
        told = dict(sorted(self._answers.items()))
        sums = [EvalSums(name, **found["sums"]) for name, found in told.items() if found["sums"]]
        self._state.results["n_truncated"] = {name: found["n_truncated"] for name, found in told.items()}
        self._state.results["offload"] = dict(sorted(self._offload.items()))
        metric = merge_sums(sums, self._plan.task).as_dict() if sums else None
        self._state.set_result("metric", metric)
        if metric and self._plan.live_metrics:
            self._emit("metric", name=metric["name"], value=metric["value"], per_client=metric["per_client"],
                       when="after")  # fmt: skip

    def _exchange_round(self, work: Work, n_round: int, clients: Collection[str]) -> None:
        """Gives the global adapter to these clients and waits for their answers."""
        with self._lock:
            self._work_of_round = (work, n_round)
            self._adapter = self._aggregator.state.to_bytes()
            self._answers.clear()
            self._sent.clear()
            self._waiting = set(clients)
        self._await(
            lambda: [name for name in sorted(self._waiting) if not self._peers[name].failed],
            lambda: len(self._answers),
        )
        with self._lock:
            self._waiting.clear()

    def _present(self) -> list[str]:
        return [name for name in sorted(self._state.admitted) if not self._peers[name].failed]

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _keep(self, n_round: int, facts: dict[str, Any]) -> None:
        """The new adapter's file first, then the state that says that it counts, then the old file goes."""
        blob = self._aggregator.to_bytes()
        write_sealed(self._file(n_round), blob, key=self._key, label=self._label, version=n_round)
        rounds = [*self._state.results.get("rounds", []), facts]
        self._state.results["offload"] = dict(sorted(self._offload.items()))
        self._state.results["adapter_sha384"] = hashlib.sha384(blob).hexdigest()
        self._state.set_result("rounds", rounds)
        self._file(n_round - 1).unlink(missing_ok=True)

    def _restore(self, aggregator: Aggregator) -> None:
        n_rounds = len(self._state.results.get("rounds", []))
        if n_rounds == 0:
            return
        _, blob = read_sealed(self._file(n_rounds), key=self._key, label=self._label)
        if hashlib.sha384(blob).hexdigest() != self._state.results["adapter_sha384"]:
            raise RollbackError(f"{self._file(n_rounds)} is not the adapter that the sealed state names")
        aggregator.restore(blob)

    def _file(self, n_round: int) -> Path:
        return self._plan.work / f"adapter-{n_round}.sealed"

    @property
    def _label(self) -> str:
        return f"global-adapter/{self._plan.run_id}/{self._plan.job_sha384.hex()}"

    def _release(self) -> bytes:
        return b"" if self._plan.release == "none" else self._aggregator.state.to_bytes()

    def _facts(self) -> dict[str, Any]:
        admitted = sorted(self._state.admitted.items())
        return {
            "method": "enclave",
            "adapter": self._aggregator.state.spec.kind,
            "n_examples": {name: {"train": a.n_train, "test": a.n_test} for name, a in admitted},
            "left_out": sorted(set(self._plan.node_keys) - set(self._state.admitted)),
            "client_enclaves": dict(sorted(self._decisions.items())),
            "epsilon": self._aggregator.epsilon,
        }


def _facts_of(answer: RoundAnswer) -> dict[str, Any]:
    """What a client told of its work, typed, so that no client can end the run of the others by it."""
    try:
        told = json.loads(answer.facts)
        if answer.work == "evaluate":
            return {
                "sums": told["sums"] and _sums_of(told["sums"]),
                "n_truncated": _count(told["n_truncated"]),
                "offload": dict(told["offload"]),
            }
        known = ("wall_s", "cpu_s", "n_steps", "loss", "epsilon")
        facts: dict[str, Any] = {key: _number(told[key]) for key in known if key in told}
        return {**facts, "offload": dict(told["offload"])}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise MalformedMessageError("what it told of its work does not parse") from None


def _sums_of(told: dict[str, Any]) -> dict[str, Any]:
    counts = {field: _count(told[field]) for field in ("n", "n_targets", "n_correct")}
    pairs = tuple((_count(label), _count(guess), _count(n)) for label, guess, n in told["pairs"])
    return {**counts, "loss_sum": _number(told["loss_sum"]), "pairs": pairs}


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise ValueError("no count")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("no number")
    return value


def _mean_loss(per_client: dict[str, dict[str, Any]]) -> float | None:
    losses = [told["loss"] for told in per_client.values() if isinstance(told.get("loss"), float)]
    return round(sum(losses) / len(losses), 5) if losses else None
