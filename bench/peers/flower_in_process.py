"""The peer's apps and Flower's FedAvg, all in this process: the numbers of bench/peers/flower_lora.py without its wait.

The ServerApp, Flower's strategy and the ClientApp are the very functions that the deployment runtime calls; a message
is handed over in place of being sent. `python bench/peers/flower_in_process.py` trains the same small job both ways,
and fails unless the two final models are the same to the bit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from cloister.federation import InsecurePeerJob, ask_insecure_model, run_insecure_peer
from cloister.federation._insecure_peer import client, server
from cloister.federation._insecure_peer.job import RESULT_FILE, STATE_FILE


@dataclass
class _Here(Grid):
    """A grid whose nodes are calls of the client's app, one after the other."""

    job: InsecurePeerJob
    config: dict[str, Any]
    _states: dict[int, RecordDict] = field(default_factory=dict)

    def get_node_ids(self) -> Iterable[int]:
        return range(len(self.job.train))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        own: dict[str, Any] = {"client-id": node, "train-path": str(self.job.train[node])}
        state = self._states.setdefault(node, RecordDict())
        return client.train(message, Context(0, node, own, state, self.config))

    def set_run(self, run: Any) -> None:
        raise AssertionError("the strategy does not call this")

    @property
    def run(self) -> Any:
        raise AssertionError("the strategy does not call this")

    create_message = push_messages = pull_messages = set_run  # type: ignore[assignment]


def train_in_process(job: InsecurePeerJob, keep: Path) -> dict[str, Any]:
    """All rounds, as `run_insecure_peer`; leaves the final state in `keep`.

    Returns:
        metric, loss: of the final model on the common test set.
    """
    config: dict[str, Any] = job.config(keep)
    # What the deployment runtime gives a process that it starts for an app.
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
    server.main(_Here(job, config), Context(0, 0, {}, RecordDict(), config))
    return json.loads((keep / RESULT_FILE).read_text(encoding="utf-8"))


def answers(job: InsecurePeerJob, keep: Path) -> list[int]:
    """The class that the final model in `keep` gives each row of the test set."""
    return ask_insecure_model(job, keep, test=job.test)


def main() -> None:
    """Both ways, and the difference."""
    from cloister.testing import write_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "model", "bert")
        files = [folder / f"{i}.jsonl" for i in range(3)]
        for i, file in enumerate(files):
            rows = [{"text": " ".join(["red", "green", "blue"][(i + j) % 3 :]), "label": j % 3} for j in range(20)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        job = InsecurePeerJob(
            model=folder / "model", train=tuple(files[:2]), test=files[2], n_labels=3, epochs=2, num_threads=1
        )
        states = []
        for train in (train_in_process, lambda job, keep: run_insecure_peer(job, keep=keep)):
            keep = folder / str(len(states))
            keep.mkdir()
            train(job, keep)
            states.append(torch.load(keep / STATE_FILE))
    here, there = states
    if here.keys() != there.keys() or not all(torch.equal(here[name], there[name]) for name in here):
        sys.exit("error: the two ways differ")
    print(f"{len(here)} tensors, equal to the bit")


if __name__ == "__main__":
    main()
