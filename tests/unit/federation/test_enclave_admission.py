"""Method 1's handshake, both ways, with real evidence: who is not on the allow-list is named, with the key."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, render_policy, verify_evidence
from cloister.channel import AttestedNodeProver, NodeKeyProver
from cloister.errors import MeasurementMismatchError, PeerError
from cloister.federation import (
    AggregationSpec,
    ClientPlan,
    ClientRun,
    EnclaveServer,
    EnclaveServerPlan,
    generate_node_key,
    load_node_key,
)
from cloister.federation._keys import spki
from cloister.wire import AdmitAnswer, RoundProgress

NOW = 1_800_000_000
SERVER, CLIENT, OTHER = b"\1" * 48, b"\2" * 48, b"\3" * 48


class Waiting:
    """A `ClientWork` that is never done."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def serve(self, message: Any) -> RoundProgress:
        self.asked.append(message)
        return RoundProgress(0, 0, is_lost=False)

    def stop(self) -> None: ...

    def keep_release(self, release: bytes) -> None: ...


class World:
    def __init__(self, folder: Path, *, server: bytes = SERVER, client: bytes = CLIENT, with_evidence: bool = True):
        root = SimulatedRoot.create(folder / "root", now=NOW)
        (folder / "policy.toml").write_bytes(
            render_policy(root_sha256=root.root_sha256, server_rtmr3=[SERVER], client_rtmr3=[CLIENT])
        )
        self.policy = Policy.load(folder / "policy.toml")
        generate_node_key(folder / "node.pem")
        key = spki(load_node_key(folder / "node.pem").public_key())
        self.events: list[dict[str, Any]] = []
        self.work = Waiting()
        plan = ClientPlan(
            run_id="run-1", name="north", job_sha384=b"\5" * 48, policy=self.policy,
            server_policy_sha384=self.policy.sha384, task=None, datasets={}, node_key=folder / "node.pem", work=folder,
        )  # type: ignore[arg-type]  # fmt: skip
        enclave = SimulatedAttester(root.provision(), rtmr3=client)
        prove = partial(AttestedNodeProver, make_evidence=enclave.evidence) if with_evidence else NodeKeyProver
        self.client = ClientRun(plan, self.work, now=lambda: NOW + 1.0, emit=self.emit, prove=prove)
        server_plan = EnclaveServerPlan(
            run_id="run-1", job_sha384=b"\5" * 48, policy=self.policy, task=None, train=SimpleNamespace(seed=0),
            node_keys={"north": key}, inbox=folder, work=folder, store_url="", min_clients=1, timeout_s=9.0,
            patience_s=0.1, adapter=None, model_path="", n_rounds=1, aggregation=AggregationSpec(1.0), memory_bytes=1,
        )  # type: ignore[arg-type]  # fmt: skip
        self.server = EnclaveServer(
            server_plan, SimulatedAttester(root.provision(), rtmr3=server), load=lambda: None,  # type: ignore[arg-type,return-value]
            verify_client=lambda evidence, data: verify_evidence(
                evidence, self.policy, role="client", report_data=data, now=NOW + 1
            ),
            now=lambda: NOW + 1.0, emit=self.emit,
        )  # fmt: skip

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def carry(self, n: int = 12) -> None:
        for _ in range(n):
            for send in self.server.handle("poll", {"carrying": []})["send"]:
                blob = self.client.handle("request", {"blob": send["blob"]})["blob"]
                self.server.handle("deliver", {"client": send["client"], "blob": blob})

    @property
    def causes(self) -> list[str]:
        return [event["cause"] for event in self.events if event["event"] == "error"]


def test_both_enclaves_accept_each_other(tmp_path: Path):
    world = World(tmp_path)
    world.carry()
    assert world.causes == [] and world.work.asked
    assert world.server._decisions["north"]["simulated"] is True
    assert [e["accepted"] for e in world.events if e["event"] == "evidence"] == [True]


@pytest.mark.parametrize("lost", [{"carrying": []}, {"carrying": ["south"]}, {}, {"carrying": 5}], ids=str)
def test_a_message_goes_out_again_unchanged_where_no_courier_carries_it(tmp_path: Path, lost: dict):
    poll = World(tmp_path).server.handle
    [first] = poll("poll", {"carrying": []})["send"]
    assert poll("poll", {"carrying": ["north"]})["send"] == [], "it was handed out twice"
    assert poll("poll", lost)["send"] == [first]


def test_a_client_enclave_that_the_policy_does_not_list(tmp_path: Path):
    world = World(tmp_path, client=OTHER)
    world.carry()
    [cause] = world.causes
    assert cause.startswith("the enclave of client north is refused: ") and "rtmr3" in cause
    assert world.server._peers["north"].failed == MeasurementMismatchError.code
    with pytest.raises(PeerError, match=r"client north is refused.*rtmr3") as caught:
        world.server._refuse_if_hopeless()
    assert caught.value.peer == "north" and caught.value.peer_code == MeasurementMismatchError.code
    assert world.work.asked == [], "it was asked for work"


def test_a_server_enclave_that_the_policy_does_not_list(tmp_path: Path):
    world = World(tmp_path, server=OTHER)
    world.carry()
    assert any("rtmr3" in cause for cause in world.causes)
    assert [e["accepted"] for e in world.events if e["event"] == "evidence"] == [False]
    assert world.work.asked == [] and world.server._decisions == {}


def test_a_client_without_an_enclave(tmp_path: Path):
    world = World(tmp_path, with_evidence=False)
    world.carry(40)
    assert any("client north" in cause for cause in world.causes)
    assert world.server._peers["north"].failed and world.work.asked == [] and world.server._decisions == {}


def test_a_refusal_ends_the_wait_at_once(tmp_path: Path):
    """The reason is in the error that ends the run, not in a log only."""
    world = World(tmp_path)
    world.server._loaded = dict.fromkeys(("backbone_sha384", "tokenizer_sha384", "adapter_sha384"), b"x" * 48)
    with pytest.raises(PeerError, match=r"client north has another model\.path \(tokenizer\)"):
        world.server._admit("north", AdmitAnswer(b"x" * 48, b"y" * 48, b"x" * 48, 1, 1))
    began = time.monotonic()
    with pytest.raises(PeerError, match=r"client north has another model\.path \(tokenizer\).*\(federation\.job\)"):
        world.server._await(lambda: ["north"], lambda: 0)
    assert time.monotonic() - began < 5
