"""Results of runs that nobody ran: what a comparison is made of, for its tests."""

from __future__ import annotations

from typing import Any

from cloister.api._compare_data import held_out
from cloister.api._compare_jobs import METHODS
from cloister.api._compare_work import Order
from cloister.errors import ModelError

# How many of 18 answers are wrong, by method; a seed adds its number.
WRONG = {"central": 2, "fedavg": 6, "method1-lora": 5, "method1-prefix": 9, "method2-lora": 3, "method2-spf": 1}


class FakeRunner:
    """A `Runner` that answers at once; the questions with the smallest places are answered wrongly.

    Args:
        failing: methods that fail.
        stop_at: after so many runs it is as if Ctrl-C was pressed.
    """

    def __init__(self, failing: tuple[str, ...] = (), stop_at: int | None = None) -> None:
        self.orders: list[Order] = []
        self._failing = failing
        self._stop_at = stop_at

    @property
    def names(self) -> list[str]:
        """What was run, in order."""
        return [order.name for order in self.orders]

    def __call__(self, order: Order, folder: Any, on_event: Any) -> dict[str, Any]:
        if self._stop_at is not None and len(self.orders) >= self._stop_at:
            raise KeyboardInterrupt
        self.orders.append(order)
        assert folder.path.is_dir() and not list(folder.path.iterdir())
        on_event({"t": 1.0, "source": "run", "event": "step", "step": 1, "n_steps": 1, "epoch": 1, "loss": 0.5})
        if order.method in self._failing:
            raise ModelError("its weights are gone", hint="look for them")
        return fake_result(order)


def fake_result(order: Order) -> dict[str, Any]:
    """As `carry_out` gives it."""
    questions = held_out(order.job)
    protected = METHODS[order.method].is_protected
    wrong = WRONG[order.method] + order.seed
    found: dict[str, Any] = {
        "version": 1, "method": order.method, "seed": order.seed, "task": order.job.task.name, "wall_s": 60.0 + wrong,
        "whole_s": 70.0, "wire_bytes": 1000 * wrong, "accelerator_bytes": 5000 if "method1" in order.method else None,
        "enclave_peak_bytes": 10**8 if protected else None, "n_trained": 1234, "n_steps": 36,
        "n_train": {"alpha": 24, "beta": 24}, "run_dir": None, "simulated": protected, "versions": {},
    }  # fmt: skip
    named = {"ids": [q.id for q in questions], "clients": [q.client for q in questions]}
    if order.job.task.labels:
        labels = [q.label for q in questions]
        predicted = [(label + (i < wrong)) % 3 for i, label in enumerate(labels)]
        value = 1 - wrong / len(labels)
        return found | {
            "metric": {"name": "accuracy", "value": value},
            "examples": {**named, "labels": labels, "predicted": predicted},
        }
    found["metric"] = {"name": "perplexity", "value": 2.0 + wrong}
    if order.generate:
        asked = questions[: order.generate]
        found["completions"] = {
            "ids": [q.id for q in asked], "clients": [q.client for q in asked],
            "references": [q.reference for q in asked],
            "completions": [q.reference if i >= wrong else "is mauve" for i, q in enumerate(asked)],
        }  # fmt: skip
    return found
