"""The server enclave's run of Method 1, with clients that answer in this process: admission, rounds, kills, lies."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cloister.adapters import AdapterState, AdapterUpdate, LoraSpec, StateSpec
from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, render_policy
from cloister.channel import write_sealed
from cloister.errors import (
    FederationError,
    InsufficientClientsError,
    PeerError,
    RollbackError,
)
from cloister.federation import AggregationSpec, Aggregator, EnclaveServer, EnclaveServerPlan
from cloister.train import TaskSpec, TrainSpec
from cloister.wire import (
    AdmitAnswer,
    AdmitRequest,
    ErrorAnswer,
    FinishAnswer,
    FinishRequest,
    PrepareProgress,
    RecordMessage,
    RoundAnswer,
    RoundProgress,
    RoundRequest,
)

from ._seeded import Seeded

NOW = 1_800_000_000.0
A, B = "m.0.x.lora_A.weight", "m.0.x.lora_B.weight"
SPEC = StateSpec(LoraSpec(r=2, alpha=4), "sequence-classification", {A: (2, 6), B: (5, 2)}, {})
DIGESTS = {"backbone_sha384": b"b" * 48, "tokenizer_sha384": b"t" * 48, "adapter_sha384": b"a" * 48}
NAMES = ("alpha", "beta", "gamma")
OFFLOAD = {"pad": "otp", "forward": 3}
SUMS = {"client": "", "n": 4, "n_targets": 4, "n_correct": 3, "loss_sum": 2.0, "pairs": [[0, 0, 3], [1, 0, 1]]}


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = Seeded(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SPEC.shapes.items()}


START = AdapterState(SPEC, tensors(0))


@dataclass
class FakeClient:
    """Answers as a client's enclave would; a test changes what it wants otherwise."""

    name: str
    admission: AdmitAnswer = field(default_factory=lambda: AdmitAnswer(**DIGESTS, n_train=10, n_test=4))
    facts: bytes | None = None
    update: bytes | None = None
    asked: list[RecordMessage] = field(default_factory=list)
    released: list[bytes] = field(default_factory=list)
    change: Callable[[RecordMessage], RecordMessage | None] = lambda _: None

    def answer(self, request: RecordMessage) -> RecordMessage:
        self.asked.append(request)
        if changed := self.change(request):
            return changed
        if isinstance(request, AdmitRequest):
            return self.admission
        if isinstance(request, FinishRequest):
            self.released.append(request.release)
            return FinishAnswer(b"r" * 48)
        assert isinstance(request, RoundRequest)
        if not request.adapter:
            return RoundProgress(0, 0, is_lost=True)
        if request.work == "evaluate":
            facts = self.told({"sums": SUMS, "n_truncated": 1, "offload": OFFLOAD})
            return RoundAnswer(request.round, "evaluate", b"", 4, facts)
        update = self.update or self.trained(request.round)
        told = {"loss": 1.5, "wall_s": 0.1, "cpu_s": 0.1, "n_steps": 3, "offload": OFFLOAD}
        facts = self.told(told)
        return RoundAnswer(request.round, "train", update, 10, facts)

    def told(self, facts: dict[str, Any]) -> bytes:
        return json.dumps(facts).encode() if self.facts is None else self.facts

    def trained(self, n_round: int) -> bytes:
        return AdapterUpdate(SPEC, tensors(100 * n_round + NAMES.index(self.name))).to_bytes()


class World:
    """One server enclave at a time over one folder, its clients, and a courier that knows no cryptography."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        root = SimulatedRoot.create(folder / "root", now=int(NOW))
        self.policy = Policy.parse(render_policy(root_sha256=root.root_sha256, server_rtmr3=[b"\1" * 48]))
        self.attester = SimulatedAttester(root.provision(), rtmr3=b"\1" * 48)
        self.clients = {name: FakeClient(name) for name in NAMES}
        self.events: list[dict[str, Any]] = []
        self.options = options
        self.now = NOW
        self.silent: set[str] = set()
        self.loads = 0
        (folder / "work").mkdir()

    def plan(self) -> EnclaveServerPlan:
        given: dict[str, Any] = {
            "min_clients": 2, "n_rounds": 2, "release": "adapter", "aggregation": AggregationSpec(100.0),
            "live_metrics": True, **self.options,
        }  # fmt: skip
        return EnclaveServerPlan(
            run_id="run-1", job_sha384=b"\5" * 48, policy=self.policy,
            task=TaskSpec("sequence-classification", ("a", "b")),
            train=TrainSpec(), node_keys={name: name.encode() for name in NAMES}, inbox=self.folder,
            work=self.folder / "work", store_url="", timeout_s=30.0, patience_s=0.1,
            adapter=SPEC.adapter, model_path="", memory_bytes=1 << 20, **given,
        )  # type: ignore[arg-type]  # fmt: skip

    def load(self) -> tuple[AdapterState, dict[str, bytes]]:
        self.loads += 1
        return START, dict(DIGESTS)

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def server(self) -> EnclaveServer:
        return EnclaveServer(self.plan(), self.attester, load=self.load, verify_client=lambda *_: None,  # type: ignore[arg-type,return-value]
                             now=lambda: self.now, emit=self.emit)  # fmt: skip

    def run(self, server: EnclaveServer | None = None, *, until: Callable[[], bool] = lambda: False) -> EnclaveServer:
        """`work` in a thread, as the process main does it, and the courier here. Raises what `work` raised."""
        server = server or self.server()
        raised: list[BaseException] = []

        def body() -> None:
            try:
                server.work()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        while thread.is_alive() and not until():
            self.carry(server)
            thread.join(0.005)
        if until():
            server.stop()
        thread.join(20)
        assert not thread.is_alive()
        if raised and not until():
            raise raised[0]
        return server

    def carry(self, server: EnclaveServer) -> None:
        for name, client in self.clients.items():
            peer = server._peers[name]
            if peer.failed or name in self.silent:
                continue
            with server._lock:
                due = server._due(name)
            if due is None:
                continue
            answer = client.answer(due[1])
            peer.last_seen = self.now
            with server._changed:
                try:
                    server._take_answer(peer, answer)
                except PeerError as error:
                    server._tell_peer_error(error)
                server._changed.notify_all()

    def report(self, server: EnclaveServer) -> dict[str, Any]:
        return json.loads(server._state.report)

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


@pytest.fixture
def no_client_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake clients have no keys: their names stand for them."""
    from cloister.federation._enclave import server as module

    monkeypatch.setattr(module, "AttestedNodeVerifier", lambda key, verify: (key, verify))


@pytest.fixture
def world(tmp_path: Path, no_client_key: None) -> Iterator[World]:
    yield World(tmp_path)


def expected(world: World, n_rounds: int, names: tuple[str, ...] = NAMES) -> AdapterState:
    """The plain mean, round by round."""
    found = {name: tensor.astype(np.float64) for name, tensor in START.tensors.items()}
    for n in range(1, n_rounds + 1):
        updates = [AdapterUpdate.parse(world.clients[name].trained(n), SPEC).tensors for name in names]
        found = {key: (found[key] + sum(u[key].astype(np.float64) for u in updates) / len(names)) for key in found}
    return AdapterState(SPEC, {key: value.astype(np.float32) for key, value in found.items()})


def assert_close(blob: bytes, state: AdapterState) -> None:
    found = AdapterState.parse(blob, SPEC)
    for name, tensor in state.tensors.items():
        np.testing.assert_allclose(found.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_whole_run(world: World):
    server = world.run()
    report = world.report(server)
    assert report["method"] == "enclave" and report["adapter"] == "lora" and report["left_out"] == []
    assert report["n_examples"] == {name: {"train": 10, "test": 4} for name in NAMES}
    assert [r["clients"] for r in report["rounds"]] == [list(NAMES)] * 2
    assert report["metric"]["value"] == 0.75 and report["metric"]["n"] == dict.fromkeys(NAMES, 4)
    assert report["n_truncated"] == dict.fromkeys(NAMES, 1)
    assert report["offload"] == dict.fromkeys(NAMES, OFFLOAD) and "offload" not in report["rounds"][0]["per_client"]
    assert [(e["n_round"], e["loss"]) for e in world.said("round")] == [(1, 1.5), (2, 1.5)]
    assert world.said("metric")[0]["value"] == 0.75
    for client in world.clients.values():
        assert len(client.released) == 1
        assert_close(client.released[0], expected(world, 2))
    assert not server.is_serving and server.handle("status", {}) == {"phase": "done", "serving": False}
    server.close()


def test_nothing_is_told_while_it_runs_without_live_metrics_and_nothing_is_released(
    tmp_path: Path, no_client_key: None
):
    world = World(tmp_path, live_metrics=False, release="none")
    server = world.run()
    assert world.said("metric") == [] and all("loss" not in event for event in world.said("round"))
    assert world.report(server)["metric"]["value"] == 0.75
    assert all(client.released == [b""] for client in world.clients.values())


@pytest.mark.parametrize(
    ("field_name", "says"),
    [
        ("tokenizer_sha384", r"client beta has another model\.path \(tokenizer\)"),
        ("backbone_sha384", r"client beta has another model\.path than"),
        ("adapter_sha384", r"client beta has another adapter than"),
    ],
)
def test_a_client_with_something_else_loaded(tmp_path: Path, no_client_key: None, field_name: str, says: str):
    world = World(tmp_path, min_clients=3)
    world.clients["beta"].admission = AdmitAnswer(**{**DIGESTS, field_name: b"x" * 48}, n_train=10, n_test=4)
    with pytest.raises(PeerError, match=says) as caught:
        world.run()
    assert caught.value.peer == "beta" and caught.value.peer_code == "federation.job"
    assert world.said("round") == [] and all(not client.released for client in world.clients.values())


def test_a_client_without_data_is_named_and_the_others_go_on(world: World):
    world.clients["beta"].admission = AdmitAnswer(**DIGESTS, n_train=0, n_test=4)
    report = world.report(world.run())
    assert report["left_out"] == ["beta"] and [r["clients"] for r in report["rounds"]] == [["alpha", "gamma"]] * 2
    assert "client beta has no training examples (clients.train)" in [e["cause"] for e in world.said("error")]


def test_answers_that_come_before_the_server_has_loaded(world: World):
    may_load = threading.Event()
    load = world.load

    def slow() -> Any:
        assert may_load.wait(20)
        return load()

    world.load = slow
    world.clients["beta"].admission = AdmitAnswer(**{**DIGESTS, "adapter_sha384": b"x" * 48}, n_train=1, n_test=0)
    server = world.server()
    for _ in range(3):
        world.carry(server)
    assert sorted(server._early) == list(NAMES) and [len(c.asked) for c in world.clients.values()] == [1, 1, 1]
    with pytest.raises(FederationError, match="not loaded"):
        _ = server._aggregator
    may_load.set()
    assert world.report(world.run(server))["left_out"] == ["beta"]


def test_a_bad_update_is_refused_by_name_and_the_round_goes_on(world: World):
    world.clients["gamma"].update = b"no update"
    report = world.report(world.run())
    assert [r["clients"] for r in report["rounds"]] == [["alpha", "beta"]] * 2
    assert list(report["rounds"][0]["rejected"]) == ["gamma"]
    warnings = world.said("warning")
    assert [w["peer"] for w in warnings] == ["gamma"] * 2 and "round 1" in warnings[0]["cause"]
    assert_close(world.clients["alpha"].released[0], expected(world, 2, ("alpha", "beta")))


def test_too_few_updates_end_the_run_with_their_causes(tmp_path: Path, no_client_key: None):
    world = World(tmp_path, min_clients=3)
    world.clients["gamma"].update = b"no update"
    with pytest.raises(InsufficientClientsError, match="2 of 3") as caught:
        world.run()
    assert "gamma" in caught.value.hint


BAD_FACTS = [b"", b"[]", b"3", b"{}", b"[" * 100_000, b'{"offload": 3}', b'{"offload": {}, "loss": NaN}',
             b'{"offload": {}, "loss": "low"}', b'{"offload": {}, "n_steps": true}',
             b'{"offload": {}, "epsilon": 1e999}']  # fmt: skip


@pytest.mark.parametrize("facts", BAD_FACTS, ids=range(len(BAD_FACTS)))
def test_a_client_that_tells_nonsense_does_not_end_the_run_of_the_others(world: World, facts: bytes):
    world.clients["gamma"].facts = facts
    report = world.report(world.run())
    assert [r["clients"] for r in report["rounds"]] == [["alpha", "beta"]] * 2
    assert "client gamma: what it told of its work does not parse" in [e["cause"] for e in world.said("error")]


def test_what_dp_sgd_has_spent_is_in_the_report_of_each_round(world: World):
    told = {"wall_s": 0.1, "cpu_s": 0.1, "n_steps": 3, "epsilon": 2.5, "offload": OFFLOAD}
    gamma = world.clients["gamma"]
    gamma.change = lambda m: (
        RoundAnswer(m.round, "train", gamma.trained(m.round), 10, json.dumps(told).encode())
        if isinstance(m, RoundRequest) and m.work == "train" and m.adapter
        else None
    )
    rounds = world.report(world.run())["rounds"]
    assert [r["per_client"]["gamma"]["epsilon"] for r in rounds] == [2.5, 2.5]
    assert "epsilon" not in rounds[0]["per_client"]["alpha"]


@pytest.mark.parametrize(
    "change", [{"n": -1}, {"n": True}, {"n": 1 << 60}, {"loss_sum": float("inf")}, {"pairs": [[1, 2]]}, {"pairs": 3}],
    ids=str,
)  # fmt: skip
def test_sums_that_cannot_be_added(world: World, change: dict[str, Any]):
    bad = json.dumps({"sums": {**SUMS, **change}, "n_truncated": 0, "offload": {}}).encode()
    gamma = world.clients["gamma"]
    gamma.change = lambda m: (
        RoundAnswer(m.round, "evaluate", b"", 4, bad) if isinstance(m, RoundRequest) and m.work == "evaluate" else None
    )
    assert sorted(world.report(world.run())["metric"]["n"]) == ["alpha", "beta"]


def test_clients_without_held_out_examples_still_get_the_adapter(world: World):
    none = json.dumps({"sums": None, "n_truncated": 0, "offload": {}}).encode()
    for client in world.clients.values():
        client.change = lambda m: (
            RoundAnswer(m.round, "evaluate", b"", 0, none)
            if isinstance(m, RoundRequest) and m.work == "evaluate"
            else None
        )
    report = world.report(world.run())
    assert report["metric"] is None and world.said("metric") == []


def test_a_client_that_fails_in_mid_round_leaves_and_the_others_go_on(world: World):
    world.clients["beta"].change = lambda m: (
        ErrorAnswer("offload.integrity") if isinstance(m, RoundRequest) and m.round == 2 else None
    )
    report = world.report(world.run())
    assert [r["clients"] for r in report["rounds"]] == [list(NAMES), ["alpha", "gamma"]]
    assert report["rounds"][1]["missing"] == ["beta"] and not world.clients["beta"].released


def test_a_silent_client_is_left_out_of_the_round_and_comes_back(world: World):
    beta = world.clients["beta"]

    def first_round(message: RecordMessage) -> RecordMessage | None:
        if isinstance(message, RoundRequest) and message.round == 1:
            world.silent.add("beta")
            return RoundProgress(0, 0, is_lost=False)
        return None

    beta.change = first_round
    server = world.server()
    original = server._exchange_round

    def exchange(work: Any, n_round: int, clients: Any) -> None:
        if n_round == 2:
            world.silent.clear()
        original(work, n_round, clients)

    server._exchange_round = exchange  # type: ignore[method-assign]
    done = threading.Event()

    def advance() -> None:
        while not done.wait(0.05):
            world.now += 5.0 if "beta" in world.silent else 0.0

    threading.Thread(target=advance, daemon=True).start()
    try:
        report = world.report(world.run(server))
    finally:
        done.set()
    assert [r["clients"] for r in report["rounds"]] == [["alpha", "gamma"], list(NAMES)]
    assert report["rounds"][0]["missing"] == ["beta"] and len(beta.released) == 1


def test_a_late_answer_of_a_round_that_is_over_changes_nothing(world: World):
    server = world.run()
    before = server._aggregator.to_bytes()
    for n_round, work in ((1, "train"), (2, "train"), (3, "evaluate"), (9, "train")):
        late = RoundAnswer(n_round, work, world.clients["beta"].trained(1), 10, b"{}")  # type: ignore[arg-type]
        assert server._take_work("beta", late)
    assert server._aggregator.to_bytes() == before
    assert not server._take_work("beta", PrepareProgress(0, 1, 0))


def test_the_adapter_is_sent_until_a_client_works_on_it(world: World):
    """A request may be lost with its session: polls go without the adapter only once the client has said progress."""
    sent: list[bool] = []
    answers = iter([RoundProgress(1, 3, is_lost=False), RoundProgress(0, 0, is_lost=True)])

    def change(message: RecordMessage) -> RecordMessage | None:
        if isinstance(message, RoundRequest) and message.round == 1:
            sent.append(bool(message.adapter))
            return next(answers, None)
        return None

    world.clients["beta"].change = change
    world.run()
    assert sent == [True, False, True]
    assert [e["n_done"] for e in world.said("progress")] == [1, 0]


@pytest.mark.parametrize("kill_at", ["prepare", "round 1", "round 2", "evaluate", "finish"])
def test_a_killed_server_goes_on_where_it_was(world: World, kill_at: str):
    """Stopped in the middle of each step, and started again over what is on its disk: the same adapter and report."""
    count: dict[str, int] = {"prepare": 0, "round 1": 0, "round 2": 0, "evaluate": 0, "finish": 0}

    def where(message: RecordMessage) -> str:
        if isinstance(message, AdmitRequest):
            return "prepare"
        if isinstance(message, RoundRequest):
            return "evaluate" if message.work == "evaluate" else f"round {message.round}"
        return "finish"

    def change(message: RecordMessage) -> RecordMessage | None:
        count[where(message)] += 1
        return RoundProgress(0, 0, is_lost=False) if where(message) == kill_at and stopping else None

    stopping = True
    world.clients["gamma"].change = change
    if kill_at == "finish":  # which takes no progress for an answer: gamma is not asked
        first = world.server()
        world.run(first, until=lambda: first._state.phase == "finish")
    else:
        world.run(until=lambda: count[kill_at] > 1)
    stopping = False
    assert len(world.said("done")) == 0 or kill_at == "finish"
    server = world.run()
    report = world.report(server)
    assert [r["clients"] for r in report["rounds"]] == [list(NAMES)] * 2
    assert [r["round"] for r in report["rounds"]] == [1, 2]
    for client in world.clients.values():
        assert_close(client.released[-1], expected(world, 2))
    assert sorted(path.name for path in (world.folder / "work").glob("adapter-*")) == ["adapter-2.sealed"]


def test_a_restarted_server_releases_nothing_before_it_has_read_the_adapter(world: World):
    first = world.server()
    world.run(first, until=lambda: first._state.phase == "finish")
    again = world.server()
    assert again._state.phase == "finish"
    assert again._due("alpha") is None, "it would be the adapter before the first round"
    world.run(again)
    for client in world.clients.values():
        assert_close(client.released[-1], expected(world, 2))


def test_another_adapter_under_the_newest_state_is_refused(world: World):
    """A genuine sealed file of this enclave, but not the one that its state names."""
    asked = world.clients["beta"].asked
    world.clients["gamma"].change = lambda m: (
        RoundProgress(0, 1, is_lost=False) if isinstance(m, RoundRequest) and m.round == 2 else None
    )
    server = world.server()
    world.run(server, until=lambda: any(isinstance(m, RoundRequest) and m.round == 2 for m in asked))
    server.close()
    other = AdapterState(SPEC, tensors(7)).to_bytes()
    write_sealed(server._file(1), other, key=server._key, label=server._label, version=1)
    with pytest.raises(RollbackError, match="not the adapter"):
        world.run()


def test_the_aggregation_and_the_run_count_the_same_rounds(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Aggregator, "begin", lambda *_: 9)
    with pytest.raises(FederationError, match="not at round 1"):
        world.run()


def test_a_restart_after_the_evaluation_measures_nothing_again(world: World):
    world.run()
    server = world.server()
    n_asked = [len(client.asked) for client in world.clients.values()]
    server._state.phase = "evaluate"
    server._state.report = b""
    world.run(server)
    assert [len(client.asked) for client in world.clients.values()] == [n + 1 for n in n_asked]  # the report alone
    assert world.report(server)["metric"]["value"] == 0.75


def test_stop_ends_it_with_a_hint(world: World):
    server = world.server()
    server.stop()
    server.close()
    with pytest.raises(FederationError, match="stopped by the host"):
        world.run(server)


def test_evidence_of_a_client_is_judged_and_noted(tmp_path: Path, no_client_key: None):
    world = World(tmp_path)
    server = world.server()
    decision = SimpleNamespace(claims=SimpleNamespace(to_dict=lambda: {"tee": "simulated"}))
    server._verify_client = lambda *_: decision  # type: ignore[assignment,return-value]
    key, verify = server._client_verifier(b"beta")  # type: ignore[misc]
    assert key == b"beta" and verify(None, b"") is decision
    assert server._decisions == {"beta": {"tee": "simulated"}}


def test_no_questions(world: World):
    with pytest.raises(FederationError, match="answers no questions"):
        world.server().handle("exchange", {})
