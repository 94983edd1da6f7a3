"""TensorBoard logs from a run's events, written without torch and without threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_tensorboard(run_dir: Path, events: list[dict[str, Any]]) -> Path:
    """Write `run_dir/tensorboard/<model>/events.out.tfevents.cloister`, one folder a model, and return the folder.

    Scalars are `train/loss`, `train/lr`, `train/examples_per_s` by step, and `eval/<metric>` overall and per client at
    the last step. Repeating the call replaces the files.
    """
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = run_dir / "tensorboard"
    series: dict[str, list[tuple[float, int, str, float]]] = {}
    for model, scalar in _scalars(events):
        series.setdefault(model, []).append(scalar)
    for model, scalars in series.items():
        path = folder / model.replace("/", "-") / "events.out.tfevents.cloister"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            writer = RecordWriter(file)
            writer.write(Event(wall_time=scalars[0][0], file_version="brain.Event:2").SerializeToString())
            for t, step, tag, number in scalars:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=number)])
                writer.write(Event(wall_time=t, step=step, summary=summary).SerializeToString())
            writer.flush()
    return folder


def _scalars(events: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[float, int, str, float]]]:
    last_step: dict[str, int] = {}
    for event in events:
        t = float(event.get("t", 0.0))
        if event.get("event") == "step":
            model, step = str(event.get("model", "federated")), int(event["step"])
            step += (int(event.get("round", 1)) - 1) * int(event.get("n_steps", 0))
            last_step[model] = step
            for key in ("loss", "lr", "examples_per_s"):
                if event.get(key) is not None:
                    yield model, (t, step, f"train/{key}", float(event[key]))
        elif event.get("event") == "metric" and event.get("value") is not None:
            when = str(event.get("when"))
            model = "federated" if when in ("before", "epoch", "after") else when
            group = "held-out" if when == "epoch" else "eval"
            # In Method 1 nobody trains the common model by itself: its steps are the clients'.
            at = max(last_step.values(), default=0) if model == "federated" else 0
            step = 0 if when == "before" else last_step.get(model, at)
            yield model, (t, step, f"{group}/{event['name']}", float(event["value"]))
            for client, value in sorted((event.get("per_client") or {}).items()):
                if value is not None:
                    yield model, (t, step, f"{group}/{event['name']}/{client}", float(value))
