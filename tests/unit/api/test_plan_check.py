"""What the plan predicted on the machine of the committed benches is what was measured there."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from cloister.api import Machine, load_machine
from cloister.api._estimate_cost import enclave_rates, masked_product
from cloister.pad import PadMode

RESULTS = Path(__file__).parents[3] / "bench" / "results"
FACTOR = 1.5
_LAYER = re.compile(r"(\d+)x(\d+), (\d+) tokens, (forward|backward), (\w+), ([\w-]+) / plain fp32 \(CPU\)")


def lines(name: str) -> list[dict[str, str]]:
    """The rows of a bench, if it has run."""
    path = RESULTS / name
    if not path.is_file():
        pytest.skip(f"bench/results/{name} is not there: its bench has not run")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predicted(machine: Machine, measure: str) -> float | None:
    """The masked layer over the plain one; None for a row of something else."""
    found = _LAYER.fullmatch(measure)
    if found is None:
        return None
    n_in, n_out, n_tokens = (int(found.group(i)) for i in (1, 2, 3))
    sides = {"n_in": n_in, "n_out": n_out} if found.group(4) == "forward" else {"n_in": n_out, "n_out": n_in}
    masked = masked_product(machine, PadMode(found.group(6)), found.group(5), n_tokens=n_tokens, **sides)
    return masked.serial / (2 * n_tokens * n_in * n_out / enclave_rates(machine, "fp32").flop_s)


def test_layers_and_steps_cost_what_was_predicted_in_the_same_run():
    found = lines("plan_check.csv")
    assert len(found) >= 12
    wrong = {line["measure"]: line["ratio"] for line in found if not 1 / FACTOR <= float(line["ratio"]) <= FACTOR}
    assert not wrong


def test_masked_layers_of_another_bench_cost_what_the_kept_constants_predict():
    measured = lines("masked_linear.csv")
    path = RESULTS / "plan_check_machine.toml"
    if not path.is_file():
        pytest.skip("bench/plan_check.py has not run: there are no constants")
    machine = load_machine(path)
    ratios = {
        line["measure"]: ours / float(line["ratio"])
        for line in measured
        if (ours := predicted(machine, line["measure"])) is not None
    }
    assert ratios
    wrong = {measure: ratio for measure, ratio in ratios.items() if not 1 / FACTOR <= ratio <= FACTOR}
    assert not wrong


def test_only_rows_of_masked_layers_are_compared():
    machine = load_machine("laptop")
    row = "4096x11008, 512 tokens, backward, fast, otp / plain fp32 (CPU)"
    assert predicted(machine, row) is not None and predicted(machine, row.replace("fp32", "bf16")) is None
