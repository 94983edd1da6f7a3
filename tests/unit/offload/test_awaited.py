"""An accelerator that dials the enclave: taken when it comes, again when it was lost, named when it does not come."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cloister.errors import AcceleratorLostError, OffloadError
from cloister.offload import AwaitedAccelerator, OffloadSession, Timeouts, accelerator_port
from cloister.offload._compute import CpuDevice
from cloister.offload._server import serve_connection
from cloister.ring import FORMATS, quantize_weight

PATIENT = Timeouts(answer_s=20, load_s=20, start_s=20)
HASTY = Timeouts(answer_s=0.2, load_s=0.2, start_s=0.1)
FAITHFUL = FORMATS["faithful"]


@pytest.fixture(params=["unix", "tcp"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    with accelerator_port(f"unix:{tmp_path / 'a'}" if request.param == "unix" else "tcp://127.0.0.1:0") as listener:
        yield listener


def dial(listener: socket.socket, serve: Callable[[socket.socket], None]) -> threading.Thread:
    """`cloister accelerator --connect`, in a thread."""

    def body() -> None:
        connection = socket.socket(listener.family, socket.SOCK_STREAM)
        connection.connect(listener.getsockname())
        serve(connection)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def honest(connection: socket.socket) -> None:
    serve_connection(connection, CpuDevice())


def test_a_layer_runs_on_who_connects_and_on_who_comes_after_a_loss(port: socket.socket):
    first: list[socket.socket] = []

    def dies(connection: socket.socket) -> None:
        first.append(connection)
        honest(connection)

    thread = dial(port, dies)
    weight = torch.eye(8)
    with OffloadSession(AwaitedAccelerator(port, timeouts=PATIENT), FAITHFUL) as session:
        session.add("a", quantize_weight(weight, FAITHFUL, layer="a"))
        x = torch.arange(16.0).reshape(2, 8)
        torch.testing.assert_close(session.forward("a", x), x, rtol=1e-3, atol=1e-2)
        first[0].shutdown(socket.SHUT_RDWR)
        thread.join(20)
        dial(port, honest)
        torch.testing.assert_close(session.forward("a", x), x, rtol=1e-3, atol=1e-2)
        assert session.describe()["retries"] == 1
        assert session.describe()["accelerator"]["restarts"] == 1
    assert port.fileno() == -1, "it takes no more"


def test_it_says_where_it_waits(tmp_path: Path):
    listener = accelerator_port(f"unix:{tmp_path / 'a'}")
    dial(listener, honest)
    with AwaitedAccelerator(listener, timeouts=PATIENT) as accelerator:
        assert str(tmp_path / "a") in repr(accelerator)


def test_nobody_connects(port: socket.socket):
    with pytest.raises(AcceleratorLostError, match=r"no accelerator has connected within 0\.1 s") as caught:
        AwaitedAccelerator(port, timeouts=HASTY)
    assert "cloister accelerator --connect" in caught.value.hint


def test_who_connects_and_says_nothing_is_not_taken(port: socket.socket):
    hold = threading.Event()
    dial(port, lambda connection: hold.wait(20) and connection.close())
    with pytest.raises(AcceleratorLostError):
        AwaitedAccelerator(port, timeouts=HASTY)
    hold.set()


def test_no_address():
    with pytest.raises(OffloadError, match="is no address"):
        accelerator_port("http://accelerator")
