"""The peer's ServerApp and ClientApp in one process: FedAvg over all clients, and nobody left out without a word."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from cloister.api._compare_data import write_tokens
from cloister.api._compare_jobs import derive_job
from cloister.api._compare_work import insecure_peer_job
from cloister.config import load_job
from cloister.federation import InsecurePeerJob
from cloister.federation._insecure_peer import task
from cloister.federation._insecure_peer.job import RESULT_FILE, STATE_FILE, round_file
from cloister.testing import write_tiny_job

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click by an old name
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from cloister.federation._insecure_peer import client, server


class FakeGrid(Grid):
    """Every message is answered at once, by the ClientApp's own functions."""

    def __init__(self, peer: InsecurePeerJob, folder: Path, failing: int | None = None) -> None:
        self._peer, self._folder, self._failing = peer, folder, failing
        self.sent: list[dict[str, torch.Tensor]] = []
        self.replied: list[tuple[int, dict[str, torch.Tensor]]] = []

    def get_node_ids(self) -> Iterable[int]:
        return range(1, len(self._peer.train) + 1)

    def send_and_receive(self, messages: Iterable[Message], **_: object) -> Iterable[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        number = message.metadata.dst_node_id - 1
        self.sent.append(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        if number == self._failing:
            return Message(Error(code=0, reason="out of memory"), reply_to=message)
        node = {"client-id": number, "train-path": str(self._peer.train[number])}
        context = Context(1, number, node, RecordDict(), self._peer.config(self._folder))
        reply = client.train(message, context)
        n = int(reply.content["metrics"]["num-examples"])  # type: ignore[arg-type,index]
        self.replied.append((n, reply.content["arrays"].to_torch_state_dict()))  # type: ignore[union-attr]
        return reply

    def _unused(self, *_: object, **__: object):
        raise NotImplementedError

    set_run = run = create_message = push_messages = pull_messages = _unused  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's own process would know of itself."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def peer(tmp_path: Path) -> InsecurePeerJob:
    job = derive_job(load_job(write_tiny_job(tmp_path, training="epochs = 2\nbatch_size = 8\nlr = 0.05")), "fedavg", 3)
    (tmp_path / "alpha-train.jsonl").write_text(
        "\n".join((tmp_path / "alpha-train.jsonl").read_text().splitlines()[:9])
    )
    return insecure_peer_job(job, write_tokens(job, tmp_path / "tokens"), initial=None)


def start(peer: InsecurePeerJob, folder: Path, grid: FakeGrid) -> None:
    server.main(grid, Context(1, 0, {}, RecordDict(), peer.config(folder)))


def test_every_round_is_the_mean_weighted_by_examples(peer: InsecurePeerJob, tmp_path: Path):
    grid = FakeGrid(peer, tmp_path)
    start(peer, tmp_path, grid)
    assert sorted(n for n, _ in grid.replied) == [9, 9, 24, 24], "two rounds of two clients"
    final = torch.load(tmp_path / STATE_FILE)
    for expected, (first, second) in ((grid.sent[2], grid.replied[:2]), (final, grid.replied[2:])):
        for name, tensor in expected.items():
            mean = (first[0] * first[1][name] + second[0] * second[1][name]) / (first[0] + second[0])
            assert torch.allclose(tensor, mean, atol=1e-6), name
    assert all(torch.equal(grid.sent[0][name], grid.sent[1][name]) for name in grid.sent[0])
    assert any(not torch.equal(grid.sent[0][name], final[name]) for name in final)

    found = json.loads((tmp_path / RESULT_FILE).read_text())
    assert set(found["rounds"]) == {"1", "2"} and found["payload_bytes"] > 4 * found["n_trained"] * 8 * 0.99
    assert [round_file(tmp_path, n).exists() for n in (1, 2, 3)] == [True, True, False]
    model = task.PlainModel(peer.config(tmp_path))
    task.set_state(model, final)
    loss, right = task.test(model, task.load_data(peer.test, peer.config(tmp_path)), torch.device("cpu"))
    assert (found["loss"], found["metric"]) == pytest.approx((loss, right))


def test_a_client_that_fails_ends_it(peer: InsecurePeerJob, tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"round 1: 1 clients trained; \['out of memory'\]"):
        start(peer, tmp_path, FakeGrid(peer, tmp_path, failing=1))
    assert not (tmp_path / RESULT_FILE).exists()


def test_a_given_adapter_is_where_it_begins(peer: InsecurePeerJob, tmp_path: Path):
    model = task.PlainModel(peer.config(tmp_path))
    state = {name: tensor + 0.5 for name, tensor in task.get_state(model).items()}
    torch.save(state, tmp_path / "first.pt")
    grid = FakeGrid(peer, tmp_path)
    start(dataclasses.replace(peer, initial=tmp_path / "first.pt"), tmp_path, grid)
    assert all(torch.equal(grid.sent[0][name], tensor) for name, tensor in state.items())
