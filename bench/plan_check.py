"""What `cloister plan` predicts beside what is then measured, on this machine in the same run.

First the machine's constants are measured, as `--machine this` does; then plain and masked layers, and whole training
steps of a small model. `ours` is the prediction and `peer` the measurement, so a ratio of 1 is a prediction that came
true. All times are CPU seconds of both processes with one thread each, the least of several calls: what an idle machine
would take, since enclave and accelerator take turns. The constants of the last pair are kept beside the results, as a
description that `cloister plan --machine` takes.

    python bench/plan_check.py [--quick] [--pairs 5] [--tokens 512] [--out bench/results/plan_check.csv]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench._common import load_average, out_path, row, write_csv
from bench._masked import MODES, Masked, cpu_s_of, one_thread
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from cloister.api import Machine, measure_machine, plan_model, save_machine
from cloister.api._estimate_cost import enclave_rates, masked_product
from cloister.offload import least_seconds
from cloister.pad import Direction, PadMode
from cloister.ring import FAITHFUL, FAST, FORMATS, RingFormat, quantize_weight
from cloister.slicing import offload_model
from cloister.testing import write_tiny_model

SHAPES = {"768x3072": (3072, 768), "4096x4096": (4096, 4096)}
QUICK_SHAPES = {"768x3072": (3072, 768)}
GOAL = "<= 1.5"  # and at least 1 / 1.5, which tests/unit/api/test_plan_check.py asserts
SIZES = {"hidden_size": 512, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 2048}
RANK = 8


class Found(NamedTuple):
    """A prediction and its measurement, in the same unit."""

    measure: str
    predicted: float
    measured: float
    unit: str


def cpu_clock(pid: int | None = None) -> float:
    """CPU seconds of this process, and of an accelerator's."""
    return time.process_time() + (cpu_s_of(pid) if pid else 0.0)


def layers(machine: Machine, shapes: dict[str, tuple[int, int]], n_tokens: int, seconds: float) -> Iterator[Found]:
    """A masked layer over the plain one, forwards and backwards, for every mode and format."""
    for label, (n_out, n_in) in shapes.items():
        weight = torch.randn((n_out, n_in), generator=torch.Generator().manual_seed(0)) / n_in**0.5
        given = {Direction.FORWARD: torch.randn(n_tokens, n_in), Direction.BACKWARD: torch.randn(n_tokens, n_out)}
        plain = {direction: plain_layer(weight, x, direction, seconds) for direction, x in given.items()}
        predicted_plain = 2 * n_tokens * n_in * n_out / enclave_rates(machine, "fp32").flop_s
        for mode, fmt in itertools.product(MODES, (FAST, FAITHFUL)):
            for direction, measured in masked_layer(fmt, mode, weight, given, seconds):
                sides = (n_in, n_out) if direction is Direction.FORWARD else (n_out, n_in)
                product = masked_product(machine, mode, fmt.name, n_tokens=n_tokens, n_in=sides[0], n_out=sides[1])
                what = f"{label}, {n_tokens} tokens, {direction.value}, {fmt.name}, {mode.value} / plain fp32"
                yield Found(what, product.serial / predicted_plain, measured / plain[direction], "x")


def plain_layer(weight: torch.Tensor, x: torch.Tensor, direction: Direction, seconds: float) -> float:
    """CPU seconds of the product by torch."""
    by = weight.T if direction is Direction.FORWARD else weight
    return least_seconds(lambda: x @ by, seconds=seconds, clock=cpu_clock)


def masked_layer(
    fmt: RingFormat, mode: PadMode, weight: torch.Tensor, given: dict[Direction, torch.Tensor], seconds: float
) -> Iterator[tuple[Direction, float]]:
    """CPU seconds of one layer through a session and an accelerator process."""
    with Masked(fmt, mode) as masked:
        masked.session.add("layer", quantize_weight(weight, fmt, layer="layer"))
        calls: dict[Direction, Callable[[], object]] = {
            Direction.FORWARD: lambda: masked.session.forward("layer", given[Direction.FORWARD]),
            Direction.BACKWARD: lambda: masked.session.backward("layer", given[Direction.BACKWARD]),
        }
        for direction, call in calls.items():
            # A lattice block serves 1024 tokens, so of two calls only one makes pads: the mean of pairs counts.
            yield (
                direction,
                least_seconds(lambda call=call: (call(), call()), seconds=4 * seconds, clock=masked.cpu_s) / 2,
            )


def steps(machine: Machine, folder: Path, n_tokens: int, seconds: float) -> Iterator[Found]:
    """Whole training steps of a small Llama: in the clear, and with every frozen linear masked."""
    found = plan_model(folder, machine, n_tokens=n_tokens, rank=RANK)
    of = f"Llama of {SIZES['n_layers']} blocks of {SIZES['hidden_size']}, {n_tokens} tokens"
    model, inside = adapted(folder), found.inside["fp32"]
    measured = least_seconds(step_of(model, n_tokens), seconds=8 * seconds, clock=cpu_clock)
    yield Found(f"step in fp32, {of}", 1e3 * n_tokens / inside.tokens_per_s, 1e3 * measured, "ms")
    yield Found(f"activations, {of}", inside.memory["activations"] / 1e6, kept_bytes(model, n_tokens) / 1e6, "MB")
    for planned in found.masked:
        if planned.pad not in MODES:
            continue
        with Masked(FORMATS[planned.format], planned.pad) as masked:
            model = adapted(folder)
            offload_model(model, masked.session)
            step = step_of(model, n_tokens)
            measured = least_seconds(lambda step=step: (step(), step()), seconds=8 * seconds, clock=masked.cpu_s) / 2
        what = f"masked step, {planned.format}, {planned.pad.value}, {of}"
        yield Found(what, 1e3 * n_tokens / planned.tokens_per_s, 1e3 * measured, "ms")


def adapted(folder: Path) -> Any:
    """The model with LoRA on every linear of its blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers." in name]
    return inject_adapter_in_model(LoraConfig(r=RANK, target_modules=names), model)


def step_of(model: Any, n_tokens: int) -> Callable[[], None]:
    """One step on one text: forward, backward, AdamW."""
    ids = torch.randint(5, 250, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        logits = model(input_ids=ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def kept_bytes(model: Any, n_tokens: int) -> int:
    """What torch keeps for the backward pass of a step, each storage once, parameters left out."""
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address serves twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step_of(model, n_tokens)()
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def main() -> None:
    """Runs alone; writes the CSV and the machine's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs of the smallest layer")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    one_thread()
    transformers_logging.disable_progress_bar()
    out = out_path("plan_check", args.out, quick=args.quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds = 0.03 if args.quick else 0.15
    found: dict[str, list[Found]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny_model(Path(scratch) / "model", "llama", **SIZES)
        for number in range(2 if args.quick else args.pairs):
            print(f"pair {number + 1}, load average {load_average():.1f}", file=sys.stderr)
            machine = measure_machine(seconds=seconds, clock=cpu_clock)
            for one in layers(machine, QUICK_SHAPES if args.quick else SHAPES, args.tokens, seconds):
                found[one.measure].append(one)
            for one in steps(machine, model, args.tokens, seconds):
                found[one.measure].append(one)
    save_machine(machine, out.with_name("plan_check_machine.toml"))
    rows = [
        row(f"plan: {measure}", [f.predicted for f in each], [f.measured for f in each], each[0].unit, GOAL)
        for measure, each in found.items()
    ]
    write_csv(out, rows)


if __name__ == "__main__":
    main()
