"""A masked layer beside the plain one: pads, mask, product, unmask and check all counted, one thread a process.

Ours is a call of an offload session over a real accelerator process and shared memory: `forward` is x W^T, `backward`
is g W. The peer is the plain product in float32 or bfloat16 by torch. Enclave and accelerator take turns, so on an idle
machine the wall time of a call is the sum of both; `CPU` rows are the CPU time of both processes, which a busy machine
does not change. Calls are interleaved; each pair of a row is the median of several.

With the mode otp the enclave computes W r itself, for every call: nothing is made ahead, and it does what the
accelerator does. The goals are those of the mode lattice.

    python bench/masked_linear.py [--quick] [--pairs 7] [--tokens 512] [--out bench/results/masked_linear.csv]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench._common import load_average, out_path, row, write_csv
from bench._masked import MODES, Masked, one_thread
from torch import Tensor

from cloister.pad import Direction, PadMode
from cloister.ring import FAITHFUL, FAST, RingFormat, quantize_weight

SHAPES = {"768x3072": (3072, 768), "4096x4096": (4096, 4096), "4096x11008": (11008, 4096)}
QUICK_SHAPES = {"768x3072": (3072, 768)}
GOALS = {"fast": "<= 0.75", "faithful": "<= 0.95"}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Seconds = tuple[float, float]


def plain_products(weight: Tensor, x: Tensor, direction: Direction) -> dict[str, Callable[[], object]]:
    """The peer's product, by its type."""
    found: dict[str, Callable[[], object]] = {}
    for name, dtype in TYPES.items():
        by, of = weight.to(dtype), x.to(dtype)
        if direction is Direction.BACKWARD:
            by = by.T  # as autograd has it: a view
        found[name] = lambda of=of, by=by: torch.nn.functional.linear(of, by)
    return found


def measured(call: Callable[[], object], cpu_s: Callable[[], float]) -> Seconds:
    """Wall and CPU seconds of one call."""
    cpu, wall = cpu_s(), time.perf_counter()
    call()
    return time.perf_counter() - wall, cpu_s() - cpu


def medians(all_of_them: list[Seconds]) -> Seconds:
    """Of each of the two."""
    wall, cpu = zip(*all_of_them, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def compare(
    masked: Masked, layer: str, direction: Direction, weight: Tensor, *, tokens: int, pairs: int, calls: int
) -> dict[str, list[Seconds]]:
    """Medians of interleaved calls, `pairs` of them, of "ours" and each type of the peer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, weight.shape[1 if direction is Direction.FORWARD else 0], generator=generator)
    session = masked.session
    run = session.forward if direction is Direction.FORWARD else session.backward
    todo = {"ours": lambda: run(layer, x), **plain_products(weight, x, direction)}
    for call in todo.values():
        for _ in range(2):
            call()  # memory, the accelerator's buffers, kernels that torch picks at first use
    found: dict[str, list[Seconds]] = {name: [] for name in todo}
    for _ in range(pairs):
        taken: dict[str, list[Seconds]] = {name: [] for name in todo}
        for _ in range(calls):
            for name, call in todo.items():
                taken[name].append(measured(call, masked.cpu_s))
        for name, seconds in taken.items():
            found[name].append(medians(seconds))
    return found


def rows_of(
    fmt: RingFormat, mode: PadMode, shapes: dict[str, tuple[int, int]], *, tokens: int, pairs: int, calls: int
) -> list[dict[str, Any]]:
    """One layer after another in a session of its own."""
    rows: list[dict[str, Any]] = []
    for label, shape in shapes.items():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        with Masked(fmt, mode) as masked:
            masked.session.add(label, quantize_weight(weight, fmt, layer=label))
            for direction in Direction:
                found = compare(masked, label, direction, weight, tokens=tokens, pairs=pairs, calls=calls)
                for name in TYPES:
                    goal = GOALS[fmt.name] if name == "fp32" and mode is PadMode.LATTICE else ""
                    what = f"{label}, {tokens} tokens, {direction.value}, {fmt.name}, {mode.value} / plain {name}"
                    for i, clock in enumerate(("", " (CPU)")):
                        ours, peer = ([1e3 * seconds[i] for seconds in found[side]] for side in ("ours", name))
                        rows.append(row(what + clock, ours, peer, "ms", goal))
    return rows


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs of the smallest layer")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--modes", nargs="+", type=PadMode, default=MODES, help="otp, lattice")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    one_thread()
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for mode in args.modes:
        for fmt in (FAST, FAITHFUL):
            rows += rows_of(
                fmt,
                mode,
                QUICK_SHAPES if args.quick else SHAPES,
                tokens=args.tokens,
                pairs=2 if args.quick else args.pairs,
                calls=2 if args.quick else 5,
            )
    write_csv(out_path("masked_linear", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
