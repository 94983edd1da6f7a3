"""Round trips between an enclave and its accelerator, beside the least that any two processes need.

A header alone, against a bare ping-pong of as many bytes over a Unix socket; and the input and answer of 512 tokens by
a 4096x4096 layer, with a device that computes nothing and writes its answer, against the same copies in one process.

    python bench/accelerator_roundtrip.py [--quick] [--pairs 9] [--out bench/results/accelerator_roundtrip.csv]
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench._common import load_average, out_path, row, write_csv

from cloister.offload._client import ConnectedAccelerator, Timeouts
from cloister.offload._compute import CpuDevice
from cloister.offload._server import serve_connection
from cloister.offload._transport import Link, OwnerLink, StreamLink
from cloister.pad import Direction
from cloister.ring import FAITHFUL, FAST, RingFormat, quantize_weight
from cloister.wire import ACCELERATOR_HEADER_BYTES, AcceleratorHello

TOKENS, FEATURES = 512, 4096


class IdleDevice(CpuDevice):
    """Writes an answer that it had before."""

    def __init__(self) -> None:
        super().__init__()
        self._answer = np.ones((TOKENS, FEATURES), dtype=np.uint32)

    def multiply(self, weight: Any, direction: Any, planes: Any, answer: Any) -> None:
        """No product."""
        answer[:] = self._answer[: len(answer), : answer.shape[1]]


def serve(what: str, fd: int) -> None:
    """What a child process of this bench does with its end of a connection."""
    connection = socket.socket(fileno=fd)
    if what == "idle":
        serve_connection(connection, IdleDevice())
        return
    with connection:
        while data := connection.recv(ACCELERATOR_HEADER_BYTES):
            connection.send(data)


def start(stack: ExitStack, what: str, kind: str) -> socket.socket:
    """A child process, and this end of the connection to it."""
    if kind == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
        for end in (ours, theirs):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with theirs:
        child = subprocess.Popen([sys.executable, __file__, "--serve", what, str(theirs.fileno())],
                                 pass_fds=[theirs.fileno()])  # fmt: skip
    stack.callback(child.wait)
    stack.callback(ours.close)
    return ours


class Idle(ConnectedAccelerator):
    """The enclave's client of an idle device."""

    def __init__(self, stack: ExitStack, kind: str) -> None:
        super().__init__(Timeouts())
        ours = start(stack, "idle", kind)
        self._made: Link = OwnerLink(ours) if kind == "unix" else StreamLink(ours, lambda n: np.empty(n, np.uint8))
        self._open()
        stack.callback(self.close)
        self._planes: dict[str, Any] = {}
        for fmt in (FAST, FAITHFUL):
            weight = quantize_weight(torch.ones(FEATURES, FEATURES), fmt, layer=fmt.name)
            self.load(fmt.name, weight)
            self._planes[fmt.name] = np.ones((fmt.n_planes, TOKENS, FEATURES), dtype=np.int8)
        self._out = np.empty((TOKENS, FEATURES), dtype=np.uint32)

    def _connect(self) -> Link:
        return self._made

    def hello(self) -> None:
        """A header each way."""
        self._ask(self._made, AcceleratorHello())

    def product(self, fmt: RingFormat) -> None:
        """The planes are written, and the answer is read once."""
        with self.call(fmt.name, Direction.FORWARD, TOKENS) as call:
            call.planes[:] = self._planes[fmt.name]
            self._out[:] = call.multiply()


def copies(fmt: RingFormat) -> Callable[[], None]:
    """What `Idle.product` and its device copy, in one process."""
    planes, place = (np.ones((fmt.n_planes, TOKENS, FEATURES), dtype=np.int8) for _ in range(2))
    answer, there, here = (np.ones((TOKENS, FEATURES), dtype=np.uint32) for _ in range(3))

    def copy() -> None:
        place[:] = planes
        there[:] = answer
        here[:] = there

    return copy


def ping(connection: socket.socket) -> None:
    """One bare round trip."""
    connection.send(bytes(ACCELERATOR_HEADER_BYTES))
    connection.recv(ACCELERATOR_HEADER_BYTES)


def microseconds(call: Callable[[], object], times: int) -> float:
    """Median of single calls: one that the scheduler delays says nothing about the path."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return 1e6 * sorted(found)[len(found) // 2]


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], int(args.serve[1]))
        return
    pairs, headers, products = (2, 200, 5) if args.quick else (args.pairs, 2000, 20)
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    with ExitStack() as stack:
        bare = start(stack, "echo", "unix")
        ends = {"shared memory": Idle(stack, "unix"), "TCP on this host": Idle(stack, "tcp")}
        rows = []
        for name, end in ends.items():
            ours, peer = [], []
            for _ in range(pairs):
                ours.append(microseconds(end.hello, headers))
                peer.append(microseconds(lambda: ping(bare), headers))
            rows.append(row(f"header there and back, {name} / bare Unix socket", ours, peer, "us"))
            for fmt in (FAST, FAITHFUL):
                ours, peer, copy = [], [], copies(fmt)
                for _ in range(pairs):
                    ours.append(microseconds(lambda end=end, fmt=fmt: end.product(fmt), products))
                    peer.append(microseconds(copy, products))
                label = f"{fmt.name}, {TOKENS} tokens of {FEATURES}"
                rows.append(row(f"{label} there and back, {name} / the same copies in one process", ours, peer, "us"))
    write_csv(out_path("accelerator_roundtrip", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
