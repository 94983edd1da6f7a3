"""kill -9 of every party of Method 1 in mid-round: the same final adapter, bit for bit, and the same metric.

One run takes all the kills, one a round: the accelerator, a client's enclave, the server enclave, the relay. Another
goes over Flower, whose SuperLink is killed. Equality of the adapters says that no update was counted twice, trained
otherwise, or lost. (Sums over clients run in the order of arrival, in float64: two clients' sum does not depend on it.
Of three and more the last bit may.)
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cloister import run
from cloister.api import Launch, Programs
from cloister.api._folder import RunFolder
from cloister.api._local_model import _whole_side, starting_adapter
from cloister.api._plans import enclave_client_plan, enclave_server_plan
from cloister.attest import Policy
from cloister.federation import Aggregator
from cloister.offload import OffloadSession
from cloister.ring import FORMATS
from cloister.slicing import load_tokenizer, offload_model
from cloister.testing import FakeAccelerator, FakeRelay, write_tiny_job
from cloister.train import LocalTraining, token_features

SECTIONS = """
[method]
name = "enclave"
rounds = {rounds}
[federation]
patience_s = {patience_s}
[release]
what = "adapter"
"""
TRAINING = "epochs = 2\nbatch_size = 4\nlr = 0.01"
VICTIMS = {1: "accelerator/alpha", 2: "client/beta", 3: "server", 4: "relay"}


class Relays:
    """Builds the relay, and kills it: its courier is gone, and another one, which knows nothing, takes its place."""

    def __call__(self, *args, **kwargs) -> FakeRelay:
        self.last = FakeRelay(*args, **kwargs)
        return self.last

    def restart(self) -> None:
        self.last.stop()
        self.last._stop = threading.Event()
        self.last.start()


@dataclass
class Killer:
    """Kills the victim of each round once the first client has made two steps of it."""

    victims: dict[int, str]
    relays: Relays | None = None
    due: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)

    def note(self, event: dict) -> None:
        if event["event"] == "step" and event["step"] == 2:
            victim = self.victims.get(event["round"])
            if victim and victim not in self.killed and victim not in self.due:
                self.due.append(victim)

    def tick(self, launch: Launch) -> None:
        while self.due:
            victim = self.due.pop(0)
            self.killed.append(victim)
            if victim == "relay" and self.relays:
                self.relays.restart()
            else:
                os.kill(launch.pids()[victim][0], signal.SIGKILL)


def _adapter(run_dir: Path, client: str) -> bytes:
    return (run_dir / "clients" / client / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs, with three processes that start anew
@pytest.mark.xdist_group("kill")
def test_kill_everybody_in_mid_round(tmp_path: Path):
    job = write_tiny_job(tmp_path, n_train=40, training=TRAINING, sections=SECTIONS.format(rounds=4, patience_s=0.5))
    whole = run(job, runs_dir=tmp_path / "whole", programs=Programs(relay=FakeRelay))

    relays = Relays()
    killer = Killer(VICTIMS, relays)
    events: list[dict] = []

    def note(event: dict) -> None:
        events.append(event)
        killer.note(event)

    done = run(job, runs_dir=tmp_path / "killed", programs=Programs(relay=relays), on_event=note, on_tick=killer.tick)
    assert killer.killed == list(VICTIMS.values())
    restarted = [event["process"] for event in events if event["event"] == "restart"]
    assert restarted == ["accelerator/alpha", "client/beta", "server"]
    rounds = [event["n_round"] for event in events if event["event"] == "round"]
    assert sorted(set(rounds)) == [1, 2, 3, 4] and len(rounds) == 4, "a round was counted twice"
    assert [r["clients"] for r in done.result["rounds"]] == [["alpha", "beta"]] * 4
    assert done.result["metric"] == whole.result["metric"]
    for client in ("alpha", "beta"):
        assert _adapter(done.run_dir, client) == _adapter(whole.run_dir, "alpha")


# --- over Flower ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """As the clients compute, of which two share the cores: the same sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _expected_adapter(run_dir: Path, n_rounds: int) -> str:
    """SHA-384 of the global adapter after these rounds, each client's update counted once; computed in this process."""
    folder = RunFolder.open(run_dir)
    job, policy = folder.read_job(), Policy.load(folder.policy)
    server = enclave_server_plan(job, folder, policy, {})
    start, _ = starting_adapter(server)
    aggregator = Aggregator(server.aggregation, start, min_clients=2, folder=run_dir / "server")
    plans = [enclave_client_plan(job, folder, policy, name) for name in job.client_names]
    for n_round in range(1, n_rounds + 1):
        given = aggregator.state.to_bytes()
        aggregator.begin([plan.name for plan in plans])
        for plan in plans:
            side, info = _whole_side(plan)
            with OffloadSession(FakeAccelerator(), FORMATS[plan.mask.ring], bucket=plan.mask.bucket) as session:
                offload_model(side, session)
                source, _ = token_features(
                    plan.name, plan.datasets, load_tokenizer(info), plan.task, model_max_length=info.max_length
                )
                done = LocalTraining(side, source, plan.train, plan.task).train(given, n_round)
            aggregator.add(plan.name, done.n_examples, done.update, round=n_round)
        aggregator.finish()
    return hashlib.sha384(aggregator.to_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_over_the_real_relay_whose_superlink_is_killed_in_mid_round(tmp_path: Path):
    job = write_tiny_job(
        tmp_path, n_train=40, n_test=3, training=TRAINING, sections=SECTIONS.format(rounds=2, patience_s=2.0)
    )
    killer = Killer({1: "superlink"})
    events: list[dict] = []

    def note(event: dict) -> None:
        events.append(event)
        killer.note(event)

    done = run(job, runs_dir=tmp_path / "runs", on_event=note, on_tick=killer.tick)
    kinds = [(event["event"], event.get("process", event.get("n_round"))) for event in events]
    assert kinds.index(("restart", "superlink")) < kinds.index(("round", 1)), "the round was over too soon"
    assert [n for kind, n in kinds if kind == "round"] == [1, 2]
    assert [r["clients"] for r in done.result["rounds"]] == [["alpha", "beta"]] * 2 and 0.0 <= done.metric <= 1.0
    report = json.loads((done.run_dir / "clients" / "alpha" / "report.json").read_text())
    assert report["adapter_sha384"] == _expected_adapter(done.run_dir, 2)
