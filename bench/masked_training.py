"""LoRA tuning of a tiny Llama over masked layers beside the same tuning in the clear, from the same seed.

The model (hidden 256, 4 layers, LoRA of rank 8 on every linear) first learns one kind of text in full, then LoRA tunes
it to another kind, 50 steps, once in plain float32 and once over masked layers in each format.

- Loss: the largest difference to plain float32 over the steps; the peers are the model in bf16 and under bf16 autocast.
- Gradient: the relative error over all LoRA gradients against float64, at the same parameters, the median over steps;
  the same peers. "fp32" is the error of plain float32 itself.
- What the accelerator saw: every test of bench/_uniformity.py for every layer and direction, over at least 10^8 bytes;
  ours is the p of all tests together, the peer the smallest one that is accepted.
- CPU time of a step, enclave and accelerator together, one thread each, against a plain float32 step of PEFT; in pairs.
  Ours adds LoRA's term by cloister's own kernel, as its training does; more rows are against plain steps with it.

    python bench/masked_training.py [--quick] [--steps 50] [--pairs 7] [--out bench/results/masked_training.csv]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench._common import load_average, out_path, row, write_csv
from bench._masked import MODES, Masked, one_thread
from bench._uniformity import SeenStatistics
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cloister.offload import OffloadSession
from cloister.pad import Direction, PadMode
from cloister.ring import FAITHFUL, FAST
from cloister.slicing import offload_model
from cloister.testing import FakeAccelerator
from cloister.train._lora_kernel import accelerate_lora

VOCABULARY, BATCH, TOKENS = 512, 8, 64
LEARNING_RATE = 2e-3
FORMATS = (FAITHFUL, FAST)
LOSS_GOAL, GRADIENT_GOAL, CPU_GOAL, P_GOAL = "ours <= 2.5e-3 (faithful)", "ours <= 3.9e-3 (faithful)", "<= 1.5", 1e-4
Gradients = dict[str, Tensor]


# --- task and model ---------------------------------------------------------------------------------------------------


def texts(kind: int, n: int) -> Iterator[Tensor]:
    """Batches of a language in which each token has four successors, more and less likely: another for each `kind`."""
    generator = torch.Generator().manual_seed(kind)
    successors = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=generator)
    likely = torch.tensor([0.6, 0.25, 0.1, 0.05])
    for _ in range(n):
        batch = torch.empty(BATCH, TOKENS, dtype=torch.int64)
        batch[:, 0] = torch.randint(0, VOCABULARY, (BATCH,), generator=generator)
        for i in range(1, TOKENS):
            choice = torch.multinomial(likely, BATCH, replacement=True, generator=generator)
            batch[:, i] = successors[batch[:, i - 1], choice]
        yield batch


def pretrained(n_steps: int) -> nn.Module:
    """The backbone, frozen: weights as training leaves them are not as even as random ones."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=688,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in texts(1, n_steps):
        train_step(model, optimizer, batch)
    return model.requires_grad_(False)


def with_lora(backbone: nn.Module) -> nn.Module:
    """The same adapter every time."""
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(backbone), LoraConfig(r=8, target_modules="all-linear"))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def with_autocast(model: nn.Module) -> nn.Module:
    """The same module, with its products in bf16."""
    plain = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(plain)  # type: ignore[method-assign]
    return model


# --- losses and gradients ---------------------------------------------------------------------------------------------


def losses(model: nn.Module, batches: list[Tensor], each: Callable[[int], object] = lambda _: None) -> list[float]:
    """Loss of every step of a tuning; `each` is called before it."""
    optimizer = optimizer_of(model)
    found = []
    for i, batch in enumerate(batches):
        each(i)
        found.append(train_step(model, optimizer, batch))
    return found


def gradients(model: nn.Module, batch: Tensor) -> Gradients:
    """Of everything that trains."""
    model.zero_grad(set_to_none=True)
    loss_of(model, batch).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def error_of(found: Gradients, exact: Gradients) -> float:
    """Relative, over all of them."""
    wrong = sum((found[name] - exact[name]).square().sum() for name in exact)
    return float((wrong / sum(gradient.square().sum() for gradient in exact.values())).sqrt())


def largest(found: list[float], plain: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, plain, strict=True))


def quality_rows(backbone: nn.Module, batches: list[Tensor]) -> list[dict[str, Any]]:
    """Loss and gradient errors of each format, against those of bf16."""
    models = {
        "fp32": with_lora(backbone),
        "bf16": with_lora(backbone).to(torch.bfloat16),
        "bf16 autocast": with_autocast(with_lora(backbone)),
    }
    exact = with_lora(backbone).double()
    sessions = {fmt.name: OffloadSession(FakeAccelerator(), fmt) for fmt in FORMATS}
    for name, session in sessions.items():
        models[name] = with_lora(backbone)
        offload_model(models[name], session)
    leader = with_lora(backbone)  # whose parameters all are compared at
    errors: dict[str, list[float]] = defaultdict(list)

    def compare(i: int) -> None:
        if i % max(1, len(batches) // 10):
            return
        trained = {name: p.detach().clone() for name, p in leader.named_parameters() if p.requires_grad}
        exact.load_state_dict(trained, strict=False)
        expected = gradients(exact, batches[i])
        for name, model in models.items():
            model.load_state_dict(trained, strict=False)
            errors[name].append(error_of(gradients(model, batches[i]), expected))
            forget(sessions)

    losses(leader, batches, compare)
    start = {name: p for name, p in with_lora(backbone).named_parameters() if p.requires_grad}
    curves = {}
    for name, model in models.items():
        model.load_state_dict(start, strict=False)
        curves[name] = losses(model, batches, lambda _: forget(sessions))
    print(f"loss in the clear: {curves['fp32'][0]:.4f} to {curves['fp32'][-1]:.4f}", file=sys.stderr)
    rows = []
    for name, peer in product(sessions, ("bf16", "bf16 autocast")):
        goal = LOSS_GOAL if name == "faithful" else ""
        apart, other = ([largest(curves[side], curves["fp32"])] for side in (name, peer))
        what = f"loss, largest difference to fp32 in {len(batches)} steps, {name} / {peer}"
        rows.append(row(what, apart, other, "nats", goal))
    for name, peer in product((*sessions, "fp32"), ("bf16", "bf16 autocast")):
        goal = GRADIENT_GOAL if name == "faithful" else ""
        wrong, other = ([statistics.median(errors[side])] for side in (name, peer))
        rows.append(row(f"error of the LoRA gradients against fp64, {name} / {peer}", wrong, other, "relative", goal))
    for session in sessions.values():
        session.close()
    return rows


def forget(sessions: dict[str, OffloadSession]) -> None:
    """Let go of what the accelerators saw."""
    for session in sessions.values():
        session._accelerator.seen.clear()  # type: ignore[attr-defined]


# --- what the accelerator saw -----------------------------------------------------------------------------------------


def seen_rows(backbone: nn.Module, batches: list[Tensor], n_bytes: int, mode: PadMode) -> list[dict[str, Any]]:
    """p of all tests together, for each format, after training steps that sent `n_bytes`."""
    rows = []
    for fmt in FORMATS:
        accelerator = FakeAccelerator()
        model = with_lora(backbone)
        statistics_of: dict[tuple[str, Direction], SeenStatistics] = defaultdict(lambda fmt=fmt: SeenStatistics(fmt))
        with OffloadSession(accelerator, fmt, pad=mode) as session:
            offload_model(model, session)
            optimizer, total, i = optimizer_of(model), 0, 0
            while total < n_bytes:
                train_step(model, optimizer, batches[i % len(batches)])
                for layer, direction, planes in accelerator.seen:
                    statistics_of[layer, direction].add(planes)
                    total += planes.size
                accelerator.seen.clear()
                i += 1
        found = [p for each in statistics_of.values() for p in each.p_values().values()]
        worst = min(1.0, min(found) * len(found))
        what = (
            f"p of {len(found)} tests of {total} bytes that the accelerator saw, {fmt.name}, {mode.value} / threshold"
        )
        rows.append(row(what, [worst], [P_GOAL], "p", ">= 1"))
    return rows


# --- the cost of a step -----------------------------------------------------------------------------------------------


def cpu_rows(backbone: nn.Module, batches: list[Tensor], mode: PadMode, *, pairs: int) -> list[dict[str, Any]]:
    """CPU and wall time of a step, in pairs with plain ones: PEFT's, and with the LoRA kernel that ours has too."""
    rows = []
    for fmt in FORMATS:
        models = {name: with_lora(backbone) for name in ("ours", "plain fp32", "plain fp32 with our LoRA kernel")}
        with Masked(fmt, mode) as masked:
            offload_model(models["ours"], masked.session)
            for name, model in models.items():
                if name != "plain fp32":
                    accelerate_lora(model)
            steps = {name: partial(train_step, model, optimizer_of(model)) for name, model in models.items()}
            for step in steps.values():
                cost(step, batches[:1], masked.cpu_s)  # to warm up
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
            for _ in range(pairs):
                for name, step in steps.items():
                    found[name].append(cost(step, batches[:5], masked.cpu_s))
        for peer, (clock, what) in product(list(models)[1:], enumerate(("wall time", "CPU time of all processes"))):
            sides = ([1e3 * seconds[clock] for seconds in found[name]] for name in ("ours", peer))
            goal = CPU_GOAL if clock and mode is PadMode.LATTICE and peer == "plain fp32" else ""
            rows.append(row(f"{what} of a step, {fmt.name}, {mode.value} / {peer}", *sides, "ms", goal))
    return rows


def cost(step: Callable[[Tensor], object], batches: list[Tensor], cpu_s: Callable[[], float]) -> tuple[float, float]:
    """Median wall and CPU seconds of a step."""
    found = []
    for batch in batches:
        cpu, wall = cpu_s(), time.perf_counter()
        step(batch)
        found.append((time.perf_counter() - wall, cpu_s() - cpu))
    wall, cpu = np.median(np.array(found), axis=0)
    return float(wall), float(cpu)


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 3 steps, 10^7 bytes, two pairs")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--modes", nargs="+", type=PadMode, default=MODES, help="otp, lattice")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    one_thread()
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    backbone = pretrained(5 if args.quick else 200)
    batches = list(texts(2, 3 if args.quick else args.steps))
    rows = quality_rows(backbone, batches)
    for mode in args.modes:
        rows += seen_rows(backbone, batches, 10**7 if args.quick else 10**8, mode)
        rows += cpu_rows(backbone, batches, mode, pairs=2 if args.quick else args.pairs)
    write_csv(out_path("masked_training", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
