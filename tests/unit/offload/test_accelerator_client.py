"""The enclave's side: honest products over both kinds of link, and every way in which the other side can misbehave."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.oracle import slow_ring
from tests.unit.offload._links import HASTY, KINDS, PATIENT, ThreadAccelerator, honest, make_weight, pair, scripted

from cloister.errors import AcceleratorLostError, OffloadError
from cloister.offload import Accelerator
from cloister.offload._client import ConnectedAccelerator
from cloister.offload._transport import Link, OwnerLink
from cloister.pad import Direction
from cloister.ring import FAITHFUL, FAST, QuantizedWeight, RingFormat
from cloister.wire import AcceleratorAnswer, AcceleratorError, AcceleratorHello, AcceleratorMultiply

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
LINKS = pytest.mark.parametrize("kind", KINDS)
LOADED, PRODUCT = AcceleratorAnswer().to_bytes(), AcceleratorAnswer(2, 5).to_bytes()


def multiply(of: Accelerator, weight: QuantizedWeight, layer: str, direction: Direction, n_tokens: int) -> None:
    """One product of random elements, compared with Python's integers."""
    fmt, integers = weight.format, weight.w_q.tolist()
    if direction is Direction.BACKWARD:
        integers = slow_ring.transpose(integers)
    with of.call(layer, direction, n_tokens) as call:
        assert call.planes.shape == (fmt.n_planes, n_tokens, len(integers[0]))
        call.planes[:] = np.arange(call.planes.size, dtype=np.int64).reshape(call.planes.shape) * 37 % 256 - 128
        planes = call.planes.tolist()
        answer = call.multiply()
        assert answer.dtype == np.uint32
        found = answer.tolist()
    products = [
        slow_ring.integer_product(plane, [[slow_ring.encode_weight(w, fmt.name)[i % fmt.n_weight_planes] for w in row]
                                          for row in integers])
        for i, plane in enumerate(planes)
    ]  # fmt: skip
    assert found == slow_ring.decode_all(products, fmt.name)


def _files() -> set[tuple[str, str]]:
    """Open files of this process, by number and name; what an earlier test has left may be closed at any moment."""
    found: set[tuple[str, str]] = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, str(path.readlink())))
    return found


# --- honest -----------------------------------------------------------------------------------------------------------


@LINKS
@BOTH
def test_products(kind: str, fmt: RingFormat) -> None:
    weights = {f"w{i}": make_weight(fmt, 3 + i, 4 + 2 * i, seed=i) for i in range(3)}
    with ThreadAccelerator(kind) as accelerator:
        for layer, weight in weights.items():
            accelerator.load(layer, weight)
        for n_tokens in (2, 1, 9, 2):
            for layer, weight in weights.items():
                for direction in Direction:
                    multiply(accelerator, weight, layer, direction, n_tokens)
        found = accelerator.describe()
    assert found["kernel"] == "int-mm" and str(found["device"]).startswith("cpu")
    assert found["calls"] == 4 * 3 * 2 and found["restarts"] == 0
    elements = [(2 + 1 + 9 + 2) * side for w in weights.values() for side in w.w_q.shape]
    assert found["bytes_in"] == 4 * sum(elements)
    loads = sum(2 * w.w_q.numel() + 4 * len(w.scales) for w in weights.values())
    assert found["bytes_out"] == fmt.n_planes * sum(elements) + loads


def test_an_interrupt_while_an_answer_comes_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it on the wire must not be taken for the answer to the next question."""
    weight = make_weight(FAST, 4, 3)
    with ThreadAccelerator("tcp") as accelerator:
        accelerator.load("w", weight)

        def interrupted(place: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(accelerator._link, "pull", interrupted)
        with pytest.raises(KeyboardInterrupt), accelerator.call("w", Direction.FORWARD, 2) as call:
            call.planes[:] = 0
            call.multiply()
        assert accelerator._link is None
        accelerator.revive()
        multiply(accelerator, weight, "w", Direction.FORWARD, 2)


@LINKS
def test_memory_grows(kind: str) -> None:
    """Over a Unix socket a new piece of memory goes along with the call that is the first to need it."""
    weight = make_weight(FAST, 64, 32)
    with ThreadAccelerator(kind) as accelerator:
        accelerator.load("w", weight)
        for n_tokens in (1, 12_000, 1, 30_000):
            with accelerator.call("w", Direction.FORWARD, n_tokens) as call:
                call.planes[:] = 1
                found = call.multiply().copy()
            assert (found == found[0]).all()


@LINKS
def test_more_than_a_socket_takes_at_once(kind: str) -> None:
    wide = make_weight(FAST, 1500, 1200)
    with ThreadAccelerator(kind) as accelerator:
        accelerator.load("w", wide)
        with accelerator.call("w", Direction.BACKWARD, 2000) as call:
            call.planes[:] = 0
            call.planes[0, :, 3] = 1
            found = call.multiply()
            assert (found == wide.w_q[3].numpy().astype(np.int64) % FAST.modulus).all()


def test_planes_stay_where_the_other_side_sees_them() -> None:
    """Nothing is copied on one host: an answer that is changed later is changed for the caller, too."""
    seen: list[np.ndarray] = []

    def serve(connection: socket.socket) -> None:
        from cloister.offload._compute import CpuDevice
        from cloister.offload._server import serve_connection

        class Spy(CpuDevice):
            def adopt(self, memory: np.ndarray) -> Callable[[], None]:
                seen.append(memory)
                return super().adopt(memory)

        serve_connection(connection, Spy())

    with ThreadAccelerator("shared", serve) as accelerator:
        accelerator.load("w", make_weight(FAST))
        with accelerator.call("w", Direction.FORWARD, 1) as call:
            call.planes[:] = 5
            answer = call.multiply()
            (memory,) = seen
            assert (memory[: 3 * 7] == 5).all()
            memory[64:68] = 255
            assert answer[0, 0] == 2**32 - 1


@LINKS
def test_a_layer_is_replaced(kind: str) -> None:
    first, second = make_weight(FAST, 5, 7, seed=1), make_weight(FAITHFUL, 3, 2, seed=2)
    with ThreadAccelerator(kind) as accelerator:
        accelerator.load("w", first)
        multiply(accelerator, first, "w", Direction.FORWARD, 2)
        accelerator.load("w", second)
        multiply(accelerator, second, "w", Direction.FORWARD, 2)


@LINKS
def test_revive_loads_everything_again(kind: str) -> None:
    weights = {f"w{i}": make_weight(FAITHFUL, 3 + i, 4, seed=i) for i in range(3)}
    with ThreadAccelerator(kind) as accelerator:
        for layer, weight in weights.items():
            accelerator.load(layer, weight)
        for n in (1, 2):
            accelerator.revive()
            for layer, weight in weights.items():
                multiply(accelerator, weight, layer, Direction.BACKWARD, 2)
            assert accelerator.describe()["restarts"] == n


# --- wrong use --------------------------------------------------------------------------------------------------------


@LINKS
def test_calls_that_cannot_be(kind: str) -> None:
    with ThreadAccelerator(kind) as accelerator:
        with pytest.raises(OffloadError, match="never loaded"):
            accelerator.call("w", Direction.FORWARD, 1)
        accelerator.load("w", make_weight(FAST))
        for n_tokens in (0, -1, (1 << 20) + 1):
            with pytest.raises(OffloadError, match="tokens at once do not go"):
                accelerator.call("w", Direction.FORWARD, n_tokens)
        with accelerator.call("w", Direction.FORWARD, 1) as call:
            with pytest.raises(OffloadError, match="another call"):
                accelerator.call("w", Direction.FORWARD, 1)
            call.multiply()
            with pytest.raises(OffloadError, match="multiplies once"):
                call.multiply()
        with accelerator.call("w", Direction.FORWARD, 1) as unused:
            pass
        with pytest.raises(OffloadError, match="multiplies once"):
            unused.multiply()
        call.__exit__(None, None, None)  # of one that has ended: it does not end the next
        with accelerator.call("w", Direction.FORWARD, 1) as last:
            unused.__exit__(None, None, None)
            with pytest.raises(OffloadError, match="another call"):
                accelerator.call("w", Direction.FORWARD, 1)
            last.multiply()


def test_after_closing() -> None:
    accelerator = ThreadAccelerator("shared")
    accelerator.load("w", make_weight(FAST))
    accelerator.close()
    accelerator.close()
    for use in (
        lambda: accelerator.load("v", make_weight(FAST)),
        lambda: accelerator.call("w", Direction.FORWARD, 1),
        accelerator.revive,
    ):
        with pytest.raises(OffloadError, match="closed"):
            use()


def test_a_layer_beyond_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadAccelerator("shared") as accelerator:
        accelerator._layers = {str(i): None for i in range(65_536)}  # type: ignore[misc]
        with pytest.raises(OffloadError, match="layer w does not fit the accelerator's protocol"):
            accelerator.load("w", make_weight(FAST))


# --- the other side misbehaves ----------------------------------------------------------------------------------------


def _half(connection: socket.socket) -> None:
    connection.sendall(PRODUCT[:50])
    connection.shutdown(socket.SHUT_WR)


def _half_a_payload(connection: socket.socket) -> None:
    connection.sendall(PRODUCT + bytes(39))
    connection.shutdown(socket.SHUT_WR)


def _drip(connection: socket.socket) -> None:
    """A byte now and then: each one in time, and all of them not."""
    for i in range(96):
        connection.sendall(PRODUCT[i : i + 1])
        time.sleep(0.05)


@LINKS
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n".ljust(96), "does not speak the protocol"),
        (os.urandom(96), "does not speak the protocol"),
        (bytes(4096), "does not speak the protocol"),
        (PRODUCT[:4] + b"\2" + PRODUCT[5:], "speaks version 2"),
        (AcceleratorAnswer(2, 6).to_bytes(), "another size"),
        (AcceleratorAnswer(1, 5).to_bytes(), "another size"),
        (AcceleratorAnswer(1 << 20, 1024).to_bytes(), "another size"),
        (LOADED, "another size"),
        (AcceleratorHello("a", "b").to_bytes(), "another size"),
        (AcceleratorMultiply(0, 0, 3, 2, 7).to_bytes(), "another size"),
        (lambda connection: connection.close(), "died or hung up"),
        (lambda connection: connection.shutdown(socket.SHUT_RDWR), "died or hung up"),
        (_half, "died or hung up"),
        (_drip, "did not answer in time"),
        (lambda connection: time.sleep(0.5), "did not answer in time"),
    ],
    ids=["http", "noise", "zeros", "version", "wider", "fewer", "huge", "empty", "hello", "question", "closed",
         "shut down", "half", "drip", "stall"],
)  # fmt: skip
def test_lost(kind: str, answer: bytes | Callable[[socket.socket], object], says: str) -> None:
    with ThreadAccelerator(kind, scripted(LOADED, answer), timeouts=HASTY) as accelerator:
        accelerator.load("w", make_weight(FAST))
        began = time.monotonic()
        with pytest.raises(AcceleratorLostError, match=says), accelerator.call("w", Direction.FORWARD, 2) as call:
            call.multiply()
        assert time.monotonic() - began < 2
        with pytest.raises(AcceleratorLostError, match="was lost"):
            accelerator.call("w", Direction.FORWARD, 2)
        with pytest.raises(AcceleratorLostError, match="was lost"):
            accelerator.load("v", make_weight(FAST))
        # Both layers are there again with another accelerator.
        accelerator._timeouts, accelerator.serve = PATIENT, honest
        accelerator.revive()
        for layer in ("w", "v"):
            multiply(accelerator, make_weight(FAST), layer, Direction.FORWARD, 2)


@pytest.mark.parametrize(
    "answer", [_half_a_payload, lambda c: (c.sendall(PRODUCT), time.sleep(0.5))], ids=["half", "stall"]
)
def test_a_payload_that_does_not_come(answer: Callable[[socket.socket], object]) -> None:
    with ThreadAccelerator("tcp", scripted(LOADED, answer), timeouts=HASTY) as accelerator:
        accelerator.load("w", make_weight(FAST))
        with pytest.raises(AcceleratorLostError), accelerator.call("w", Direction.FORWARD, 2) as call:
            call.multiply()


@LINKS
def test_nobody_reads(kind: str) -> None:
    """A peer that takes nothing in holds the sender of a large load no longer than the timeout."""
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(96)
            connection.sendall(AcceleratorHello().to_bytes())
            stop.wait(10)

    with ThreadAccelerator(kind, serve, timeouts=HASTY) as accelerator:
        with pytest.raises(AcceleratorLostError, match="did not answer in time"):
            accelerator.load("w", make_weight(FAST, 2000, 4000))
        stop.set()


@LINKS
def test_refused(kind: str) -> None:
    """A refusal is a whole message: the connection goes on, and the layer is not taken for loaded."""
    no = AcceleratorError("offload.overflow").to_bytes()
    with ThreadAccelerator(kind, scripted(no, LOADED, no, no)) as accelerator:
        with pytest.raises(OffloadError, match=r"refused, and gave the code offload\.overflow") as caught:
            accelerator.load("w", make_weight(FAST))
        assert type(caught.value) is OffloadError  # never a class that the other side chose
        with pytest.raises(OffloadError, match="never loaded"):
            accelerator.call("w", Direction.FORWARD, 1)
        accelerator.load("w", make_weight(FAST, seed=1))
        with pytest.raises(OffloadError, match="refused"):
            accelerator.load("w", make_weight(FAST, 9, 9))
        with accelerator.call("w", Direction.FORWARD, 2) as call:
            assert call.planes.shape == (3, 2, 7)  # as the one that it has
            with pytest.raises(OffloadError, match="refused"):
                call.multiply()


def test_another_answer_to_a_load() -> None:
    with (
        ThreadAccelerator("shared", scripted(PRODUCT)) as accelerator,
        pytest.raises(AcceleratorLostError, match="answered a load with something else"),
    ):
        accelerator.load("w", make_weight(FAST))


@pytest.mark.parametrize(
    ("hello", "error", "says"),
    [
        (LOADED, AcceleratorLostError, "did not say what it is"),
        (b"", AcceleratorLostError, "died or hung up"),
        (AcceleratorError("offload").to_bytes(), OffloadError, "refused"),
    ],
    ids=["answer", "nothing", "refusal"],
)
def test_another_answer_to_hello(hello: bytes, error: type[OffloadError], says: str) -> None:
    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(96)
            connection.sendall(hello)

    with pytest.raises(error, match=says):
        ThreadAccelerator("shared", serve)


def test_it_does_not_come_back() -> None:
    with ThreadAccelerator("shared", scripted()) as accelerator:
        accelerator.serve = lambda connection: connection.close()
        with pytest.raises(OffloadError, match="does not come back: the accelerator died") as caught:
            accelerator.revive()
        assert type(caught.value) is OffloadError  # so that nobody tries for ever


def test_no_connection_is_to_be_had() -> None:
    class Unreachable(ConnectedAccelerator):
        def _connect(self) -> Link:
            raise OSError(111, "Connection refused")

    with pytest.raises(AcceleratorLostError, match="cannot be reached: Connection refused"):
        Unreachable()._open()


def test_files_that_the_other_side_passes_are_not_taken() -> None:
    """The enclave's end never receives a file descriptor."""
    with Path(os.devnull).open() as file:

        def answer(connection: socket.socket) -> None:
            socket.send_fds(connection, [LOADED], [file.fileno()] * 3)

        before = _files()
        with ThreadAccelerator("shared", scripted(answer)) as accelerator:
            accelerator.load("w", make_weight(FAST))
            ours = accelerator._link
            assert isinstance(ours, OwnerLink)
        assert _files() <= before


def test_links_close_twice_and_leave_no_file() -> None:
    before = _files()
    ours, theirs = pair("shared")
    link = OwnerLink(ours)
    link.room(10, 10)
    link.close()
    link.close()
    theirs.close()
    assert _files() <= before
