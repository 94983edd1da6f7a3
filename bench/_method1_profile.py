"""Where the CPU time of a step of Method 1 goes: `bench/method1_vs_flower.py --profile`.

One client's training in this process, with an accelerator process beside it, one thread each. Spans of CPU time are
taken around what masks, makes pads, unmasks and optimises; what is left is torch's operators and Python, divided as
torch's profiler divides the operators of a few further steps. Which of them are the adapter's is told by shapes that
have its rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from bench._common import load_average, row
from bench._masked import Masked, one_thread
from bench._method1 import BATCH_SIZE, PREFIX_TOKENS, RANK, Adapter, Setting, Variant, whole_side
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from cloister.offload import OffloadSession

N_STEPS, N_STEPS_QUICK = 12, 3
_ATTENTION = ("attention", "softmax", "bmm", "baddbmm")
_ELEMENTWISE = ("gelu", "layer_norm", "tanh", "embedding")
_PRODUCTS = ("mm", "addmm", "linear", "matmul", "addmv", "mv")


class Clock:
    """CPU seconds of this thread by span; what a span has inside of another is taken off the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._thread = threading.get_ident()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        self._inner.append(0.0)
        began = time.thread_time()
        try:
            yield
        finally:
            took = time.thread_time() - began
            self.seconds[name] += took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def around(self, stack: ExitStack, owner: Any, name: str, what: str) -> None:
        """Measures every call of `owner.name` as a span, until the stack ends."""
        plain: Callable[..., Any] = getattr(owner, name)

        @wraps(plain)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.span(what):
                return plain(*args, **kwargs)

        stack.enter_context(mock.patch.object(owner, name, measured))


def watch_offload(clock: Clock, stack: ExitStack) -> None:
    """Spans around the parts of a masked product."""
    from cloister.kernels import _native
    from cloister.offload import OffloadedGroup, OffloadSession
    from cloister.offload._client import ConnectedAccelerator
    from cloister.pad import PadPool, _otp

    clock.around(stack, _native, "mask", "mask")
    clock.around(stack, _native, "unmask", "unmask and check")
    clock.around(stack, _otp, "multiply_pad", "pads: u")
    clock.around(stack, PadPool, "take", "pads: r, and lattice blocks")
    clock.around(stack, ConnectedAccelerator, "_multiply", "messages")
    clock.around(stack, OffloadSession, "_run", "session: buffers, wiping, Python")
    clock.around(stack, OffloadedGroup, "forward", "groups: split and join")
    clock.around(stack, OffloadedGroup, "backward", "groups: split and join")
    clock.around(stack, torch.optim.AdamW, "step", "optimiser")


# --- one profile ------------------------------------------------------------------------------------------------------


def training_of(setting: Setting, variant: Variant, n_steps: int, session: OffloadSession | None) -> Callable[[], Any]:
    """One client's round of so many steps; masked where there is a session."""
    from cloister.adapters import adapter_state
    from cloister.slicing import inspect_backbone, load_tokenizer, offload_model
    from cloister.train import LocalTraining, open_dataset, token_features

    job = setting.ours(0, variant)
    job = job.model_copy(update={"training": job.training.model_copy(update={"max_steps": n_steps, "epochs": 1000})})
    side, client = whole_side(job), job.clients[0]
    if session is not None:
        offload_model(side, session)
    info = inspect_backbone(job.model.path)
    task, columns = job.task_spec(), client.column_map()
    datasets = {"train": open_dataset(client.train.path, columns=columns, task=task)}
    limit = None if info.max_length is None else info.max_length - PREFIX_TOKENS
    features, _ = token_features(client.name, datasets, load_tokenizer(info), task, model_max_length=limit)
    training = LocalTraining(side, features, job.train_spec(), task)
    start = adapter_state(side.peft).to_bytes()
    return lambda: training.train(start, 1)


def operators(train: Callable[[], Any]) -> dict[str, float]:
    """Seconds of torch's own operators, by what they are for."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        train()
    seconds: dict[str, float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        if kind := _kind(event.key, event.input_shapes):
            seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


def _kind(name: str, shapes: list[list[int]]) -> str:
    name = name.removeprefix("aten::")
    if name.startswith(("_Product", "Optimizer", "ProfilerStep")):
        return ""  # has spans of its own
    sizes = set(chain.from_iterable(shape for shape in shapes if isinstance(shape, list)))
    if RANK in sizes and BATCH_SIZE != RANK:
        return "LoRA: products of its rank"
    if any(part in name for part in _ATTENTION):
        return "torch: attention"
    if any(part in name for part in _ELEMENTWISE):
        return "torch: norms, activation, embedding"
    if name in _PRODUCTS:
        return "torch: other products"
    return "torch: sums, copies, autograd, Python"


def measure(setting: Setting, variant: Variant, n_steps: int, *, plain: bool = False) -> dict[str, float]:
    """CPU milliseconds of a step by part; "total" is all of this process, the accelerator's is beside it."""
    clock, found = Clock(), {}
    with ExitStack() as stack:
        masked = None if plain else stack.enter_context(Masked(_format(variant.ring), _mode(variant.pad)))
        train = training_of(setting, variant, n_steps, None if masked is None else masked.session)
        train()  # to warm up
        with ExitStack() as watched:
            watch_offload(clock, watched)
            before, all_before = time.process_time(), masked.cpu_s() if masked else 0.0
            train()
            total, everything = time.process_time() - before, masked.cpu_s() - all_before if masked else 0.0
        shares = operators(train)
    if masked is not None:
        found["accelerator process"] = everything - total
    found |= clock.seconds
    rest, whole = total - sum(clock.seconds.values()), sum(shares.values())
    found |= {name: rest * share / whole for name, share in shares.items()}
    return {name: 1e3 * seconds / n_steps for name, seconds in sorted(found.items(), key=lambda item: -item[1])}


def _format(name: str) -> Any:
    from cloister.ring import FORMATS

    return FORMATS[name]


def _mode(name: str) -> Any:
    from cloister.pad import PadMode

    return PadMode(name)


def tell_profiles(setting: Setting, *, only: Adapter | None, quick: bool) -> list[dict[str, Any]]:
    """Prints the tables; as rows of a CSV, a part beside the whole step, and a whole step beside the plain one."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    one_thread()
    n_steps = N_STEPS_QUICK if quick else N_STEPS
    print(f"load {load_average():.1f}; milliseconds of CPU a step of {BATCH_SIZE} texts", file=sys.stderr)
    adapters: list[Adapter] = [only] if only else ["lora", "prefix"]
    rows = []
    for adapter in adapters:
        plain = measure(setting, Variant(adapter, "faithful", "otp"), n_steps, plain=True)
        rows += _tell(f"{adapter}, plain fp32, our own loop", plain, sum(plain.values()))
        for pad in ("otp", "lattice"):
            for ring in ("faithful",) if quick else ("faithful", "fast"):
                variant = Variant(adapter, ring, pad)
                rows += _tell(str(variant), measure(setting, variant, n_steps), sum(plain.values()))
    return rows


def _tell(title: str, found: dict[str, float], plain_ms: float) -> list[dict[str, Any]]:
    total = sum(found.values())
    print(f"\n{title}: {total:.1f} ms, {total / plain_ms:.2f} of plain")
    rows = [row(f"{title}: CPU of a step / plain fp32, our own loop", [total], [plain_ms], "ms")]
    for name, ms in found.items():
        print(f"  {ms:8.1f} ms  {100 * ms / total:5.1f} %  {name}")
        rows.append(row(f"{title}: {name} / the step", [ms], [total], "ms"))
    return rows
