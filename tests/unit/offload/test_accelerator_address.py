"""Addresses of an accelerator, and sockets that listen at them."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from cloister.errors import OffloadError
from cloister.offload._address import Address, bound_address, connect, listen, parse_address


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "a.sock"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a.sock", Address(path="/run/a.sock")),
        ("unix:a.sock", Address(path="a.sock")),
        ("tcp://gpu-1.example:7070", Address(host="gpu-1.example", port=7070)),
        ("tcp://10.0.0.5:1", Address(host="10.0.0.5", port=1)),
        ("tcp://[::1]:65535", Address(host="::1", port=65535)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "unix:" + "x" * 108, "/run/a.sock", "tcp://", "tcp://host", "tcp://host:", "tcp://host:65536",
     "tcp://host:1/", "tcp://::1:7", "tcp://[::1]", "tcp://a:b:1", "http://host:1", "tcp://host:-1", "fd:3"],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    with pytest.raises(OffloadError, match="is no address") as caught:
        parse_address(text)
    assert "tcp://host:port" in caught.value.hint


def test_a_path_for_this_user_only(path: Path) -> None:
    address = Address(path=str(path))
    with listen(address) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert bound_address(listener, address) == address
        connect(address, 5).close()
        with pytest.raises(OffloadError, match="another process listens"):
            listen(address)
    with pytest.raises(ConnectionRefusedError):
        connect(address, 5)
    listen(address).close()  # in place of the stale one
    address.remove()
    assert not path.exists()
    address.remove()


def test_something_else_at_the_path(path: Path) -> None:
    path.write_text("a file")
    with pytest.raises(OffloadError, match="in the way"):
        listen(Address(path=str(path)))
    assert path.read_text() == "a file"


def test_a_folder_that_is_not_there(path: Path) -> None:
    with pytest.raises(OffloadError, match=r"cannot listen on unix:.*No such file"):
        listen(Address(path=str(path / "nowhere")))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ports(host: str) -> None:
    address = Address(host=host)
    with listen(address) as listener:
        bound = bound_address(listener, address)
        assert bound.host == host and bound.port > 0
        connection = connect(bound, 5)
        assert connection.family == (socket.AF_INET6 if ":" in host else socket.AF_INET)
        connection.close()
        with pytest.raises(OffloadError, match="cannot listen on tcp://"):
            listen(bound)
    bound.remove()  # there is no file
    with pytest.raises(ConnectionRefusedError):
        connect(bound, 5)
