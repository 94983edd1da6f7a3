"""A client's part of Method 1: one piece of work at a time, every answer kept, nothing trained or counted twice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister.errors import AdapterError, DataError, DecryptionError, FederationError, MalformedMessageError
from cloister.federation import AdapterWork, read_adapter
from cloister.wire import AdmitAnswer, AdmitRequest, PrepareRequest, RoundAnswer, RoundProgress, RoundRequest

KEY = bytes(range(32))
SHA = b"\1" * 48
ADMISSION = AdmitAnswer(SHA, SHA, SHA, 5, 2)
LOST = RoundProgress(0, 0, is_lost=True)
LONG, AT_ONCE = 20.0, 0.01


class FakeModel:
    """Trains when it is let go on; counts how often it was asked."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.begun = threading.Event()
        self.trained: list[tuple[bytes, int]] = []
        self.saved: list[bytes] = []
        self.fails: Exception | None = None
        self.stopped = False
        self.is_private = False

    def admission(self) -> AdmitAnswer:
        return ADMISSION

    def train(self, adapter: bytes, n_round: int) -> tuple[bytes, int, dict[str, Any]]:
        self.begun.set()
        assert self.go_on.wait(LONG)
        if self.fails:
            raise self.fails
        self.trained.append((adapter, n_round))
        return b"update of " + adapter + b" %d" % len(self.trained), 5, {"loss": 1.0}

    def epsilon(self, n_rounds: int) -> float | None:
        return 0.5 * n_rounds if self.is_private else None

    def evaluate(self, adapter: bytes) -> tuple[int, dict[str, Any]]:
        return 2, {"sums": None}

    def save(self, adapter: bytes, folder: Path) -> None:
        self.saved.append(adapter)

    def progress(self) -> tuple[int, int]:
        return (1, 4)

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    return SimpleNamespace(name="north", run_id="run-1", job_sha384=b"\5" * 48, work=tmp_path, dp_sgd=None)


def work_of(plan: Any, model: FakeModel | None = None, *, admitted: bool = True) -> tuple[AdapterWork, FakeModel]:
    model = model or FakeModel()
    work = AdapterWork(plan, lambda: model, KEY)
    if admitted:
        assert work.serve(AdmitRequest(b"\5" * 48, LONG)) == ADMISSION
    return work, model


def train(n_round: int = 1, adapter: bytes = b"A", patience_s: float = LONG) -> RoundRequest:
    return RoundRequest(n_round, "train", adapter, patience_s)


def test_admission_is_progress_until_it_is_loaded(plan: Any):
    loaded = threading.Event()

    def load() -> FakeModel:
        assert loaded.wait(LONG)
        return FakeModel()

    work = AdapterWork(plan, load, KEY)
    assert "north" in repr(work) and KEY.hex() not in repr(work)
    assert work.serve(AdmitRequest(b"\5" * 48, AT_ONCE)) == RoundProgress(0, 0, is_lost=False)
    work.stop()  # there is no model yet to stop
    loaded.set()
    assert work.serve(AdmitRequest(b"\5" * 48, LONG)) == ADMISSION


def test_a_failed_load_is_told_and_stays(plan: Any):
    def load() -> FakeModel:
        raise DataError("client north has no training examples (clients.train)")

    work = AdapterWork(plan, load, KEY)
    for _ in range(2):
        with pytest.raises(DataError, match="north"):
            work.serve(AdmitRequest(b"\5" * 48, LONG))


def test_an_update_is_trained_once_and_given_again(plan: Any):
    work, model = work_of(plan)
    answer = work.serve(train())
    assert answer == RoundAnswer(1, "train", b"update of A 1", 5, json.dumps({"loss": 1.0}).replace(" ", "").encode())
    assert work.serve(train()) == answer == work.serve(train(adapter=b""))
    assert model.trained == [(b"A", 1)]


def test_progress_while_it_trains(plan: Any):
    work, model = work_of(plan)
    model.go_on.clear()
    assert work.serve(train(patience_s=AT_ONCE)) == RoundProgress(1, 4, is_lost=False)
    assert work.serve(train(adapter=b"", patience_s=AT_ONCE)) == RoundProgress(1, 4, is_lost=False)
    model.go_on.set()
    assert isinstance(work.serve(train(adapter=b"")), RoundAnswer)
    assert model.trained == [(b"A", 1)]
    work.stop()
    assert model.stopped


def test_a_poll_for_work_that_it_does_not_have_asks_for_the_adapter(plan: Any):
    work, _ = work_of(plan)
    assert work.serve(train(adapter=b"")) == LOST
    assert isinstance(work.serve(train()), RoundAnswer)
    assert work.serve(train(2, b"")) == LOST
    assert work.serve(RoundRequest(1, "evaluate", b"", LONG)) == LOST


def test_another_adapter_in_the_same_round_is_trained_anew(plan: Any):
    """The server enclave went back behind the round: its older adapter's update must not stand for this one's."""
    work, model = work_of(plan)
    first = work.serve(train(adapter=b"A"))
    other = work.serve(train(adapter=b"B"))
    assert first != other and model.trained == [(b"A", 1), (b"B", 1)]


def test_a_client_that_is_late_is_not_interrupted_and_comes_back(plan: Any):
    work, model = work_of(plan)
    model.go_on.clear()
    work.serve(train(1, patience_s=AT_ONCE))
    assert work.serve(train(2, b"B", AT_ONCE)) == RoundProgress(1, 4, is_lost=False)
    model.go_on.set()
    answer = work.serve(train(2, b"B"))
    assert isinstance(answer, RoundAnswer) and answer.round == 2
    assert model.trained == [(b"A", 1), (b"B", 2)]


def test_a_restarted_client_gives_the_kept_answer(plan: Any):
    work, _ = work_of(plan)
    answer = work.serve(train())
    again, model = work_of(plan, admitted=False)
    assert again.serve(train(adapter=b"")) == answer
    assert model.trained == []


def test_a_restarted_client_without_an_answer_asks_for_the_adapter(plan: Any):
    work, _ = work_of(plan, admitted=False)
    assert work.serve(train(adapter=b"")) == LOST
    assert isinstance(work.serve(train()), RoundAnswer)


def test_a_restarted_client_that_still_loads_says_so(plan: Any):
    loaded = threading.Event()

    def load() -> FakeModel:
        assert loaded.wait(LONG)
        return FakeModel()

    work = AdapterWork(plan, load, KEY)
    assert work.serve(train(adapter=b"", patience_s=AT_ONCE)) == RoundProgress(0, 0, is_lost=False)
    loaded.set()
    assert work.serve(train(adapter=b"")) == LOST


def test_a_client_that_dies_in_new_work_has_no_older_answer(plan: Any):
    work, model = work_of(plan)
    work.serve(train(adapter=b"A"))
    model.go_on.clear()
    work.serve(train(adapter=b"B", patience_s=AT_ONCE))  # and is killed here
    again, _ = work_of(plan, admitted=False)
    assert again.serve(train(adapter=b"")) == LOST
    answer = again.serve(train(adapter=b"B"))
    assert isinstance(answer, RoundAnswer) and answer.adapter.startswith(b"update of B")
    model.go_on.set()


@pytest.mark.parametrize("damage", [b"", b"CLST" * 40], ids=["empty", "other"])
def test_a_kept_answer_that_the_host_changed_is_not_used(plan: Any, damage: bytes):
    work, _ = work_of(plan)
    work.serve(train())
    (plan.work / "answer.sealed").write_bytes(damage)
    again, model = work_of(plan)
    assert again.serve(train(adapter=b"")) == LOST
    assert isinstance(again.serve(train()), RoundAnswer) and model.trained == [(b"A", 1)]


def test_a_kept_answer_of_another_run_or_client_is_not_used(plan: Any):
    work, _ = work_of(plan)
    work.serve(train())
    for change in ({"run_id": "run-2"}, {"name": "south"}, {"job_sha384": b"\6" * 48}):
        other, _ = work_of(SimpleNamespace(**{**vars(plan), **change}))
        assert other.serve(train(adapter=b"")) == LOST


def test_nothing_kept_is_in_the_clear(plan: Any):
    work, _ = work_of(plan)
    work.serve(train(adapter=b"a secret adapter"))
    work.serve(RoundRequest(2, "evaluate", b"a secret adapter", LONG))
    files = list(plan.work.iterdir())
    assert len(files) == 2
    for path in files:
        assert b"secret" not in path.read_bytes() and path.stat().st_mode & 0o077 == 0


def test_work_that_fails_is_told_for_good(plan: Any):
    work, model = work_of(plan)
    model.fails = AdapterError("the loss is nan at step 1")
    for request in (train(), train(2), AdmitRequest(b"\5" * 48, LONG)):
        with pytest.raises(AdapterError, match="nan"):
            work.serve(request)


def test_work_that_ends_without_an_answer_asks_for_the_adapter(plan: Any, monkeypatch: pytest.MonkeyPatch):
    """Nothing of ours does so; then the server enclave may send it once more, and no older answer goes out."""
    work, _ = work_of(plan)
    monkeypatch.setattr(work, "_run", lambda *_: None)
    assert work.serve(train()) == LOST


def test_the_final_adapter_is_for_this_enclave_alone(plan: Any):
    with pytest.raises(FederationError, match="north"):
        read_adapter(plan, KEY)
    work, _ = work_of(plan)
    work.serve(RoundRequest(3, "evaluate", b"final", LONG))
    assert read_adapter(plan, KEY) == b"final"
    with pytest.raises(Exception, match="does not open"):
        read_adapter(plan, bytes(32))


def test_a_release_is_kept_also_after_a_restart(plan: Any):
    work, model = work_of(plan)
    work.keep_release(b"final")
    again, other = work_of(plan, admitted=False)
    again.keep_release(b"final")
    assert model.saved == other.saved == [b"final"]


# --- DP-SGD -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def private(plan: Any) -> Any:
    return SimpleNamespace(**{**vars(plan), "dp_sgd": object()})


def private_work(plan: Any) -> AdapterWork:
    model = FakeModel()
    model.is_private = True
    return work_of(plan, model)[0]


def epsilon_of(answer: Any) -> float:
    return json.loads(answer.facts)["epsilon"]


def test_what_dp_sgd_spends_is_told_and_adds_up(private: Any):
    work = private_work(private)
    assert [epsilon_of(work.serve(train(n))) for n in (1, 2, 3)] == [0.5, 1.0, 1.5]
    assert "epsilon" not in json.loads(work.serve(RoundRequest(4, "evaluate", b"A", LONG)).facts)  # type: ignore[union-attr]


def test_an_answer_that_is_given_again_spends_nothing_more(private: Any):
    work = private_work(private)
    assert [epsilon_of(work.serve(train(adapter=adapter))) for adapter in (b"A", b"A", b"")] == [0.5] * 3
    assert epsilon_of(private_work(private).serve(train())) == 0.5  # restarted: from the kept answer


def test_the_same_round_trained_anew_spends_again(private: Any):
    """As a server enclave whose state its host rolled back could ask for."""
    work = private_work(private)
    assert [epsilon_of(work.serve(train(adapter=adapter))) for adapter in (b"A", b"B")] == [0.5, 1.0]


def test_a_training_that_died_has_spent_its_share(private: Any):
    model = FakeModel()
    model.is_private = True
    model.go_on.clear()
    work, _ = work_of(private, model)
    work.serve(train(patience_s=AT_ONCE))  # and is killed here
    assert model.begun.wait(LONG)
    assert epsilon_of(private_work(private).serve(train())) == 1.0
    model.go_on.set()


def test_a_count_that_the_host_changed_is_refused(private: Any):
    private_work(private).serve(train())
    path = private.work / "spent.sealed"
    sealed = path.read_bytes()
    path.write_bytes(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(DecryptionError, match=r"spent\.sealed"):
        private_work(private).serve(train(2))
    other = SimpleNamespace(**{**vars(private), "run_id": "run-2"})  # of another run, put in this one's place
    with pytest.raises(DecryptionError):
        private_work(other).serve(train())


def test_without_dp_sgd_nothing_is_counted(plan: Any):
    work, _ = work_of(plan)
    assert "epsilon" not in json.loads(work.serve(train()).facts)  # type: ignore[union-attr]
    assert not (plan.work / "spent.sealed").exists()


def test_a_request_of_the_other_method_is_refused(plan: Any):
    work, _ = work_of(plan)
    with pytest.raises(MalformedMessageError, match=r"prepare\.request"):
        work.serve(PrepareRequest(b"\5" * 48, 1.0))
