"""A pad helper over TCP: what it computes, what it refuses, and what becomes of either side when the other one goes."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch

from cloister.errors import AcceleratorLostError, ConfigError, IntegrityError, OffloadError, PadReuseError
from cloister.offload import OffloadSession, RemotePadHelper, Timeouts, serve_pad_helper
from cloister.offload import _helper as helper_module
from cloister.offload import _helper_server as server_module
from cloister.offload._compute import CpuDevice
from cloister.offload._helper_link import SealedLink
from cloister.pad import (
    BLOCK_POSITIONS,
    Direction,
    PadKeys,
    PadMode,
    PadRange,
    multiply_pad,
)
from cloister.ring import FAITHFUL, FAST, QuantizedWeight, RingFormat, quantize_weight
from cloister.testing import FakeAccelerator
from cloister.wire import AcceleratorAnswer, AcceleratorHello, AcceleratorMultiply

KEY = bytes(range(32))
BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
SOON = Timeouts(answer_s=20, load_s=20, start_s=2)
N_OUT, N_IN = 6, 4


def weight(fmt: RingFormat, layer: str = "q", seed: int = 0, shape: tuple[int, int] = (N_OUT, N_IN)) -> QuantizedWeight:
    return quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), fmt, layer=layer)


class Server:
    """A listener whose connections are served one after another by `serve`, in a thread."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self._serve = serve
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            self.connections.append(connection)
            with suppress(BrokenPipeError, ConnectionResetError):  # the client hangs up on what it refuses
                self._serve(connection)

    def cut(self) -> None:
        """End the connections that there are."""
        for connection in self.connections:
            with suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self.listener.fileno() < 0:
            return
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()
        self._thread.join(30)
        for connection in self.connections:
            connection.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def make(serve: Callable[[socket.socket], object] | None = None) -> Server:
        device = CpuDevice()
        started.append(Server(serve or (lambda connection: server_module.serve_pads(connection, KEY, device))))
        return started[-1]

    yield make
    for server in started:
        server.close()


def connect(server: Server, key: bytes = KEY, timeouts: Timeouts = SOON) -> RemotePadHelper:
    return RemotePadHelper(server.address, key, accelerator=None, insecure_same_host=True, timeouts=timeouts)


@pytest.fixture
def helper(start) -> Iterator[RemotePadHelper]:
    made = connect(start())
    yield made
    made.close()


def share(shape: tuple[int, int], fmt: RingFormat, skip: int = 0) -> tuple[np.ndarray, list[PadRange]]:
    stream = PadKeys().stream("q", Direction.FORWARD)
    if skip:
        stream.draw_shared((skip,), fmt.pad_moduli)
    return stream.draw_shared(shape, fmt.pad_moduli).use(shape)


@BOTH
@pytest.mark.parametrize("direction", list(Direction))
def test_u_is_the_enclaves_own(helper: RemotePadHelper, fmt: RingFormat, direction: Direction):
    held = weight(fmt)
    helper.load("q", held)
    helper.load("other", weight(fmt, seed=1))
    n_in = N_IN if direction is Direction.FORWARD else N_OUT
    planes = held.forward_planes() if direction is Direction.FORWARD else held.backward_planes()
    for n_tokens, skip in ((1, 0), (5, BLOCK_POSITIONS - 3), (2 * BLOCK_POSITIONS // n_in, 1000)):
        r, ranges = share((n_tokens, n_in), fmt, skip)
        u = helper.multiply("q", direction, ranges, n_tokens)
        assert u.dtype == np.uint32 and u.flags.writeable and u.flags.c_contiguous
        assert np.array_equal(u, multiply_pad(r, planes, fmt))


@BOTH
def test_a_session_of_the_mode_otp_2(helper: RemotePadHelper, fmt: RingFormat):
    accelerator = FakeAccelerator()
    x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(3))
    with (
        OffloadSession(accelerator, fmt, pad=PadMode.OTP2, helper=helper) as session,
        OffloadSession(FakeAccelerator(), fmt) as plain,
    ):
        for each in (session, plain):
            each.add("q", weight(fmt))
        assert torch.equal(session.forward("q", x), plain.forward("q", x))
        g = torch.randn(3, N_OUT, generator=torch.Generator().manual_seed(4))
        assert torch.equal(session.backward("q", g), plain.backward("q", g))


def test_a_helper_that_lies_is_found_by_the_check(start, monkeypatch: pytest.MonkeyPatch):
    class Lying(CpuDevice):
        def multiply(self, weight, direction, planes, answer) -> None:
            super().multiply(weight, direction, planes, answer)
            answer[0, 0] ^= 1

    device = Lying()
    helper = connect(start(lambda connection: server_module.serve_pads(connection, KEY, device)))
    with OffloadSession(FakeAccelerator(), FAST, pad=PadMode.OTP2, helper=helper) as session:
        session.add("q", weight(FAST))
        with pytest.raises(IntegrityError):
            session.forward("q", torch.ones(3, N_IN))
    helper.close()


def test_a_lost_connection_is_made_anew_with_all_layers(start):
    server = start()
    helper = connect(server)
    for layer, seed in (("q", 0), ("up", 1)):
        helper.load(layer, weight(FAST, layer, seed))
    server.cut()
    r, ranges = share((2, N_IN), FAST)
    with pytest.raises(AcceleratorLostError, match="pad helper"):
        helper.multiply("up", Direction.FORWARD, ranges, 2)
    u = helper.multiply("up", Direction.FORWARD, ranges, 2)
    assert np.array_equal(u, multiply_pad(r, weight(FAST, "up", 1).forward_planes(), FAST))
    assert len(server.connections) == 2
    helper.close()


def test_a_helper_that_does_not_come_back(start):
    server = start()
    helper = connect(server, timeouts=Timeouts(start_s=0.2))
    helper.load("q", weight(FAST))
    server.close()
    _, ranges = share((2, N_IN), FAST)
    with pytest.raises(AcceleratorLostError):
        helper.multiply("q", Direction.FORWARD, ranges, 2)
    for _ in range(2):
        with pytest.raises(OffloadError, match="pad helper"):
            helper.multiply("q", Direction.FORWARD, ranges, 2)
    helper.close()


def test_another_key(start):
    with pytest.raises(OffloadError, match="another key"):
        connect(start(), bytes(32))


def test_somebody_else_listens(start):
    with pytest.raises(AcceleratorLostError):
        connect(start(lambda connection: connection.close()))


def test_nobody_listens(start):
    server = start()
    server.close()
    with pytest.raises(AcceleratorLostError, match="nobody listens"):
        connect(server, timeouts=Timeouts(start_s=0.1))


def test_a_closed_helper(helper: RemotePadHelper):
    helper.load("q", weight(FAST))
    helper.close()
    helper.close()
    _, ranges = share((2, N_IN), FAST)
    with pytest.raises(OffloadError, match="closed"):
        helper.multiply("q", Direction.FORWARD, ranges, 2)


def test_another_process_is_refused(helper: RemotePadHelper, monkeypatch: pytest.MonkeyPatch):
    """Two processes would send records under the same nonces."""
    with monkeypatch.context() as patch:
        patch.setattr("cloister.pad._guard.os.getpid", lambda: -1)
        attempts = (
            lambda: helper.load("q", weight(FAST)),
            lambda: helper.multiply("q", Direction.FORWARD, [], 1),
            helper.close,
        )
        for attempt in attempts:
            with pytest.raises(PadReuseError, match="forked"):
                attempt()
    helper.load("q", weight(FAST))


@pytest.mark.parametrize("n_tokens", [0, (1 << 20) + 1])
def test_sizes_that_do_not_go(helper: RemotePadHelper, n_tokens: int):
    helper.load("q", weight(FAST))
    with pytest.raises(OffloadError, match="do not go"):
        helper.multiply("q", Direction.FORWARD, [], n_tokens)


def test_a_layer_that_was_never_loaded(helper: RemotePadHelper):
    with pytest.raises(OffloadError, match="never loaded"):
        helper.multiply("q", Direction.FORWARD, [], 1)


def test_its_name_tells_no_key(helper: RemotePadHelper):
    assert KEY.hex() not in repr(helper) and repr(KEY) not in repr(helper)
    assert "tcp://127.0.0.1:" in repr(helper)


def test_threads_may_share_one(helper: RemotePadHelper):
    held = weight(FAST)
    helper.load("q", held)
    found: list[bool] = []

    def work() -> None:
        for _ in range(5):
            r, ranges = share((3, N_IN), FAST)
            u = helper.multiply("q", Direction.FORWARD, ranges, 3)
            found.append(np.array_equal(u, multiply_pad(r, held.forward_planes(), FAST)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


# --- what a server may answer ----------------------------------------------------------------------------------------


def answering(*answers: Callable[[SealedLink], object]) -> Callable[[socket.socket], None]:
    """A server that takes the hello and a load, and answers a product with each of `answers` in turn."""
    left = list(answers)

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(20)
            link = SealedLink(connection, KEY, is_client=False)
            link.receive()
            link.send(AcceleratorHello("me", "mine").to_bytes())
            load = link.receive()
            if load:
                link.read_into(memoryview(bytearray(2 * N_OUT * N_IN)))
                link.read_into(memoryview(bytearray(4 * N_OUT)))
                link.send(AcceleratorAnswer().to_bytes())
                link.receive()
                for size in (
                    helper_module.N_RANGES.size,
                    helper_module.RANGE.size,
                ):  # or closing resets
                    link.read_into(memoryview(bytearray(size)))
                left.pop(0)(link)

    return serve


@pytest.mark.parametrize(
    "answer",
    [
        lambda link: link.send(AcceleratorAnswer(2, N_OUT + 1).to_bytes(), bytes(8 * (N_OUT + 1))),
        lambda link: link.send(AcceleratorAnswer(2, N_OUT).to_bytes(), bytes(8 * N_OUT - 1)),
        lambda link: link.send(AcceleratorAnswer(2, N_OUT).to_bytes()),
        lambda link: link.send(AcceleratorHello().to_bytes()),
        lambda link: link.send(bytes(96)),
        lambda link: None,
    ],
    ids=["size", "short", "header only", "kind", "garbage", "nothing"],
)
def test_an_answer_of_another_form_is_a_lost_helper(start, answer: Callable[[SealedLink], object]):
    helper = connect(start(answering(answer)))
    helper.load("q", weight(FAST))
    _, ranges = share((2, N_IN), FAST)
    with pytest.raises(AcceleratorLostError, match="pad helper"):
        helper.multiply("q", Direction.FORWARD, ranges, 2)
    helper.close()


def test_an_answer_that_does_not_come(start):
    done = threading.Event()
    helper = connect(start(answering(lambda _: done.wait(30))), timeouts=Timeouts(answer_s=0.1))
    helper.load("q", weight(FAST))
    _, ranges = share((2, N_IN), FAST)
    with pytest.raises(AcceleratorLostError, match="in time"):
        helper.multiply("q", Direction.FORWARD, ranges, 2)
    done.set()
    helper.close()


# --- what a client may send ------------------------------------------------------------------------------------------


@pytest.fixture
def ask(helper: RemotePadHelper) -> Callable[..., bytes]:
    """Sends a product as only a client out of order would, and returns the header of the answer."""
    helper.load("q", weight(FAST))
    link = helper._client._link
    assert link is not None

    def send(ranges: list[PadRange], *, n_ranges: int | None = None, layer: int = 0, n_in: int = N_IN) -> bytes:
        packed = b"".join(helper_module.RANGE.pack(part.key, part.first, part.n) for part in ranges)
        message = AcceleratorMultiply(layer, 0, 3, 2, n_in)
        count = len(ranges) if n_ranges is None else n_ranges
        link.send(message.to_bytes(), helper_module.N_RANGES.pack(count), packed)
        return link.receive()

    return send


GOOD = [PadRange(bytes(32), 0, 2 * N_IN)]


@pytest.mark.parametrize("options", [{"layer": 1}, {"n_in": N_IN + 1}], ids=["layer", "width"])
def test_a_product_of_no_layer_is_refused_and_the_next_one_served(ask, options: dict[str, int]):
    assert b"offload" in ask(GOOD, **options)
    assert AcceleratorAnswer.parse(ask(GOOD)).n_features == N_OUT


@pytest.mark.parametrize(
    "ranges",
    [
        [PadRange(bytes(32), 0, 2 * N_IN + 1)],
        [PadRange(bytes(32), 0, 2 * N_IN - 1)],
        [PadRange(bytes(32), BLOCK_POSITIONS - 1, 2 * N_IN)],
        [PadRange(bytes(32), 0, 2 * N_IN), PadRange(bytes(32), 0, 0)],
        [PadRange(bytes(32), 0, 2**32 - 1), PadRange(bytes(32), 0, 1)],
    ],
    ids=["long", "short", "beyond", "empty", "huge"],
)
def test_ranges_that_make_no_such_pad_end_the_connection(ask, ranges: list[PadRange]):
    assert b"wire.malformed" in ask(ranges)
    with pytest.raises(OSError):
        ask(GOOD)
        ask(GOOD)


@pytest.mark.parametrize("n_ranges", [0, 3, 2**32 - 1])
def test_a_count_of_ranges_that_cannot_be_ends_the_connection(ask, n_ranges: int):
    assert b"wire.malformed" in ask([], n_ranges=n_ranges)


def test_who_has_no_key_is_not_served_and_the_next_one_is(start, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    server = start()
    with socket.create_connection(server.listener.getsockname()) as stranger:
        stranger.sendall(os.urandom(200))
        stranger.settimeout(20)
        while True:
            try:
                if not stranger.recv(1 << 16):
                    break
            except ConnectionResetError:
                break
    helper = connect(server)
    helper.close()
    assert "ended: ConnectionAbortedError" in caplog.text


def test_the_log_holds_no_number(start, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    helper = connect(start())
    helper.load("q", weight(FAST))
    _, ranges = share((2, N_IN), FAST)
    helper.multiply("q", Direction.FORWARD, ranges, 2)
    with pytest.raises(OffloadError):
        helper.multiply("q", Direction.FORWARD, ranges, 100_000)
    helper.close()
    assert caplog.text
    for secret in (KEY, ranges[0].key):
        assert secret.hex() not in caplog.text and repr(secret)[2:-1] not in caplog.text


# --- where it is ------------------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that knows three hosts."""
    known = {"gpu-a": ["10.0.0.1", "fd00::1"], "alias-of-a": ["fd00::1"], "gpu-b": ["10.0.0.2"], "localhost": ["::1"]}

    def resolve(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host[0].isdigit():
            return [(0, 0, 0, "", (host, 0))]
        if host not in known:
            raise socket.gaierror
        return [(0, 0, 0, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(helper_module.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(helper_module, "_Client", lambda *_: "connected")


@pytest.mark.parametrize(
    "address, accelerator",
    [
        ("tcp://gpu-a:1", "tcp://gpu-a:1"),
        ("tcp://gpu-a:1", "tcp://gpu-a:2"),
        ("tcp://gpu-a:1", "tcp://alias-of-a:2"),
        ("tcp://10.0.0.1:1", "tcp://gpu-a:2"),
        ("tcp://unknown:1", "tcp://unknown:2"),
        ("tcp://127.0.0.1:1", "tcp://localhost:2"),
        ("tcp://127.0.0.2:1", "unix:/run/accelerator"),
        ("tcp://localhost:1", None),
        ("unix:/run/helper", "tcp://gpu-a:1"),
    ],
)
@pytest.mark.usefixtures("names")
def test_one_host_for_pads_and_masked_tensors_is_refused(address: str, accelerator: str | None):
    with pytest.raises(ConfigError):
        RemotePadHelper(address, KEY, accelerator=accelerator)


@pytest.mark.parametrize("accelerator", ["tcp://gpu-b:1", "unix:/run/accelerator", None, "tcp://unknown:1"])
@pytest.mark.usefixtures("names")
def test_two_hosts_are_accepted(accelerator: str | None):
    assert RemotePadHelper("tcp://gpu-a:1", KEY, accelerator=accelerator)._client == "connected"


@pytest.mark.usefixtures("names")
def test_one_listener_is_refused_even_in_a_test():
    with pytest.raises(ConfigError, match="accelerator's host"):
        RemotePadHelper("tcp://gpu-a:1", KEY, accelerator="tcp://gpu-a:1", insecure_same_host=True)
    RemotePadHelper("tcp://gpu-a:1", KEY, accelerator="tcp://gpu-a:2", insecure_same_host=True)


# --- the process ------------------------------------------------------------------------------------------------------


def test_it_serves_one_connection_after_another(monkeypatch: pytest.MonkeyPatch):
    class Stopped(Exception):
        pass

    lines: list[str] = []
    served: list[bytes] = []
    ready = threading.Event()

    def serve(connection: socket.socket, key: bytes, device: CpuDevice) -> None:
        connection.close()
        served.append(key)
        if len(served) == 2:
            raise Stopped

    def run() -> None:
        with pytest.raises(Stopped):
            serve_pad_helper("tcp://127.0.0.1:0", KEY, "cpu", on_ready=lambda line: lines.append(line) or ready.set())

    monkeypatch.setattr(server_module, "serve_pads", serve)
    monkeypatch.setattr(server_module, "drop_rights", lambda: lines.append("dropped"))
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(30)
    assert lines[0] == "dropped" and "pad helper, cpu" in lines[1]
    port = int(lines[1].split(": ")[0].rpartition(":")[2])
    for _ in range(2):
        socket.create_connection(("127.0.0.1", port)).close()
    thread.join(30)
    assert served == [KEY, KEY]


def test_it_listens_on_tcp_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "drop_rights", lambda: None)
    with pytest.raises(OffloadError, match="cannot listen") as caught:
        serve_pad_helper("unix:/no/such/folder/socket", KEY, "cpu", on_ready=print)
    assert caught.value.hint == "tcp://host:port"
