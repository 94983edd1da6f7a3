"""The accelerator's process: what it gives up before it does anything, what it serves, and when it ends."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from cloister.offload._address import bound_address, connect, listen, parse_address

_DIAL_TIMEOUT_S, _DIAL_PAUSE_S = 10.0, 0.1
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION = 0x20080522  # linux/capability.h: _LINUX_CAPABILITY_VERSION_3, whose sets are two words each


def serve_accelerator(listen_at: str, device: str = "auto", *, on_ready: Callable[[str], None]) -> None:
    """Serve one connection after another, each with layers of its own, until interrupted; without rights of root.

    Args:
        listen_at: `unix:/path`, which only this user can connect to, or `tcp://host:port`, where whoever reaches it may
            use the device.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        on_ready: called once with a line that says where it listens, and with what.

    Raises:
        OffloadError: no such device, or the address cannot be had.
    """
    drop_rights()
    address = parse_address(listen_at)
    from cloister.offload._compute import open_device
    from cloister.offload._server import serve

    opened = open_device(device)
    with listen(address) as listener:
        try:
            on_ready(f"{bound_address(listener, address)}: {opened.name}, {opened.kernel}")
            serve(listener, opened)
        finally:
            address.remove()


def dial_accelerator(
    connect_to: str,
    device: str = "auto",
    *,
    on_ready: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Connect to an enclave that waits for its accelerator, serve it, and connect again, until interrupted.

    Args:
        connect_to: `unix:/path` or `tcp://host:port`, where the enclave listens; it may come later.
        device, on_ready: as of `serve_accelerator`.
        sleep: waits so many seconds between attempts.

    Raises:
        OffloadError: no such device, or it is no address.
    """
    drop_rights()
    address = parse_address(connect_to)
    from cloister.offload._compute import open_device
    from cloister.offload._server import serve_connection

    opened = open_device(device)
    on_ready(f"{address}: {opened.name}, {opened.kernel}")
    while True:
        try:
            connection = connect(address, _DIAL_TIMEOUT_S)
        except OSError:
            sleep(_DIAL_PAUSE_S)
            continue
        connection.settimeout(None)
        serve_connection(connection, opened)


def serve_inherited(fd: int, device: str) -> None:
    """Serve the one connection that this process was started with, and end with it or with who started it.

    Raises:
        OffloadError: no such device.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it, and hangs up
    drop_rights()
    _end_with_parent()
    from cloister.offload._compute import open_device
    from cloister.offload._server import serve_connection

    # First the device: should there be none, the connection ends with the process, after it has said so.
    opened = open_device(device)
    serve_connection(socket.socket(fileno=fd), opened)


def drop_rights() -> None:
    """Give up every capability, and the way to gain rights by running a program. Before there are other threads.

    The process holds nothing secret: this keeps a bug in a driver or a kernel from being one of the host. A user id of
    root remains, for the device's files. Best effort: where the system refuses, the process has what it had.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.capset(ctypes.byref(_Header(_CAPABILITY_VERSION, 0)), ctypes.byref((ctypes.c_uint32 * 6)()))


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _end_with_parent() -> None:
    """End when the process that started this one is gone, even while the device computes.

    PR_SET_PDEATHSIG would do so when the *thread* is gone that started it. Where the system does not allow to watch a
    process, this one ends with its connection, between products.
    """
    try:
        parent = os.pidfd_open(os.getppid())
    except OSError:
        return
    threading.Thread(target=_wait_and_end, args=(parent,), name="parent", daemon=True).start()


def _wait_and_end(parent: int) -> None:
    gone = select.poll()
    gone.register(parent, select.POLLIN)
    gone.poll()
    os._exit(0)
