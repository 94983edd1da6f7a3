"""A session ends by age on either side, and when the client's policy changes; a new handshake follows, not an abort."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, render_policy
from cloister.channel import SessionContext
from cloister.errors import (
    ChannelError,
    ConfigError,
    FederationError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    NoSessionError,
    PeerError,
    PolicyRejectedError,
    RollbackError,
)
from cloister.federation import ClientPlan, NearWork, Questioner, ServerLink, generate_node_key, load_node_key
from cloister.federation._client import MAX_UNANSWERED, ClientRun
from cloister.federation._keys import spki
from cloister.federation._peer import MAX_STRIKES, Peer
from cloister.federation._policy_file import PolicyFile
from cloister.federation._report import report_data
from cloister.federation._split.answers import PredictDesk
from cloister.wire import (
    Envelope,
    Evidence,
    FinishAnswer,
    FinishRequest,
    Header,
    PredictAnswer,
    PrepareProgress,
    PrepareRequest,
    pack,
)

NOW = 1_800_000_000
RTMR3 = b"\1" * 48


@dataclass
class World:
    """One server's end, one client's end, and a clock."""

    folder: Path
    now: float = NOW + 1.0
    said: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = SimulatedRoot.create(self.folder / "root", now=NOW)
        self.policy_path = self.folder / "policy.toml"
        text = render_policy(root_sha256=self.root.root_sha256, server_rtmr3=[RTMR3])
        self.policy_path.write_bytes(text.replace(b"max_session_age_s = 86400", b"max_session_age_s = 60"))
        self.attester = SimulatedAttester(self.root.provision(), rtmr3=RTMR3)
        generate_node_key(self.folder / "node.pem")
        self.node_key = spki(load_node_key(self.folder / "node.pem").public_key())
        self.peer = self.new_peer()
        self.client = self.new_client()

    def plan(self) -> ClientPlan:
        policy = Policy.load(self.policy_path)
        return ClientPlan(
            run_id="run-1", name="north", job_sha384=b"\5" * 48, policy=policy, server_policy_sha384=policy.sha384,
            task=None, datasets={}, node_key=self.folder / "node.pem", work=self.folder,
        )  # type: ignore[arg-type]  # fmt: skip

    def new_client(self) -> ClientRun:
        def say(event: str, **fields: Any) -> None:
            self.said.append({"event": event, **fields})

        plan: Any = self.plan()
        work = NearWork(plan, lambda *_: _Waiting(), emit=say)  # type: ignore[arg-type,return-value]
        return ClientRun(plan, work, now=lambda: self.now, emit=say)

    def new_peer(self, name: str = "north") -> Peer:
        if name != "north":
            raise KeyError(name)
        policy = Policy.load(self.policy_path)
        context = SessionContext("run-1", "north", policy.sha384, policy.sha384, self.node_key)
        return Peer("north", context, self.attester, max_age_s=policy.max_session_age_s, now=lambda: self.now)

    def change_policy(self, words: bytes = b"\n# tightened\n") -> None:
        self.policy_path.write_bytes(self.policy_path.read_bytes() + words)

    def handle(self, blob: bytes) -> bytes:
        return self.client.handle("request", {"blob": blob})["blob"]

    def exchange(self) -> Any:
        """One blob there and back; as `ServerRun` does it."""
        if self.peer.outstanding is None:
            if self.peer.session is None:
                self.peer.connect()
            else:
                self.peer.request(PrepareRequest(b"\5" * 48, 0.0))
        assert self.peer.outstanding is not None
        return self.peer.receive(self.handle(self.peer.outstanding))

    def until_answered(self, limit: int = 12) -> int:
        """Exchanges until a request is answered."""
        for n in range(1, limit):
            if isinstance(self.exchange(), PrepareProgress):
                return n
        raise AssertionError("no answer")


class _Waiting:
    """A near run that is never done."""

    def run(self, _: object) -> Any:
        import threading

        threading.Event().wait()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_an_aged_session_is_renewed_by_the_server(world: World) -> None:
    assert world.until_answered() == 3
    first = world.peer.session
    world.now += 60
    assert world.until_answered() == 1
    assert world.peer.session is first
    world.now += 1
    assert world.until_answered() == 3
    assert world.peer.session is not first and world.peer._strikes == 0


def test_a_client_does_not_seal_in_an_aged_session_and_the_run_goes_on(world: World) -> None:
    """The request was sealed in time, and comes to the client too late."""
    world.until_answered()
    world.peer.request(PrepareRequest(b"\5" * 48, 0.0))
    assert world.peer.outstanding is not None
    world.now += 61
    answer = Envelope.parse(world.handle(world.peer.outstanding))
    assert (answer.kind, answer.error_code) == ("error", NoSessionError.code)
    assert world.client._link.session is None
    assert world.peer.receive(answer.to_bytes()) is None and not world.peer.failed
    assert world.until_answered() == 3


def test_a_session_that_ages_while_the_client_works_gives_no_answer(world: World) -> None:
    world.until_answered()
    serve = world.client._serve

    def slowly(message: Any) -> Any:
        world.now += 61
        return serve(message)

    world.client._serve = slowly  # type: ignore[method-assign]
    assert world.exchange() is None
    world.client._serve = serve  # type: ignore[method-assign]
    assert world.until_answered() == 3 and not world.peer.failed


def test_an_answer_that_comes_too_late_is_asked_for_again(world: World) -> None:
    world.until_answered()
    world.peer.request(PrepareRequest(b"\5" * 48, 0.0))
    assert world.peer.outstanding is not None
    answer = world.handle(world.peer.outstanding)
    world.now += 61
    assert world.peer.receive(answer) is None
    assert world.peer.session is None and Envelope.parse(world.peer.outstanding).kind == "f1"
    assert world.until_answered() == 3


def test_a_session_that_always_ages_too_soon_ends_the_run_some_day(world: World) -> None:
    def slowly(message: Any) -> Any:
        world.now += 61
        return PrepareProgress(0, 0, 0)

    world.client._serve = slowly  # type: ignore[method-assign]
    with pytest.raises(PeerError) as caught:
        for _ in range(3 * MAX_STRIKES):
            world.exchange()
    assert caught.value.peer_code == world.peer.failed == NoSessionError.code


def test_a_changed_policy_ends_the_session_and_the_new_one_is_bound(world: World) -> None:
    world.until_answered()
    world.change_policy()
    assert world.exchange() is None
    assert world.client._link.session is None
    world.peer.close()
    world.peer = world.new_peer()  # started anew, under the new policy
    assert world.until_answered() == 3
    context = world.client._link.context()
    digest = hashlib.sha384(world.policy_path.read_bytes()).digest()
    assert context.server_policy_sha384 == context.client_policy_sha384 == digest


def test_a_policy_of_the_server_that_is_another_file_is_left_alone(world: World) -> None:
    from dataclasses import replace

    plan = replace(world.plan(), server_policy_sha384=b"\7" * 48)
    link = ServerLink(plan, now=lambda: world.now, on_decision=lambda _: None)
    assert link.context().server_policy_sha384 == b"\7" * 48


def test_a_changed_policy_that_the_server_does_not_have_is_named(world: World) -> None:
    world.until_answered()
    world.change_policy()
    with pytest.raises(PeerError) as caught:
        for _ in range(12):
            world.exchange()
    assert caught.value.peer_code == PolicyRejectedError.code
    told = [event for event in world.said if event["event"] == "error"]
    assert len(told) == 1 and told[0]["code"] == PolicyRejectedError.code
    assert str(world.policy_path) in told[0]["cause"] and told[0]["hint"]
    assert MAX_UNANSWERED < MAX_STRIKES


def test_the_old_policy_put_back_works_again(world: World) -> None:
    world.until_answered()
    old = world.policy_path.read_bytes()
    world.change_policy()
    world.exchange()
    world.exchange()
    world.policy_path.write_bytes(old)
    assert world.until_answered() and not world.peer.failed


def test_a_policy_that_changes_inside_a_handshake_gives_no_proof(world: World) -> None:
    world.exchange()  # F1, F2
    world.change_policy()
    assert world.peer.outstanding is not None
    answer = Envelope.parse(world.handle(world.peer.outstanding))
    assert answer.error_code == NoSessionError.code
    assert not [event for event in world.said if event["event"] == "evidence"]


@pytest.mark.parametrize("words", [b"\nunknown = 1\n", b"\x00"])
def test_a_policy_that_cannot_be_read_is_told_and_nothing_is_sent(world: World, words: bytes) -> None:
    world.until_answered()
    world.change_policy(words)
    with pytest.raises(PeerError) as caught:
        world.exchange()
    assert caught.value.peer_code == ConfigError.code
    assert [event["code"] for event in world.said if event["event"] == "error"] == [ConfigError.code]


def test_policy_file(world: World) -> None:
    source = PolicyFile(Policy.load(world.policy_path))
    first = source()
    assert source() is first
    world.change_policy()
    assert source().sha384 == hashlib.sha384(world.policy_path.read_bytes()).digest()
    world.policy_path.unlink()
    with pytest.raises(ConfigError, match="cannot read the policy") as caught:
        source()
    assert caught.value.source == str(world.policy_path)
    made = Policy.parse(render_policy(root_sha256="ab" * 32))
    assert PolicyFile(made)() is made
    assert repr(source) == f"PolicyFile({str(world.policy_path)!r})"


def test_refused_evidence_is_told_once(world: World) -> None:
    world.attester = SimulatedAttester(world.root.provision(), rtmr3=b"\2" * 48)
    world.peer = world.new_peer()
    with pytest.raises(PeerError):
        for _ in range(3):
            world.exchange()
    assert world.peer.failed == MeasurementMismatchError.code
    assert [event["event"] for event in world.said] == ["evidence", "error"]


def test_parties_of_different_policies_are_told_what_to_compare(world: World) -> None:
    world.change_policy()
    world.client = world.new_client()
    with pytest.raises(PeerError) as caught:
        for _ in range(12):
            world.exchange()
    assert "policy_sha384" in caught.value.hint
    assert caught.value.peer_code == "channel.decryption"


# What a client remembers of the server's progress.


def _finish(world: World, report: bytes) -> Any:
    evidence = world.attester.evidence(report_data(report)).to_bytes()
    return world.client._serve(FinishRequest(report, evidence, b""))


def test_a_server_that_forgot_the_report_it_delivered_is_refused(world: World) -> None:
    world.until_answered()
    report = b'{"version":1}'
    assert isinstance(_finish(world, report), FinishAnswer)
    assert isinstance(_finish(world, report), FinishAnswer)  # a restart of either side repeats the answer
    with pytest.raises(RollbackError, match="different report"):
        _finish(world, b'{"version":1,"more":2}')
    assert (world.folder / "report.json").read_bytes() == report
    world.client = world.new_client()  # it remembers after a restart
    with pytest.raises(RollbackError, match="already delivered"):
        world.client._serve(PrepareRequest(b"\5" * 48, 0.0))


def test_evidence_is_looked_at_before_memory(world: World) -> None:
    world.until_answered()
    _finish(world, b'{"version":1}')
    evidence = Evidence("simulated", b"", b"").to_bytes()
    with pytest.raises(MalformedEvidenceError):
        world.client._serve(FinishRequest(b"{}", evidence, b""))


# Questions to the tuned model.


class _Far:
    """Answers with what it is asked for; the real one needs a model."""

    hidden_size, task = 4, None


@pytest.fixture
def desk(world: World, monkeypatch: pytest.MonkeyPatch) -> PredictDesk:
    made = PredictDesk(world.new_peer, _Far())  # type: ignore[arg-type]
    answer = PredictAnswer(pack("predictions", {"answers": [{"next_token": 7}]}))
    monkeypatch.setattr(made, "_answer", lambda message: answer)
    return made


def _questioner(world: World, desk: PredictDesk) -> Questioner:
    plan = world.plan()
    link = ServerLink(plan, now=lambda: world.now, on_decision=lambda _: None)
    return Questioner(plan, link, lambda blob: desk.exchange({"client": "north", "blob": blob}, is_open=True)["blob"])


def test_questions_outlive_a_session(world: World, desk: PredictDesk) -> None:
    questioner = _questioner(world, desk)
    questioner.connect()
    assert questioner.ask(b"x") == [{"next_token": 7}]
    first = questioner._link.session
    world.now += 61
    assert questioner.ask(b"x") == [{"next_token": 7}]
    assert questioner._link.session is not first


def test_questions_outlive_a_session_that_aged_at_the_server(world: World, desk: PredictDesk) -> None:
    questioner = _questioner(world, desk)
    questioner.connect()
    session = desk._peers["north"].session
    assert session is not None
    session.opened_at -= 100
    assert questioner.ask(b"x") == [{"next_token": 7}]
    assert desk._peers["north"].session is not session


def test_questions_under_a_changed_policy_are_refused_by_name(world: World, desk: PredictDesk) -> None:
    questioner = _questioner(world, desk)
    questioner.connect()
    before = world.policy_path.read_bytes()
    world.change_policy()
    text = world.policy_path.read_bytes()

    def old_server(_: str) -> Peer:
        world.policy_path.write_bytes(before)
        try:
            return world.new_peer()
        finally:
            world.policy_path.write_bytes(text)

    desk._new_peer = old_server
    with pytest.raises(PolicyRejectedError, match="same run, node key and policy") as caught:
        questioner.ask(b"x")
    assert str(world.policy_path) in caught.value.hint


def test_other_flights_where_one_is_due(world: World) -> None:
    link = ServerLink(world.plan(), now=lambda: world.now, on_decision=lambda _: None)
    with pytest.raises(FederationError, match="sent nothing"):
        Questioner(world.plan(), link, lambda _: b"").connect()
    f4 = Envelope("f4", b"").to_bytes()
    with pytest.raises(ChannelError, match="f1 is due"):
        Questioner(world.plan(), link, lambda _: f4).connect()
    with pytest.raises(NoSessionError):
        link.seal(Header("run-1", 1, "x", "north", "server"), b"")
    with pytest.raises(NoSessionError):
        link.flight4(b"")
