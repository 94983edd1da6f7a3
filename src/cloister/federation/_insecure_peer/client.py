"""The peer's ClientApp: trains on its own data, evaluates on its own data. In the clear."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cloister.federation._insecure_peer import task


def make_app() -> ClientApp:
    """The app that Flower starts at every client."""
    app = ClientApp()
    app.train()(train)
    app.evaluate()(evaluate)
    return app


def train(msg: Message, context: Context) -> Message:
    """Trains the received adapter and head on this client's data."""
    config = context.run_config
    server_round = int(msg.content["config"]["server-round"])  # type: ignore[arg-type,index]
    device = task.start(config, offset=1000 * server_round + int(context.node_config["client-id"]))
    model = task.PlainModel(config)
    task.set_state(model, msg.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    path, seed = str(context.node_config["train-path"]), int(config["seed"]) + server_round
    loader = task.load_data(path, config, seed=seed)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = task.train(model, loader, config, device)
    seconds, cpu_seconds, n = time.perf_counter() - wall, time.process_time() - cpu, len(loader.dataset)  # type: ignore[arg-type]
    metrics = {
        "train_loss": loss,
        "train_seconds": seconds,
        # Of an example, because Flower takes means over clients that are weighted by examples.
        "train_seconds_per_example": seconds / n,
        "train_cpu_seconds_per_example": cpu_seconds / n,
        "num-examples": n,
    }
    content = RecordDict({"arrays": ArrayRecord(task.get_state(model)), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


def evaluate(msg: Message, context: Context) -> Message:
    """Evaluates the received adapter and head on this client's data."""
    config = context.run_config
    device = task.start(config)
    model = task.PlainModel(config)
    task.set_state(model, msg.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    loader = task.load_data(str(context.node_config["train-path"]), config)
    loss, accuracy = task.test(model, loader, device)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}  # type: ignore[arg-type]
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
