"""What events add up to: progress, speed, time left, and a run that goes back to its checkpoint."""

from __future__ import annotations

from cloister.cli._board import Board


def step(t: float, n: int, model: str = "federated", **fields: object) -> dict:
    return {"t": t, "event": "step", "step": n, "n_steps": 100, "epoch": 0, "loss": 1.0 / n, "model": model, **fields}


def progress(t: float, client: str, n_done: int) -> dict:
    return {"t": t, "event": "progress", "client": client, "n_done": n_done, "n_total": 100, "n_bytes": n_done * 10}


def board_of(*events: dict) -> Board:
    board = Board()
    for event in events:
        board.apply(event)
    return board


def test_time_left_is_by_the_speed_since_the_first_step_seen():
    board = board_of({"t": 0.0, "event": "phase", "phase": "train", "status": "begin"}, step(10, 51), step(20, 61))
    assert board.seconds_left() == 39.0


def test_nothing_is_told_of_time_before_there_is_a_speed():
    board = board_of({"t": 0.0, "event": "phase", "phase": "train", "status": "begin"}, step(10, 1))
    assert board.seconds_left() is None
    assert Board().seconds_left() is None


def test_the_upload_waits_for_its_slowest_client():
    run = {"t": 0.0, "event": "run", "clients": ["a", "b"]}
    begin = {"t": 0.0, "event": "phase", "phase": "prepare", "status": "begin"}
    board = board_of(run, begin, progress(0, "a", 0), progress(10, "a", 50))
    assert board.seconds_left() is None  # b has not said anything.
    for event in (progress(10, "b", 10), progress(20, "b", 20)):
        board.apply(event)
    assert board.seconds_left() == 80.0


def test_an_older_report_of_the_same_upload_changes_nothing():
    board = board_of(progress(1, "a", 50), progress(2, "a", 20))
    assert board.uploads["a"].n_done == 50


def test_a_restart_goes_back_to_the_checkpoint():
    board = board_of(step(1, 1), step(2, 2), step(3, 3), step(9, 2), step(10, 3))
    training = board.trainings["federated"]
    assert training.step == 3 and len(training.losses) == 4
    assert training.seconds_left() == 97.0


def test_the_model_heard_of_last_is_shown():
    board = board_of(step(1, 1), step(2, 1, "alone/a"))
    assert board.training is not None and board.training[0] == "alone/a"


def test_unknown_events_are_left_alone():
    board = board_of({"t": 1.0, "event": "something-new"}, {"event": "apply"}, {})
    assert board.last_t == 1.0


def test_all_the_rest_is_kept():
    board = board_of(
        {"t": 1.0, "event": "run", "clients": ["a"], "simulated": True},
        {"t": 2.0, "event": "evidence", "client": "a", "accepted": True},
        {"t": 3.0, "event": "bytes", "boundary": "store", "n_bytes": 7},
        {"t": 4.0, "event": "restart", "process": "superlink", "attempt": 1},
        {"t": 5.0, "event": "warning", "cause": "slow"},
        {"t": 6.0, "event": "error", "code": "x"},
        {"t": 7.0, "event": "metric", "when": "after", "value": 1.0},
        {"t": 8.0, "event": "phase", "phase": "start", "status": "end"},
    )
    assert board.simulated and board.clients == ["a"] and board.n_bytes == {"store": 7}
    assert board.restarts == {"superlink": 1} and board.warnings == ["slow"] and board.phases_done == ["start"]
    assert board.errors[0]["code"] == "x" and board.metrics["after"]["value"] == 1.0
