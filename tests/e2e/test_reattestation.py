"""Sessions that live a second: the run attests again and again, and ends with the same counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cloister.api._setup as setup
from cloister import predict, run
from cloister.api import Programs
from cloister.errors import PolicyRejectedError
from cloister.testing import FakeRelay, write_tiny_job
from cloister.wire import Envelope

SECTIONS = "[method]\nnear_batch_size = 1\n[federation]\npatience_s = 0.5\n[store]\nshard_max_bytes = 65536\n"
TRAINING = "epochs = 1\nbatch_size = 64"


def _short_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own policy, with the shortest age that a policy can say."""
    write = setup.write_policy

    def write_short(path: Path, **values: Any) -> None:
        write(path, **values)
        path.write_bytes(path.read_bytes().replace(b"max_session_age_s = 86400", b"max_session_age_s = 1"))

    monkeypatch.setattr(setup, "write_policy", write_short)


@pytest.mark.slow
def test_a_run_with_sessions_of_one_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _short_sessions(monkeypatch)
    relays: list[FakeRelay] = []

    def relay(*args: Any, **kwargs: Any) -> FakeRelay:
        relays.append(FakeRelay(*args, **kwargs))
        return relays[-1]

    job = write_tiny_job(tmp_path, clients=("alpha",), n_train=600, n_test=60, training=TRAINING, sections=SECTIONS)
    events: list[dict[str, Any]] = []
    result = run(job, runs_dir=tmp_path / "runs", programs=Programs(relay=relay), on_event=events.append)
    counts = result.result["n_examples"]["alpha"]
    assert (counts["train"], counts["test"]) == (600, 60)
    handshakes = {blob for _, way, blob in relays[0].seen if way == "up" and Envelope.parse(blob).kind == "f4"}
    accepted = [event for event in events if event["event"] == "evidence" and event["accepted"]]
    assert len(handshakes) >= 2 and len(accepted) >= 2
    assert not [event for event in events if event["event"] == "error"]
    answers = predict(result.run_dir, "alpha", ["the old rose"], programs=Programs(relay=FakeRelay))
    assert set(answers[0]["probabilities"]) == {"red", "green", "blue"}


@pytest.mark.slow
def test_a_policy_that_is_changed_during_a_run_is_named(tmp_path: Path) -> None:
    """The enclave's policy is measured and fixed; a client that is given another one leaves, and says which."""
    job = write_tiny_job(tmp_path, clients=("alpha",), n_train=600, n_test=60, training=TRAINING, sections=SECTIONS)
    changed: list[Path] = []

    def change(launch: Any) -> None:
        policy = launch._folder.policy
        if not changed and any((launch._folder.client("alpha")).glob("journal*")):
            new = policy.with_suffix(".new")
            new.write_bytes(policy.read_bytes() + b"\n# another policy\n")
            new.replace(policy)  # at once: nobody reads half a policy
            changed.append(policy)

    with pytest.raises(PolicyRejectedError) as caught:
        run(job, runs_dir=tmp_path / "runs", programs=Programs(relay=FakeRelay), on_tick=change)
    assert str(changed[0]) in caught.value.cause and caught.value.hint
