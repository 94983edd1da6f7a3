"""A relay without Flower: carries blobs between the host ports in one thread, and can misbehave on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cloister.enclave import host_call
from cloister.errors import CloisterError
from cloister.train import open_store

CALL_TIMEOUT_S = 60.0


class FakeRelay:
    """Stands in for `federation.Relay` in tests that are not about Flower. Same constructor, same four methods.

    Attributes:
        seen: every blob that was carried, as (client, direction, blob): what an untrusted relay could record.
        tamper: called with (client, direction, blob); returns the blob to deliver instead, or None to lose it.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        clients: Mapping[str, Any],
        server_socket: Path,
        tls: bool = True,
        host: str = "127.0.0.1",
        port: int | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        del run_dir, tls, host, port, on_event
        self._clients = clients
        self._server = server_socket
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.seen: list[tuple[str, str, bytes]] = []
        self.tamper: Callable[[str, str, bytes], bytes | None] = lambda _client, _direction, blob: blob

    def start(self) -> None:
        thread = threading.Thread(target=self._carry, name="fake-relay", daemon=True)
        thread.start()
        self._threads.append(thread)

    def poll(self) -> None:
        """Nothing to revive."""

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=0.5)  # one that waits for an answer ends with the process that it waits for

    def processes(self) -> dict[str, list[int]]:
        return {}

    def _carry(self) -> None:
        while not self._stop.is_set():
            try:
                asked = {"nodes": list(self._clients), "carrying": [thread.name for thread in self._threads]}
                answer = host_call(self._server, "poll", asked, timeout_s=5.0)
            except CloisterError:
                time.sleep(0.05)  # it is not up yet, or died in the middle of its answer
                continue
            store = open_store(answer["store"], **answer["store_options"])
            for name in answer["fetch"]:
                store.fetch(name, Path(answer["inbox"]) / name)
            for send in answer["send"]:
                thread = threading.Thread(target=self._deliver, args=(send,), name=send["client"], daemon=True)
                thread.start()
                self._threads.append(thread)
            self._stop.wait(0.02)
            self._threads = [thread for thread in self._threads if thread.is_alive()]

    def _deliver(self, send: Mapping[str, Any]) -> None:
        client = send["client"]
        try:
            blob = self._pass(client, "down", send["blob"])
            socket_path = self._clients[client].socket_path
            answer = None
            if blob is not None:
                reply = host_call(socket_path, "request", {"blob": blob}, timeout_s=CALL_TIMEOUT_S)
                answer = self._pass(client, "up", reply["blob"])
        except CloisterError:
            time.sleep(0.05)
            answer = None
        try:
            host_call(
                self._server, "deliver", {"client": client, "attempt": 0, "blob": answer}, timeout_s=CALL_TIMEOUT_S
            )
        except CloisterError:
            return  # the enclave is down; the next courier call finds out

    def _pass(self, client: str, direction: str, blob: bytes) -> bytes | None:
        self.seen.append((client, direction, blob))
        return self.tamper(client, direction, blob)
