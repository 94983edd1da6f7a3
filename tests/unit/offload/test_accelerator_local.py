"""Accelerators behind real processes: started here, or listening at an address; killed, stopped, gone, and back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tests.unit.offload._links import make_weight

from cloister.errors import AcceleratorLostError, OffloadError
from cloister.offload import Accelerator, LocalAccelerator, RemoteAccelerator, Timeouts
from cloister.offload import _local as local
from cloister.pad import Direction
from cloister.ring import FAITHFUL

pytestmark = pytest.mark.slow

TIMES = Timeouts(answer_s=20, load_s=20, start_s=60)
SHORT = Timeouts(answer_s=0.5, load_s=20, start_s=60)
W = make_weight(FAITHFUL, 6, 9)


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "a.sock"


def ones(of: Accelerator) -> list[list[int]]:
    """W times a one in each feature."""
    with of.call("w", Direction.FORWARD, 2) as call:
        call.planes[:] = 1
        return call.multiply().tolist()


EXPECTED = [[int(value) % FAITHFUL.modulus for value in W.w_q.long().sum(1)]] * 2


def gone(pid: int) -> bool:
    """Whether the process is no more, or a zombie that its parent has yet to see."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < until, "the process is still there"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def started() -> Iterator[LocalAccelerator]:
    with LocalAccelerator("cpu", timeouts=TIMES) as accelerator:
        accelerator.load("w", W)
        yield accelerator


# --- a child process --------------------------------------------------------------------------------------------------


def test_products(started: LocalAccelerator) -> None:
    assert ones(started) == EXPECTED
    assert started.describe()["kernel"] == "int-mm"
    assert repr(started) == "LocalAccelerator(device='cpu')"


def test_killed_while_it_computes(started: LocalAccelerator) -> None:
    """It is stopped first, so that the call is certainly open when it is killed."""
    pid = started.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(AcceleratorLostError, match="died or hung up"):
        ones(started)
    assert gone(pid) and started.pid is None
    with pytest.raises(AcceleratorLostError, match="was lost"):
        ones(started)
    started.revive()
    assert started.pid not in (None, pid)
    assert ones(started) == EXPECTED


def test_what_the_process_has(started: LocalAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials of the environment, no files but its own, no capabilities, no terminal."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    thread = threading.Thread(target=started.revive)
    thread.start()
    thread.join()
    process = Path(f"/proc/{started.pid}")
    environment = (process / "environ").read_bytes()
    assert b"AWS" not in environment and b"CUDA_VISIBLE_DEVICES=0" in environment and b"OMP_WAIT_POLICY=" in environment
    assert (process / "fd/0").readlink() == (process / "fd/1").readlink() == Path("/dev/null")
    sockets = [link for file in (process / "fd").iterdir() if "socket:" in (link := str(file.readlink()))]
    assert len(set(sockets)) == 1
    for task in (process / "task").iterdir():
        assert "CapEff:\t0000000000000000" in (task / "status").read_text()
    assert ones(started) == EXPECTED  # it did not end with the thread that started it


def test_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_EXIT_S", 0.2)
    with LocalAccelerator("cpu", timeouts=SHORT) as accelerator:
        accelerator.load("w", W)
        pid = accelerator.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(AcceleratorLostError, match="did not answer in time"):
            ones(accelerator)
        assert time.monotonic() - began < 3
        assert gone(pid)
        accelerator.revive()
        accelerator._timeouts = TIMES
        assert ones(accelerator) == EXPECTED
        assert accelerator.describe()["restarts"] == 1
        last = accelerator.pid
        assert last
        os.kill(last, signal.SIGSTOP)  # closing does not wait for it
    assert gone(last)


def test_it_ends_with_its_parent() -> None:
    script = """
import sys, time
from cloister.offload import LocalAccelerator
accelerator = LocalAccelerator("cpu")
print(accelerator.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        wait_until_gone(pid)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_such_device() -> None:
    with pytest.raises(OffloadError, match="did not start: there is no CUDA device here") as caught:
        LocalAccelerator("cuda", timeouts=TIMES)
    assert type(caught.value) is OffloadError


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; sys.exit('error: \\x1b[31mred ' + 'x' * 500)", r"did not start: \?\[31mred x{180,}$"),
        ("import sys; sys.exit('Traceback of something')", "did not start: the accelerator died or hung up"),
        ("import time; time.sleep(60)", "did not start: the accelerator did not answer in time"),
    ],
    ids=["colour", "no word", "never"],
)
def test_it_does_not_start(script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is shown in printable characters, and not at any length."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(OffloadError, match=says):
        LocalAccelerator("cpu", timeouts=Timeouts(start_s=1))


def test_there_is_no_program_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(OffloadError, match=r"did not start: .* cannot be reached: No such file"):
        LocalAccelerator("cpu")


# --- at an address ----------------------------------------------------------------------------------------------------


@contextmanager
def listening(address: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that listens there, and where that is."""
    argv = [sys.executable, "-m", "cloister.offload", "--listen", address, "--device", "cpu"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        where = process.stderr.readline().split(": ")[0]
        try:
            yield process, where
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_remote(kind: str, path: Path) -> None:
    with listening(f"unix:{path}" if kind == "unix" else "tcp://127.0.0.1:0") as (process, where):
        with RemoteAccelerator(where, timeouts=TIMES) as accelerator:
            accelerator.load("w", W)
            assert ones(accelerator) == EXPECTED
            assert repr(accelerator) == f"RemoteAccelerator({where!r})"
            # Another one has to wait, and is served once this one has gone.
            with pytest.raises(AcceleratorLostError, match="did not answer in time"):
                RemoteAccelerator(where, timeouts=Timeouts(start_s=0.3))
            assert ones(accelerator) == EXPECTED
        with RemoteAccelerator(where, timeouts=TIMES) as accelerator:
            with pytest.raises(OffloadError, match="never loaded"):
                ones(accelerator)
            accelerator.load("w", W)
            assert ones(accelerator) == EXPECTED
        process.terminate()
        assert process.wait(timeout=20) == 0
    assert not path.exists()


def test_it_is_restarted_by_somebody_else() -> None:
    """`revive` waits for it, within its time."""
    with listening("tcp://127.0.0.1:0") as (process, where):
        accelerator = RemoteAccelerator(where, timeouts=TIMES)
        accelerator.load("w", W)
        process.kill()
        process.wait()
        with pytest.raises(AcceleratorLostError, match="died or hung up"):
            ones(accelerator)
    pauses: list[float] = []
    stack: list[object] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            context = listening(where)
            stack.append(context)
            context.__enter__()

    accelerator._sleep = sleep
    accelerator.revive()
    assert pauses == [0.05, 0.1, 0.2]
    assert ones(accelerator) == EXPECTED
    accelerator.close()
    stack[0].__exit__(None, None, None)  # type: ignore[attr-defined]


def test_nobody_comes_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    waits: list[float] = []
    with pytest.raises(AcceleratorLostError, match=f"nobody listens at tcp://127.0.0.1:{port}: Connection refused"):
        RemoteAccelerator(f"tcp://127.0.0.1:{port}", timeouts=Timeouts(start_s=0.2), sleep=waits.append)
    assert waits[:3] == [0.05, 0.1]


def test_no_address() -> None:
    with pytest.raises(OffloadError, match="is no address"):
        RemoteAccelerator("http://x")
