"""The ClientApp: trains on its own data, evaluates on its own data."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_lora_app import task

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Trains the received adapter and head on this client's data."""
    config = context.run_config
    server_round = int(msg.content["config"]["server-round"])
    device = task.start(config, offset=1000 * server_round + int(context.node_config["client-id"]))
    model = task.Classifier(config)
    task.set_state(model, msg.content["arrays"].to_torch_state_dict())
    loader = task.load_data(context.node_config["train-path"], config, seed=config["seed"] + server_round)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = task.train(model, loader, config, device)
    seconds, cpu_seconds, n = time.perf_counter() - wall, time.process_time() - cpu, len(loader.dataset)
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


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluates the received adapter and head on this client's data."""
    config = context.run_config
    device = task.start(config)
    model = task.Classifier(config)
    task.set_state(model, msg.content["arrays"].to_torch_state_dict())
    loader = task.load_data(context.node_config["train-path"], config)
    loss, accuracy = task.test(model, loader, device)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
