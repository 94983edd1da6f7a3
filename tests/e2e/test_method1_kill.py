"""kill -9 of every party of Method 1 in mid-round, over Flower: the same final adapter, bit for bit.

One run takes all the kills, one a round: the accelerator, a client's enclave, the server enclave, the SuperLink. What
the adapter must be is computed here, from the job alone. Equality says that no update was counted twice, trained
otherwise, or lost. (Sums over clients run in the order of arrival, in float64: two clients' sum does not depend on it.
Of three and more the last bit may.)
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tests._rounds import trained_round

from cloister import run
from cloister.api import Launch
from cloister.api._folder import RunFolder
from cloister.api._local_model import starting_adapter
from cloister.api._plans import enclave_client_plan, enclave_server_plan
from cloister.attest import Policy
from cloister.federation import Aggregator
from cloister.testing import write_tiny_job

SECTIONS = """
[method]
name = "enclave"
rounds = 4
[release]
what = "adapter"
"""
TRAINING = "epochs = 2\nbatch_size = 4\nlr = 0.01"
VICTIMS = {1: "accelerator/alpha", 2: "client/beta", 3: "server", 4: "superlink"}


@dataclass
class Killer:
    """Kills the victim of each round once the first client has made two steps of it."""

    due: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)

    def note(self, event: dict) -> None:
        if event["event"] == "step" and event["step"] == 2:
            victim = VICTIMS[event["round"]]
            if victim not in self.killed and victim not in self.due:
                self.due.append(victim)

    def tick(self, launch: Launch) -> None:
        while self.due:
            victim = self.due.pop(0)
            self.killed.append(victim)
            os.kill(launch.pids()[victim][0], signal.SIGKILL)


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
            done, _, _ = trained_round(plan, given, n_round)
            aggregator.add(plan.name, done.n_examples, done.update, round=n_round)
        aggregator.finish()
    return hashlib.sha384(aggregator.to_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(900)  # four processes start anew
@pytest.mark.xdist_group("kill")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_kill_everybody_in_mid_round(tmp_path: Path):
    job = write_tiny_job(tmp_path, n_train=40, n_test=3, training=TRAINING, sections=SECTIONS)
    killer = Killer()
    events: list[dict] = []

    def note(event: dict) -> None:
        events.append(event)
        killer.note(event)

    done = run(job, runs_dir=tmp_path / "runs", on_event=note, on_tick=killer.tick)
    assert killer.killed == list(VICTIMS.values())
    kinds = [(event["event"], event.get("process", event.get("n_round"))) for event in events]
    for n_round, victim in VICTIMS.items():
        assert kinds.index(("restart", victim)) < kinds.index(("round", n_round)), "the round was over too soon"
    assert [n for kind, n in kinds if kind == "round"] == [1, 2, 3, 4], "a round was counted twice"
    assert [r["clients"] for r in done.result["rounds"]] == [["alpha", "beta"]] * 4 and 0.0 <= done.metric <= 1.0
    expected = _expected_adapter(done.run_dir, 4)
    for client in ("alpha", "beta"):
        report = json.loads((done.run_dir / "clients" / client / "report.json").read_text())
        assert report["adapter_sha384"] == expected
