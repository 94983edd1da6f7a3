"""The ServerApp: FedAvg over the clients' adapters and heads, then the common test set."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_lora_app import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; leaves the final state and `result.json` in the result folder."""
    config = context.run_config
    n_rounds, n_clients = int(config["num-server-rounds"]), int(config["num-clients"])
    device = task.start(config)
    model = task.Classifier(config)
    if config["initial-path"]:
        task.set_state(model, torch.load(config["initial-path"]))
    arrays = ArrayRecord(task.get_state(model))
    strategy = FedAvg(
        fraction_evaluate=float(config["fraction-evaluate"]),
        min_train_nodes=n_clients,
        min_evaluate_nodes=n_clients,
        min_available_nodes=n_clients,
    )
    timing: dict[str, float] = {}

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Once, for the final model: the rounds before it are asked for nothing but training."""
        if server_round < n_rounds:
            return None
        timing["train_s"] = time.perf_counter() - began
        task.set_state(model, arrays.to_torch_state_dict())
        loss, accuracy = task.test(model, task.load_data(config["test-path"], config), device)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    began = time.perf_counter()
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=n_rounds,
        evaluate_fn=global_evaluate,
    )
    folder = Path(config["result-dir"])
    torch.save(result.arrays.to_torch_state_dict(), folder / "final_model.pt")
    found = {
        "metric": result.evaluate_metrics_serverapp[n_rounds]["accuracy"],
        "loss": result.evaluate_metrics_serverapp[n_rounds]["loss"],
        "rounds": {r: dict(metrics) for r, metrics in result.train_metrics_clientapp.items()},
        # Down to every client and up again, every round.
        "payload_bytes": 2 * n_clients * n_rounds * arrays.count_bytes(),
        "n_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **timing,
    }
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(found), encoding="utf-8")
    temporary.rename(folder / "result.json")
