"""The sealed run state: an older file in place of the newest is refused where something outside of the disk counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister.channel import Uncounted
from cloister.errors import DecryptionError, RollbackError
from cloister.federation._state import RunState

KEY = bytes(range(32))
PLAN: Any = SimpleNamespace(run_id="run", job_sha384=b"j" * 48)


class Remembering(Uncounted):
    """A counter that outlives the process, as a TPM's does."""


def saved(path: Path, counter: Uncounted | None) -> RunState:
    state = RunState.open(path, KEY, PLAN, counter)
    state.advance("train")
    return state


def test_the_state_comes_back(tmp_path: Path):
    saved(tmp_path / "state", None)
    assert RunState.open(tmp_path / "state", KEY, PLAN).phase == "train"


def test_an_older_state_is_refused_where_there_is_a_counter(tmp_path: Path):
    path, counter = tmp_path / "state", Remembering()
    state = saved(path, counter)
    older = path.read_bytes()
    state.advance("evaluate")
    path.write_bytes(older)
    with pytest.raises(RollbackError):
        RunState.open(path, KEY, PLAN, counter)
    path.unlink()
    with pytest.raises(RollbackError, match="gone"):
        RunState.open(path, KEY, PLAN, counter)


def test_without_a_counter_an_older_state_opens_as_the_limitations_say(tmp_path: Path):
    path = tmp_path / "state"
    state = saved(path, None)
    older = path.read_bytes()
    state.advance("evaluate")
    path.write_bytes(older)
    assert RunState.open(path, KEY, PLAN).phase == "train"


def test_a_state_of_another_enclave_says_so(tmp_path: Path):
    saved(tmp_path / "state", None)
    with pytest.raises(DecryptionError) as caught:
        RunState.open(tmp_path / "state", bytes(32), PLAN)
    assert "another measurement" in caught.value.hint
