"""What a pad costs in each mode, and what masking and unmasking with the check cost; ns per element, one thread.

An element is one feature of one token: of the pad r, and where u is made inside, of r and u. The peer of every row is
the least that its work needs at all: of a pad the AES-256-CTR keystream of as many bytes as r has, of a kernel a copy
of the bytes that it reads and writes.

- `expansion`: the pad's numbers alone, as all modes but `lattice` make them.
- `otp`: with u = W r, computed inside of the enclave. `otp-2`: the enclave's part; u comes from a second accelerator,
  here at once. `lattice`: whole blocks of 1,024 tokens, with u and the correction of the check.
- `unmask` has the check in it: one pass over the answer does both, so the check costs less than the row says.
  `check keys` are made once for a layer and direction of a job, and so are `lattice secrets`; per weight.

    python bench/pad_cost.py [--quick] [--pairs 7] [--out bench/results/pad_cost.csv]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench._common import load_average, out_path, row, write_csv
from bench._masked import one_thread
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cloister.kernels import _native
from cloister.pad import CheckKeys, Direction, LatticePads, Otp2Pads, OtpPads, PadKeys, PadPool
from cloister.ring import FAITHFUL, FAST, QuantizedWeight, RingFormat, quantize_weight

SHAPES = {"768x3072": (3072, 768), "4096x4096": (4096, 4096)}
TOKENS = 1024  # one block of the mode lattice
CALLS = 3
FORWARD = Direction.FORWARD
Call = Callable[[], object]


class ReadyHelper:
    """A pad helper whose answer is there already."""

    def __init__(self, n_out: int) -> None:
        self._u = np.zeros((TOKENS, n_out), np.uint32)

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        """Nothing to keep."""

    def multiply(self, *_: object) -> np.ndarray:
        """The same every time."""
        return self._u


def keystream(n_bytes: int) -> Call:
    """AES-256-CTR into memory that is there."""
    zeros, out = bytes(n_bytes), bytearray(n_bytes + 16)
    key, nonce = os.urandom(32), os.urandom(16)

    def call() -> None:
        Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor().update_into(zeros, out)

    return call


def copy_of(n_bytes: int) -> Call:
    """Reads half of the bytes and writes as many."""
    source = np.zeros(n_bytes // 2, np.uint8)
    sink = np.empty_like(source)
    return lambda: np.copyto(sink, source)


def pad_calls(weight: QuantizedWeight, pool: PadPool) -> dict[str, Call]:
    """One pad of each mode, taken and wiped."""
    n_out, n_in = weight.w_q.shape
    keys, shape = PadKeys(), (TOKENS, n_in)
    alone = keys.stream("alone", FORWARD)
    sources = {
        "otp": OtpPads(keys.stream("otp", FORWARD), weight, FORWARD, CheckKeys.generate(weight, FORWARD), pool=pool,
                       planes=weight.forward_planes()),
        "otp-2": Otp2Pads(keys.stream("otp-2", FORWARD), weight, FORWARD, CheckKeys.generate(weight, FORWARD),
                          pool=pool, helper=ReadyHelper(n_out)),
        "lattice": keys.lattice("lattice", FORWARD, weight, CheckKeys.generate(weight, FORWARD), pool=pool),
    }  # fmt: skip
    assert isinstance(sources["lattice"], LatticePads)
    calls: dict[str, Call] = {"expansion": lambda: alone.draw(shape, weight.format.pad_moduli).use(shape)}
    for mode, source in sources.items():
        calls[mode] = lambda source=source: source.take(TOKENS).use(shape)
    return calls


def kernel_calls(weight: QuantizedWeight, fmt: RingFormat) -> dict[str, tuple[Call, Call]]:
    """Mask and unmask of one call, each with its peer. Inputs are zeros: time does not depend on the numbers."""
    n_out, n_in = weight.w_q.shape
    check = CheckKeys.generate(weight, FORWARD)
    planes, answer = np.zeros((fmt.n_planes, TOKENS, n_in), np.int8), np.zeros((TOKENS, n_out), np.uint32)
    x, r = np.ones((TOKENS, n_in), np.float32), np.zeros(planes.shape, np.uint8)
    scales, sums = np.ones(TOKENS), np.zeros(TOKENS, np.uint64)
    u, y, channel = answer.copy(), np.zeros(answer.shape, np.float32), np.ones(n_out, np.float32)
    room = weight.forward_limit / 2
    zero = np.zeros(TOKENS, np.uint64)
    mask = copy_of(x.nbytes + r.nbytes + planes.nbytes)
    unmask = copy_of(answer.nbytes + u.nbytes + y.nbytes)
    return {
        "mask": (lambda: _native.mask(x, None, room, r, fmt.CODE, check.v, planes, scales, sums), mask),
        "unmask with check": (
            lambda: _native.unmask(answer, u, fmt.CODE, scales, channel, None, check.rho, zero, y),
            unmask,
        ),
    }


def timed(ours: Call, peer: Call, *, per: int, pairs: int) -> tuple[list[float], list[float]]:
    """CPU nanoseconds per element: medians of interleaved calls, `pairs` of them."""
    found: tuple[list[float], list[float]] = ([], [])
    for call in (ours, peer):
        call()
    for _ in range(pairs):
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(CALLS):
            for call, seconds in zip((ours, peer), taken, strict=True):
                start = time.process_time()
                call()
                seconds.append(1e9 * (time.process_time() - start) / per)
        for side, seconds in zip(found, taken, strict=True):
            side.append(statistics.median(seconds))
    return found


def rows_of(label: str, shape: tuple[int, int], fmt: RingFormat, pairs: int) -> list[dict[str, Any]]:
    """One layer, forward."""
    n_out, n_in = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / n_in**0.5
    quantized = quantize_weight(weight, fmt, layer=label)
    pool = PadPool(0)
    rows = []
    for mode, call in pad_calls(quantized, pool).items():
        per = TOKENS * (n_in + n_out if mode in ("otp", "lattice") else n_in)
        found = timed(call, keystream(fmt.n_planes * TOKENS * n_in), per=per, pairs=pairs)
        rows.append(row(f"pad, {mode}, {fmt.name}, {label} / AES-256-CTR of r's bytes", *found, "ns/element"))
    for kernel, (call, peer) in kernel_calls(quantized, fmt).items():
        per = TOKENS * (n_in if kernel == "mask" else n_out)
        found = timed(call, peer, per=per, pairs=pairs)
        rows.append(row(f"{kernel}, {fmt.name}, {label} / copy of its bytes", *found, "ns/element"))
    keys = PadKeys()
    once = {
        "check keys": lambda: CheckKeys.generate(quantized, FORWARD),
        "lattice secrets": lambda: keys.lattice(
            os.urandom(4).hex(), FORWARD, quantized, CheckKeys.generate(quantized, FORWARD), pool=pool
        ).close(),
    }
    for name, call in once.items():
        found = timed(call, copy_of(8 * n_in * n_out), per=n_in * n_out, pairs=min(pairs, 3))
        rows.append(row(f"{name}, once, {fmt.name}, {label} / copy of the weight", *found, "ns/weight"))
    return rows


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs of the smallest layer")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    one_thread()
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for label in list(SHAPES)[: 1 if args.quick else None]:
        for fmt in (FAST, FAITHFUL):
            rows += rows_of(label, SHAPES[label], fmt, 2 if args.quick else args.pairs)
    write_csv(out_path("pad_cost", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
