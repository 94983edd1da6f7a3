"""The accelerator's process from inside: what it gives up, what it serves, how it says what is wrong, when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.cli import main as cloister
from cloister.errors import OffloadError
from cloister.offload import __main__ as command
from cloister.offload import _process, _server
from cloister.offload._compute import CpuDevice


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The main functions set handlers for their process."""
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In what order a process gives up rights and serves; both are replaced."""
    found: list[str] = []

    def serve(listener: socket.socket, device: CpuDevice) -> None:
        found.append(f"serve {listener.family.name}")
        raise KeyboardInterrupt

    def serve_connection(connection: socket.socket, device: CpuDevice) -> None:
        found.append("serve connection")
        connection.close()

    monkeypatch.setattr(_process, "drop_rights", lambda: found.append("drop"))
    monkeypatch.setattr(_process, "_end_with_parent", lambda: found.append("parent"))
    monkeypatch.setattr(_server, "serve", serve)
    monkeypatch.setattr(_server, "serve_connection", serve_connection)
    return found


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "a.sock"


def test_serves_at_a_path(calls: list[str], path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--listen", f"unix:{path}", "--device", "cpu"]) == 0
    assert calls == ["drop", "serve AF_UNIX"]
    assert capsys.readouterr().err.startswith(f"unix:{path}: cpu, ")
    assert not path.exists()


def test_serves_at_a_port(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--listen", "tcp://127.0.0.1:0", "--device", "cpu"]) == 0
    assert calls == ["drop", "serve AF_INET"]
    line = capsys.readouterr().err
    assert line.startswith("tcp://127.0.0.1:") and ":0:" not in line


def test_serves_the_connection_that_it_was_started_with(calls: list[str]) -> None:
    ours, theirs = socket.socketpair()
    assert command.main(["--listen", f"fd:{theirs.detach()}", "--device", "cpu"]) == 0
    assert calls == ["drop", "parent", "serve connection"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert ours.recv(1) == b""
    ours.close()


def test_dials_until_the_enclave_listens_and_again_after_it(
    calls: list[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be started before the enclave, and outlives a connection."""
    listeners: list[socket.socket] = []

    def sleep(seconds: float) -> None:
        assert 0 < seconds < 1
        calls.append("sleep")
        if calls.count("sleep") == 2:
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[0].bind(str(path))
            listeners[0].listen()

    def serve_connection(connection: socket.socket, device: CpuDevice) -> None:
        assert connection.gettimeout() is None
        connection.close()
        calls.append("serve connection")
        if calls.count("serve connection") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_server, "serve_connection", serve_connection)
    with pytest.raises(KeyboardInterrupt):
        _process.dial_accelerator(f"unix:{path}", "cpu", on_ready=calls.append, sleep=sleep)
    listeners[0].close()
    ready = calls.pop(1)
    assert ready.startswith(f"unix:{path}: cpu, ")
    assert calls == ["drop", "sleep", "sleep", "serve connection", "serve connection"]


@pytest.mark.parametrize("listen", ["fd:x", "nowhere", "unix:{}/no/folder"])
def test_says_what_is_wrong(listen: str, calls: list[str], path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listen = listen.format(path.parent)
    assert command.main(["--listen", listen, "--device", "cpu"]) == OffloadError.exit_code
    assert capsys.readouterr().err.startswith("error: ")
    assert calls == ["drop"]


def test_sigterm_ends_it_in_order() -> None:
    with pytest.raises(SystemExit) as caught:
        command._stop(signal.SIGTERM, None)
    assert caught.value.code == 0


def test_the_command(calls: list[str], path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloister(["accelerator", "--listen", f"unix:{path}", "--device", "cpu"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"unix:{path}: cpu, ") and "Ctrl-C stops it." in err
    assert calls == ["drop", "serve AF_UNIX"]


def test_the_command_that_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.offload.serve_accelerator", lambda *_, **__: None)
    assert cloister(["accelerator", "--listen", "unix:/x"]) == 0


def test_the_command_refuses_another_address(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cloister(["accelerator", "--listen", "http://x"]) == OffloadError.exit_code
    assert "hint: unix:/path" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cloister(["accelerator", "--help"])
    text = capsys.readouterr().out
    assert "cloister accelerator --listen tcp://" in text and "otp-2" in text


def test_rights_are_given_up() -> None:
    """In a thread: the kernel keeps them for each."""
    found: list[str] = []

    def run() -> None:
        _process.drop_rights()
        found.extend(Path("/proc/thread-self/status").read_text().splitlines())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert {"CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"} <= set(found)


def test_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getppid", lambda: parent.pid)
    _process._end_with_parent()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "parent"]
    thread.join(timeout=0.2)
    assert thread.is_alive() and ended == []
    parent.kill()
    thread.join(timeout=10)
    assert not thread.is_alive() and ended == [0]
    parent.communicate()


def test_a_system_that_lets_nobody_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    _process._end_with_parent()
    assert [thread for thread in threading.enumerate() if thread.name == "parent"] == []
