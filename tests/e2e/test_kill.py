"""kill -9 of every process of a run, once during upload and once during training: the same final metric, nothing twice.

Real Flower, real sockets. One run takes all the kills of a phase, one after the other, each once its victim has done
something since the last.
"""

from __future__ import annotations

import os
import signal
import time
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
    """Kills each victim once while `phase` goes on."""

    phase: str
    victims: list[str]
    killed: list[tuple[str, int]] = field(default_factory=list)
    not_before: float = 0.0

    def __call__(self, launch: Launch) -> None:
        if launch.phase != f"{self.phase}/begin" or not self.victims or time.monotonic() < self.not_before:
            return
        pids = launch.pids()
        for victim in self.victims:
            if pids.get(victim):
                os.kill(pids[victim][0], signal.SIGKILL)
                self.killed.append((victim, pids[victim][0]))
                self.victims.remove(victim)
                self.not_before = time.monotonic() + 1.0
                return


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_job(tmp_path_factory.mktemp("job"), n_train=400, n_test=40, training=TRAINING, sections=SECTIONS)


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory):
    return run(job, runs_dir=tmp_path_factory.mktemp("runs"), programs=Programs(relay=FakeRelay))


@pytest.mark.slow
@pytest.mark.xdist_group("kill")
@pytest.mark.parametrize("phase", ["prepare", "train"])
def test_kill_everything_once(phase: str, job: Path, undisturbed, tmp_path: Path):
    # While the enclave trains no message is under way, so there is no ClientApp to kill then.
    victims = [v for v in VICTIMS if phase == "prepare" or not v.startswith("clientapp")]
    killer = Killer(phase, list(victims))
    events: list[dict] = []
    result = run(job, runs_dir=tmp_path, on_tick=killer, on_event=events.append)
    assert {name for name, _ in killer.killed} == set(victims), (
        f"the {phase} phase was over too soon for {killer.victims}"
    )
    assert sum(event["event"] == "restart" for event in events) >= len(victims)
    assert result.metric == undisturbed.metric
    assert result.result["losses"] == undisturbed.result["losses"]
    assert result.result["n_examples"] == undisturbed.result["n_examples"]
    for _, pid in killer.killed:
        assert not Path(f"/proc/{pid}").exists()
