"""Products of masked features on a CUDA device, against the same layer in bfloat16 on the same device.

One layer: the planes are on the device, and every int8 product and the epilogue are timed, against one bf16 GEMM.
One block of 7B shape (hidden 4096, inner 11008; q/k/v and gate/up fused), forward and backward: from pinned memory of
the host to pinned memory of the host, against the bf16 products alone and with their own copies. Without a CUDA device
every row says `not run`.

    python bench/masked_gemm_cuda.py [--quick] [--pairs 9] [--out bench/results/masked_gemm_cuda.csv]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench._common import not_run, out_path, row, write_csv

from cloister.offload._compute import DeviceWeight, open_device
from cloister.pad import Direction
from cloister.ring import FAITHFUL, FAST, RingFormat, product

SIZES = (4096, 8192)
TOKENS = (512, 1024, 2048, 4096)
GOALS = {"fast": "<= 1.8", "faithful": "<= 2.4"}
BLOCK = {"q/k/v": (12288, 4096), "o": (4096, 4096), "gate/up": (22016, 4096), "down": (4096, 11008)}
BLOCK_TOKENS = 2048
WARM_UP, REPEATS = 3, 10


def names(fmt: RingFormat) -> list[tuple[str, str]]:
    """Every measure of a format, with its goal."""
    found = [
        (f"{fmt.name}, {n_tokens} tokens by {size}x{size}: products and epilogue / bf16 GEMM", GOALS[fmt.name])
        for size in SIZES
        for n_tokens in TOKENS
    ]
    block = f"{fmt.name}, a 7B block forward and backward, {BLOCK_TOKENS} tokens, copies to and from the host counted"
    return [*found, (f"{block} / bf16 GEMMs on the device", ""), (f"{block} / bf16 GEMMs with their copies", "")]


def milliseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Of one call, by events of the device."""
    for _ in range(WARM_UP):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def pairs_of(ours: Callable[[], object], peer: Callable[[], object], pairs: int) -> tuple[list[float], list[float]]:
    """In alternation."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        found[0].append(milliseconds(ours))
        found[1].append(milliseconds(peer))
    return found


def planes(n_planes: int, n_tokens: int, n_in: int, device: str = "cuda") -> torch.Tensor:
    """Uniform, as masked elements are."""
    return torch.randint(-128, 128, (n_planes, n_tokens, n_in), dtype=torch.int8, device=device)


def integers(fmt: RingFormat, n_out: int, n_in: int) -> torch.Tensor:
    """A weight of the format's bits."""
    top = 2 ** (fmt.weight_bits - 1) - 1
    return torch.randint(-top, top + 1, (n_out, n_in), dtype=torch.int16)


def layer_rows(device: Any, fmt: RingFormat, pairs: int) -> list[tuple[list[float], list[float]]]:
    """One layer of each size and number of tokens."""
    found = []
    for size in SIZES:
        weight = device.load(fmt, integers(fmt, size, size))
        plain = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
        for n_tokens in TOKENS:
            masked = planes(fmt.n_planes, n_tokens, size)
            x = torch.randn(n_tokens, size, dtype=torch.bfloat16, device="cuda")

            def ours(masked: torch.Tensor = masked, weight: DeviceWeight = weight) -> None:
                device.combine(product(masked, weight.planes, fmt), fmt)

            def peer(x: torch.Tensor = x, plain: torch.Tensor = plain) -> None:
                torch.matmul(x, plain.t())

            found.append(pairs_of(ours, peer, pairs))
    return found


def block_rows(device: Any, fmt: RingFormat, pairs: int) -> list[tuple[list[float], list[float]]]:
    """The block from and to the host, against bf16 on the device and bf16 from and to the host."""
    work: list[Callable[[], None]] = []
    resident: list[Callable[[], object]] = []
    copied: list[Callable[[], object]] = []
    for n_out, n_in in BLOCK.values():
        weight = device.load(fmt, integers(fmt, n_out, n_in))
        plain = torch.randn(n_out, n_in, dtype=torch.bfloat16, device="cuda")
        for direction, (wide, narrow) in zip(Direction, ((n_in, n_out), (n_out, n_in)), strict=True):
            by = plain.t() if direction is Direction.FORWARD else plain
            work.append(_masked(device, weight, direction, fmt.n_planes, wide, narrow))
            x = torch.randn(BLOCK_TOKENS, wide, dtype=torch.bfloat16).pin_memory()
            y = torch.empty(BLOCK_TOKENS, narrow, dtype=torch.bfloat16).pin_memory()
            there = x.cuda()
            resident.append(lambda there=there, by=by: torch.matmul(there, by))
            copied.append(
                lambda x=x, y=y, by=by: y.copy_(torch.matmul(x.to("cuda", non_blocking=True), by), non_blocking=True)
            )

    def all_of(calls: list[Callable[[], Any]]) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                call()

        return run

    return [pairs_of(all_of(work), all_of(peer), pairs) for peer in (resident, copied)]


def _masked(
    device: Any, weight: DeviceWeight, direction: Direction, n_planes: int, n_in: int, n_out: int
) -> Callable[[], None]:
    """A product as the accelerator's process does it, from and to memory that the device reads quickly."""
    host = device.memory(n_planes * BLOCK_TOKENS * n_in).view(np.int8).reshape(n_planes, BLOCK_TOKENS, n_in)
    host[:] = planes(n_planes, BLOCK_TOKENS, n_in, "cpu").numpy()
    answer = device.memory(4 * BLOCK_TOKENS * n_out).view(np.uint32).reshape(BLOCK_TOKENS, n_out)
    return lambda: device.multiply(weight, direction, host, answer)


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pairs, rows = 2 if args.quick else args.pairs, []
    torch.manual_seed(0)
    here = open_device("cuda") if torch.cuda.is_available() else None
    for fmt in (FAST, FAITHFUL):
        if here is None:
            rows += [not_run(name, "ms", goal) for name, goal in names(fmt)]
            continue
        found = [*layer_rows(here, fmt, pairs), *block_rows(here, fmt, pairs)]
        for (name, goal), (ours, peer) in zip(names(fmt), found, strict=True):
            rows.append(row(name, ours, peer, "ms", goal) | {"hardware": f"{here.name}, {here.kernel}"})
    write_csv(out_path("masked_gemm_cuda", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
