"""What the benches of masked layers share: sessions over a real accelerator process, and CPU time of both processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from cloister.offload import LocalAccelerator, OffloadSession
from cloister.pad import PadMode
from cloister.ring import RingFormat

MODES = (PadMode.OTP, PadMode.LATTICE)


def one_thread() -> None:
    """In this process, and in those that it starts from now on."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


class Masked:
    """A session with an accelerator process of its own. Use it in a `with`."""

    def __init__(self, fmt: RingFormat, mode: PadMode) -> None:
        self.accelerator = LocalAccelerator("cpu")
        self.session = OffloadSession(self.accelerator, fmt, pad=mode)

    def __enter__(self) -> Masked:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def cpu_s(self) -> float:
        """CPU seconds so far of this process and the accelerator's, whichever of their threads took them."""
        return time.process_time() + (0.0 if self.accelerator.pid is None else cpu_s_of(self.accelerator.pid))


def cpu_s_of(pid: int) -> float:
    """CPU seconds so far of a process, from the scheduler's nanoseconds: clock ticks are 10 ms."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
