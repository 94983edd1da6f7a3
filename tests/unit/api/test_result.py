"""result.json of Method 1: what is told of pads and bytes, and of a run without a metric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cloister.api._result import RunResult, _bytes, _epsilon_per_example, _pad

TOLD: dict[str, Any] = {
    "pad": "otp", "assumption": "Pads are random.", "format": "faithful", "bucket": 16, "pad_elements": 7,
    "forward": 2, "backward": 1, "retries": 0, "n_weights_outside": 90, "n_weights_inside": 10,
    "accelerator": {"device": "cpu", "bytes_out": 5, "bytes_in": 6},
}  # fmt: skip


def test_pads_by_client():
    pad = _pad({"offload": {"alpha": TOLD, "beta": TOLD, "gamma": {}}})
    assert pad is not None and set(pad["elements"]) == {"alpha", "beta"}
    assert (pad["mode"], pad["assumption"], pad["ring"]) == ("otp", "Pads are random.", "faithful")
    assert pad["products"]["alpha"] == 3 and pad["accelerator_bytes"]["beta"] == {"out": 5, "back": 6}


def test_bytes_by_boundary():
    crossed = {"store": 0, "relay": 9}
    assert _bytes({"bytes": crossed, "offload": {"alpha": TOLD, "beta": TOLD}}) == {"relay": 9, "accelerator": 22}
    assert _bytes({"bytes": crossed}) == crossed and _pad({"offload": {}}) is None


def test_epsilon_of_examples_is_what_each_client_said_last():
    rounds = [
        {"per_client": {"alpha": {"epsilon": 1.0}, "beta": {"epsilon": 1.5}, "gamma": {}}},
        {"per_client": {"alpha": {"epsilon": 2.0}}},
    ]
    assert _epsilon_per_example({"rounds": rounds}) == {"alpha": 2.0, "beta": 1.5}
    assert _epsilon_per_example({}) == {}


def test_a_run_without_a_metric_has_none():
    assert math.isnan(RunResult("r", Path("r"), {"metric": None}).metric)
    assert RunResult("r", Path("r"), {"metric": {"value": 0.5}}).metric == 0.5
