"""kill -9 of every party of Method 1 in mid-round: the same final adapter, bit for bit, and the same metric.

One run takes all the kills, one a round: the accelerator, a client's enclave, the server enclave, the relay. Equality
of the adapters says that no update was counted twice, trained otherwise, or lost. (Sums over clients run in the order
of arrival, in float64: two clients' sum does not depend on it. Of three and more the last bit may.)
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloister import run
from cloister.api import Launch, Programs
from cloister.testing import FakeRelay, write_tiny_job

SECTIONS = """
[method]
name = "enclave"
rounds = 4
[federation]
patience_s = 0.5
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

    relays: Relays
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
            if victim == "relay":
                self.relays.restart()
            else:
                os.kill(launch.pids()[victim][0], signal.SIGKILL)


def _adapter(run_dir: Path, client: str) -> bytes:
    return (run_dir / "clients" / client / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs, with three processes that start anew
@pytest.mark.xdist_group("kill")
def test_kill_everybody_in_mid_round(tmp_path: Path):
    job = write_tiny_job(tmp_path, n_train=40, training=TRAINING, sections=SECTIONS)
    whole = run(job, runs_dir=tmp_path / "whole", programs=Programs(relay=FakeRelay))

    relays = Relays()
    killer = Killer(relays)
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
