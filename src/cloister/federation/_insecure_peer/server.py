"""The peer's ServerApp: FedAvg over the clients' adapters and heads, then the common test set. In the clear."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from cloister.federation._insecure_peer import task
from cloister.federation._insecure_peer.job import RESULT_FILE, STATE_FILE, round_file


class EveryClient(FedAvg):
    """FedAvg that goes on with nobody missing: otherwise a client that fails would only be left out, without a word."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed or len(replies) < self.min_train_nodes:
            raise RuntimeError(f"round {server_round}: {len(replies) - len(failed)} clients trained; {failed}")
        return super().aggregate_train(server_round, replies)


def make_app() -> ServerApp:
    """The app that Flower starts at the server."""
    app = ServerApp()
    app.main()(main)
    return app


def main(grid: Grid, context: Context) -> None:
    """All rounds; leaves the final state and `result.json` in the result folder."""
    config = context.run_config
    n_rounds, n_clients = int(config["num-server-rounds"]), int(config["num-clients"])
    folder = Path(str(config["result-dir"]))
    device = task.start(config)
    model = task.PlainModel(config)
    if config["initial-path"]:
        task.set_state(model, torch.load(str(config["initial-path"])))
    arrays = ArrayRecord(task.get_state(model))
    strategy = EveryClient(
        fraction_evaluate=float(config["fraction-evaluate"]),
        min_train_nodes=n_clients,
        min_evaluate_nodes=n_clients,
        min_available_nodes=n_clients,
    )
    timing: dict[str, float] = {}

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Once, for the final model: the rounds before it are asked for nothing but training."""
        round_file(folder, server_round).touch()
        if server_round < n_rounds:
            return None
        timing["train_s"] = time.perf_counter() - began
        task.set_state(model, arrays.to_torch_state_dict())
        loss, accuracy = task.test(model, task.load_data(str(config["test-path"]), config), device)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    began = time.perf_counter()
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=n_rounds,
        evaluate_fn=global_evaluate,
    )
    torch.save(result.arrays.to_torch_state_dict(), folder / STATE_FILE)
    found = {
        "metric": result.evaluate_metrics_serverapp[n_rounds]["accuracy"],
        "loss": result.evaluate_metrics_serverapp[n_rounds]["loss"],
        "rounds": {r: dict(metrics) for r, metrics in result.train_metrics_clientapp.items()},
        # Down to every client and up again, every round.
        "payload_bytes": 2 * n_clients * n_rounds * arrays.count_bytes(),
        "n_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **timing,
    }
    temporary = folder / f"{RESULT_FILE}.part"
    temporary.write_text(json.dumps(found), encoding="utf-8")
    temporary.rename(folder / RESULT_FILE)
