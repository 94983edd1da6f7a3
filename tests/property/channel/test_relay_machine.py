"""A relay that does what it likes between the server's and two clients' real ends of the channel, as a state machine.

The server's end is `Peer`, the client's is `ClientRun` with its `ServerLink`, evidence is of a real simulated platform;
only the work on the data is replaced by a note of what arrived. Whatever the relay does: each plaintext arrives at most
once, at the client it was meant for, as the answer to the question that is open; no key ever seals two plaintexts; and
once the relay is honest again there is progress, or one clear error.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from cloister import wire
from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, render_policy
from cloister.channel import SessionContext, _handshake, _session, encrypt_chunked
from cloister.errors import CloisterError, PeerError, error_for_code
from cloister.federation import ClientPlan, _client, generate_node_key, load_node_key
from cloister.federation._keys import spki
from cloister.federation._peer import MAX_STRIKES, Peer

NOW = 1_800_000_000
NAMES = ("alpha", "beta")
RTMR3 = b"\1" * 48
MAX_AGE_S = 60
FORGED = ("channel.no-session", "channel.decryption", "wire.malformed", "attest.policy", "nonsense")
names = st.sampled_from(NAMES)
picks = st.integers(0, 1 << 20)


@cache
def world() -> SimpleNamespace:
    """One platform, two node keys, two policies that differ in a comment."""
    folder = Path(tempfile.mkdtemp(prefix="cloister-machine-"))
    root = SimulatedRoot.create(folder / "root", now=NOW)
    text = render_policy(root_sha256=root.root_sha256, server_rtmr3=[RTMR3])
    text = text.replace(b"max_session_age_s = 86400", b"max_session_age_s = %d" % MAX_AGE_S)
    keys: dict[str, bytes] = {}
    for name in NAMES:
        generate_node_key(folder / f"{name}.pem")
        keys[name] = spki(load_node_key(folder / f"{name}.pem").public_key())
    attester = SimulatedAttester(root.provision(), rtmr3=RTMR3)
    return SimpleNamespace(folder=folder, policies=(text, text + b"# changed\n"), keys=keys, attester=attester)


@dataclass
class Ledger:
    """What was sealed under which key, and what came out where."""

    sealed: dict[bytes, bytes] = field(default_factory=dict)
    arrived: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in NAMES})
    answered: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in NAMES})

    def encrypt(self, key: bytes, plaintext: Any, context: bytes, *, prefix: bytes = b"") -> bytes:
        """In the place of the channel's own: the same, with a look at the key."""
        found = bytes(plaintext)
        assert self.sealed.setdefault(key, found) == found, "two plaintexts under one key"
        return encrypt_chunked(key, plaintext, context, prefix=prefix)


class NotingClient(_client.ClientRun):
    """A client that notes each request it opened in place of serving it, and answers with the request's number."""

    def __init__(self, machine: RelayMachine, name: str) -> None:
        self._machine = machine
        path = world().folder / f"{name}.policy.toml"
        policy = Policy.load(path)
        nothing: Any = None
        plan = ClientPlan(
            run_id="run-1", name=name, job_sha384=bytes(48), policy=policy, server_policy_sha384=policy.sha384,
            task=nothing, datasets={}, node_key=world().folder / f"{name}.pem", work=world().folder,
        )  # fmt: skip
        super().__init__(plan, nothing, now=lambda: machine.now, emit=lambda *_, **__: None)

    def _serve(self, message: wire.RecordMessage) -> wire.RecordMessage:
        name = self._plan.name
        assert isinstance(message, wire.PrepareRequest), "a record came back to the side that sealed it"
        assert message.job_sha384 == name.encode().ljust(48), "a request for the other client"
        policy = Policy.parse(world().policies[self._machine.of_client[name]])
        assert self._link._policy.sha384 == policy.sha384, "a request taken in a session of an older policy"
        number = int(message.patience_s)
        arrived = self._machine.ledger.arrived[name]
        assert number not in arrived, "a request was delivered twice"
        arrived.add(number)
        return wire.PrepareProgress(0, number, number)


class RelayMachine(RuleBasedStateMachine):
    """The relay is the machine: it holds every blob it ever saw."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW + 10.0
        self.ledger = Ledger()
        self.patch = pytest.MonkeyPatch()
        for module in (_session, _handshake):
            self.patch.setattr(module, "encrypt_chunked", self.ledger.encrypt)
        self.seen: list[bytes] = []
        self.number = 0
        self.asked: dict[str, int] = {}
        self.of_server = dict.fromkeys(NAMES, 0)
        self.of_client = dict.fromkeys(NAMES, 0)
        self.peers: dict[str, Peer] = {}
        self.clients: dict[str, NotingClient] = {}
        for name in NAMES:
            self._write_policy(name, 0)
            self._start_peer(name)
            self.clients[name] = NotingClient(self, name)

    def teardown(self) -> None:
        try:
            for name in NAMES:
                self._heal(name)
        finally:
            self.patch.undo()

    # --- the two ends -----------------------------------------------------------------------------------------------

    def _write_policy(self, name: str, variant: int) -> None:
        self.of_client[name] = variant
        (world().folder / f"{name}.policy.toml").write_bytes(world().policies[variant])

    def _start_peer(self, name: str) -> None:
        if name in self.peers:
            self.peers[name].close()
        policy = Policy.parse(world().policies[self.of_server[name]])
        context = SessionContext("run-1", name, policy.sha384, policy.sha384, world().keys[name])
        self.peers[name] = Peer(
            name, context, world().attester, max_age_s=policy.max_session_age_s, now=lambda: self.now
        )

    def _poll(self, name: str) -> bytes:
        """What the server hands to its courier: as `ServerRun` does it."""
        peer = self.peers[name]
        if peer.outstanding is None:
            if peer.session is None:
                peer.connect()
            else:
                self.number += 1
                self.asked[name] = self.number
                peer.request(wire.PrepareRequest(name.encode().ljust(48), float(self.number)))
        assert peer.outstanding is not None
        return peer.outstanding

    def _to_client(self, name: str, blob: bytes) -> bytes:
        answer = self.clients[name].handle("request", {"blob": blob})["blob"]
        self.seen += [blob, answer]
        return answer

    def _to_server(self, name: str, blob: bytes) -> bool:
        """Whether a request was answered by it."""
        peer = self.peers[name]
        if peer.failed:
            self._start_peer(name)
            return False
        try:
            message = peer.receive(blob)
        except PeerError as error:
            assert peer.failed and error.peer == name and error.peer_code == peer.failed and error.cause
            self.peers[name].close()
            return False
        if message is None:
            return False
        assert isinstance(message, wire.PrepareProgress), "a record came back to the side that sealed it"
        assert message.n_total == self.asked[name], "the answer to another question"
        assert message.n_total in self.ledger.arrived[name], "an answer that this client did not give"
        assert message.n_total not in self.ledger.answered[name], "an answer was taken twice"
        self.ledger.answered[name].add(message.n_total)
        return True

    def _exchange(self, name: str) -> bool:
        if self.peers[name].failed:
            self._start_peer(name)
        return self._to_server(name, self._to_client(name, self._poll(name)))

    # --- what a relay can do ------------------------------------------------------------------------------------------

    @rule(name=names, n=st.integers(1, 4))
    def carry(self, name: str, n: int) -> None:
        for _ in range(n):
            self._exchange(name)

    @rule(name=names)
    def drop_the_answer(self, name: str) -> None:
        if not self.peers[name].failed:
            self._to_client(name, self._poll(name))

    @rule(name=names)
    def drop_the_request(self, name: str) -> None:
        if not self.peers[name].failed:
            self.seen.append(self._poll(name))

    @rule(name=names)
    def send_twice(self, name: str) -> None:
        if self.peers[name].failed:
            return
        blob = self._poll(name)
        first = self._to_client(name, blob)
        again = self._to_client(name, blob)
        assert first == again or "error" in (wire.Envelope.parse(first).kind, wire.Envelope.parse(again).kind)
        self._to_server(name, first)
        self._to_server(name, again)

    @precondition(lambda self: self.seen)
    @rule(name=names, pick=picks, to_server=st.booleans())
    def replay(self, name: str, pick: int, to_server: bool) -> None:
        """Anything that was ever seen, to anybody."""
        blob = self.seen[pick % len(self.seen)]
        if to_server:
            self._to_server(name, blob)
        else:
            self._to_client(name, blob)

    @rule(name=names, bit=picks, downwards=st.booleans())
    def tamper(self, name: str, bit: int, downwards: bool) -> None:
        if self.peers[name].failed:
            return
        blob = self._poll(name)
        if downwards:
            self._to_client(name, _flip(blob, bit))
        else:
            self._to_server(name, _flip(self._to_client(name, blob), bit))

    @rule(name=names, code=st.sampled_from(FORGED))
    def forge_an_error(self, name: str, code: str) -> None:
        self._to_server(name, wire.Envelope("error", code.encode()).to_bytes())

    @rule(name=names)
    def cross(self, name: str) -> None:
        """One client's request to the other, and its answer to the first one's place."""
        if not self.peers[name].failed:
            other = NAMES[name == NAMES[0]]
            self._to_server(name, self._to_client(other, self._poll(name)))

    @rule(name=names)
    def kill_the_client(self, name: str) -> None:
        self.clients[name] = NotingClient(self, name)

    @rule(name=names)
    def kill_the_server(self, name: str) -> None:
        self._start_peer(name)

    @rule(seconds=st.sampled_from([1, MAX_AGE_S, MAX_AGE_S + 1, 5 * MAX_AGE_S]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(name=names, variant=st.integers(0, 1))
    def change_the_clients_policy(self, name: str, variant: int) -> None:
        self._write_policy(name, variant)

    @rule(name=names, variant=st.integers(0, 1))
    def restart_the_server_under_a_policy(self, name: str, variant: int) -> None:
        self.of_server[name] = variant
        self._start_peer(name)

    # --- an honest relay ----------------------------------------------------------------------------------------------

    @rule(name=names)
    def be_honest(self, name: str) -> None:
        """Progress where both work by one policy; a clear end where they do not."""
        peer = self.peers[name]
        if self.of_server[name] == self.of_client[name]:
            self._make_progress(name)
            return
        if not peer.failed:
            done = any(self._exchange(name) or peer.failed for _ in range(2 * MAX_STRIKES + 2))
            assert done and peer.failed, "neither an answer nor an error under different policies"
            assert error_for_code(peer.failed) is not CloisterError

    def _heal(self, name: str) -> None:
        if self.of_server[name] != self.of_client[name]:
            self._write_policy(name, self.of_server[name])
        self._make_progress(name)

    def _make_progress(self, name: str) -> None:
        """An answer. What the relay did before may first end the peer, with a clear error; a fresh one must succeed."""
        for _ in range(2):
            peer, link = self.peers[name], self.clients[name]._link
            had_failed = peer.failed
            was_hurt = had_failed or peer._strikes or link._n_unanswered
            if (
                not peer.failed
                and any(self._exchange(name) or peer.failed for _ in range(2 * MAX_STRIKES + 2))
                and not peer.failed
            ):
                return
            assert peer.failed, "neither progress nor an error"
            assert was_hurt, f"an honest relay, and still {peer.failed}"
            # One that had failed before may carry any code that the relay made up: error envelopes are unauthenticated.
            assert had_failed or error_for_code(peer.failed) is not CloisterError
            self._start_peer(name)
        raise AssertionError("no progress with an honest relay")


def _flip(blob: bytes, bit: int) -> bytes:
    bit %= 8 * len(blob)
    altered = bytearray(blob)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


TestRelay = RelayMachine.TestCase
TestRelay.settings = settings(
    deadline=None,
    derandomize=True,
    max_examples=100,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
