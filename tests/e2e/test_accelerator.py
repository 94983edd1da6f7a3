"""A session over a real accelerator: steps are the same numbers whatever happens to its process, and a liar ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloister.errors import AcceleratorLostError, IntegrityError, OffloadError
from cloister.offload import LocalAccelerator, OffloadSession, RemoteAccelerator, Timeouts
from cloister.ring import FAITHFUL, FAST, RingFormat, quantize_weight

pytestmark = pytest.mark.slow

TIMES = Timeouts(answer_s=30, load_s=30, start_s=60)
DEVICES = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)


def steps(session: OffloadSession, n: int = 3) -> list[torch.Tensor]:
    """Forward and backward of a layer, over the same data at each call of this."""
    generator = torch.Generator().manual_seed(7)
    found: list[torch.Tensor] = []
    for _ in range(n):
        found.append(session.forward("w", torch.randn(33, 48, generator=generator)))
        found.append(session.backward("w", torch.randn(33, 40, generator=generator)))
    return found


def weight(fmt: RingFormat) -> torch.Tensor:
    return torch.randn(40, 48, generator=torch.Generator().manual_seed(3)) / 7


def check(found: list[torch.Tensor], fmt: RingFormat) -> None:
    """Against the plain layer, within the rounding of the format."""
    generator, w = torch.Generator().manual_seed(7), weight(fmt)
    for y, dx in zip(found[::2], found[1::2], strict=True):
        plain = torch.randn(33, 48, generator=generator) @ w.T
        assert ((y - plain).norm() / plain.norm()) < (0.003 if fmt is FAITHFUL else 0.03)
        plain = torch.randn(33, 40, generator=generator) @ w
        assert ((dx - plain).norm() / plain.norm()) < (0.003 if fmt is FAITHFUL else 0.03)


@DEVICES
def test_killed_and_stopped_between_and_within_steps(device: str) -> None:
    """Each loss costs a retry with a fresh pad; the numbers are those of a run in which nothing happened."""
    fmt = FAITHFUL
    times = Timeouts(answer_s=2 if device == "cpu" else 10, load_s=30, start_s=60)
    accelerator = LocalAccelerator(device, timeouts=times)
    with OffloadSession(accelerator, fmt) as session:
        session.add("w", quantize_weight(weight(fmt), fmt, layer="w"))
        undisturbed = steps(session)
        check(undisturbed, fmt)

        def pid() -> int:
            assert accelerator.pid
            return accelerator.pid

        os.kill(pid(), signal.SIGKILL)  # between
        assert all(map(torch.equal, steps(session), undisturbed))
        os.kill(pid(), signal.SIGSTOP)  # a stall
        assert all(map(torch.equal, steps(session), undisturbed))
        os.kill(pid(), signal.SIGSTOP)  # within: the call is open when it dies
        threading.Timer(0.5, os.kill, (pid(), signal.SIGKILL)).start()
        assert all(map(torch.equal, steps(session), undisturbed))
        found = session.describe()
    assert found["retries"] == found["accelerator"]["restarts"] == 3
    assert found["pad_elements"] == (4 * 3 * (48 + 40) + 3 * 48) * 33  # each retry has a pad of its own


class Stopping(LocalAccelerator):
    """Its process is stopped again each time that it is there."""

    def revive(self) -> None:
        super().revive()
        self.stop()

    def stop(self) -> None:
        assert self.pid
        os.kill(self.pid, signal.SIGSTOP)


def test_stalls_without_end_end_the_step() -> None:
    accelerator = Stopping("cpu", timeouts=Timeouts(answer_s=0.3, load_s=30, start_s=60))
    with OffloadSession(accelerator, FAST, retries=1) as session:
        session.add("w", quantize_weight(weight(FAST), FAST, layer="w"))
        accelerator.stop()
        with pytest.raises(AcceleratorLostError, match="did not answer in time"):
            session.forward("w", torch.ones(1, 48))


LIAR = """
import sys
from cloister.offload import __main__, _compute
honest = _compute.CpuDevice.multiply
def lie(self, weight, direction, planes, answer):
    honest(self, weight, direction, planes, answer)
    answer[-1, -1] ^= 1
_compute.CpuDevice.multiply = lie
sys.exit(__main__.main(["--listen", "tcp://127.0.0.1:0", "--device", "cpu"]))
"""


def test_a_process_that_lies_once() -> None:
    with subprocess.Popen([sys.executable, "-c", LIAR], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        where = process.stderr.readline().split(": ")[0]
        session = OffloadSession(RemoteAccelerator(where, timeouts=TIMES), FAITHFUL)
        session.add("w", quantize_weight(weight(FAITHFUL), FAITHFUL, layer="w"))
        with pytest.raises(IntegrityError, match="layer w"):
            session.forward("w", torch.ones(3, 48))
        with pytest.raises(OffloadError, match="has ended"):
            session.forward("w", torch.ones(3, 48))
        process.kill()


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`cloister accelerator` at a path."""
    path = tmp_path_factory.mktemp("s") / "a.sock"
    argv = [sys.executable, "-m", "cloister.cli", "accelerator", "--listen", f"unix:{path}", "--device", "cpu"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"unix:{path}: cpu, ")
        yield process, path
        process.kill()


def test_the_command(command: tuple[subprocess.Popen[str], Path]) -> None:
    process, path = command
    with OffloadSession(RemoteAccelerator(f"unix:{path}", timeouts=TIMES), FAST) as session:
        session.add("w", quantize_weight(weight(FAST), FAST, layer="w"))
        check(steps(session), FAST)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert not path.exists()
