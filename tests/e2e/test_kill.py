"""kill -9 of every process of a run, once during upload and once during training: the same final metric, nothing twice.

Real Flower, real sockets. One run takes all the kills, one after the other, each once its victim has done something
since the last.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloister import run
from cloister.api import Launch, Programs
from cloister.testing import FakeRelay, write_tiny_job

# Slow enough that there is time to kill: one example a batch, many steps, a checkpoint now and then.
SECTIONS = "[method]\nnear_batch_size = 1\n[federation]\npatience_s = 1.5\n[store]\nshard_max_bytes = 65536\n"
TRAINING = "epochs = 12\nbatch_size = 8\nlr = 0.002\ncheckpoint_every_steps = 20"
VICTIMS = ("client/alpha", "clientapp-alpha", "serverapp", "supernode-beta", "superlink", "server")


@dataclass
class Killer:
    """Kills each phase's victims once while the phase goes on."""

    victims: dict[str, list[str]]
    events: list[dict] = field(default_factory=list)
    killed: list[tuple[str, str, int]] = field(default_factory=list)
    not_before: float = 0.0

    def __call__(self, launch: Launch) -> None:
        if time.monotonic() < self.not_before:
            return
        self._take_back_what_ended_by_itself()
        phase = launch.phase.removesuffix("/begin")
        waiting = self.victims.get(phase)
        if not waiting or not launch.phase.endswith("/begin"):
            return
        pids = launch.pids()
        for victim in waiting:
            if pids.get(victim):
                os.kill(pids[victim][0], signal.SIGKILL)
                self.killed.append((phase, victim, pids[victim][0]))
                waiting.remove(victim)
                self.not_before = time.monotonic() + 1.0
                return

    def _take_back_what_ended_by_itself(self) -> None:
        """A ClientApp lives for one message: the kill may come when it has just ended, and kill nothing."""
        if self.killed and self.killed[-1][1].startswith("clientapp") and self.killed[-1][1] not in self.restarted:
            phase, victim, _ = self.killed.pop()
            self.victims[phase].append(victim)

    @property
    def restarted(self) -> Counter[str]:
        """How often the run has told of a restart, by process."""
        return Counter(event["process"] for event in self.events if event["event"] == "restart")


@pytest.mark.slow
def test_kill_everything_once_in_each_phase(tmp_path: Path):
    job = write_tiny_job(tmp_path, n_train=400, n_test=40, training=TRAINING, sections=SECTIONS)
    undisturbed = run(job, runs_dir=tmp_path / "undisturbed", programs=Programs(relay=FakeRelay))
    # While the enclave trains no message is under way, so there is no ClientApp to kill then.
    victims = {"prepare": list(VICTIMS), "train": [v for v in VICTIMS if not v.startswith("clientapp")]}
    expected = {(phase, name) for phase, names in victims.items() for name in names}
    killer = Killer(victims)
    result = run(job, runs_dir=tmp_path / "runs", on_tick=killer, on_event=killer.events.append)
    assert {(phase, name) for phase, name, _ in killer.killed} == expected, f"too soon over for {killer.victims}"
    assert Counter(name for _, name, _ in killer.killed) <= killer.restarted
    assert killer.restarted.total() >= len(expected)
    assert result.metric == undisturbed.metric
    assert result.result["losses"] == undisturbed.result["losses"]
    assert result.result["n_examples"] == undisturbed.result["n_examples"]
    for _, _, pid in killer.killed:
        assert not Path(f"/proc/{pid}").exists()
