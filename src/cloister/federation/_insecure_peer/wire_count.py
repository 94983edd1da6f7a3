"""A proxy that counts what the peer's sockets carry."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

HOST = "127.0.0.1"


@dataclass
class CountingProxy:
    """Passes bytes on in both directions and counts them."""

    target: tuple[str, int]
    address: str = ""
    n_bytes: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self.target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                self.n_bytes += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()


@contextlib.contextmanager
def counting_proxy(address: str) -> Iterator[CountingProxy]:
    """Listens on a free port of the loopback, in a thread, and passes everything on to `address`."""
    host, _, port = address.rpartition(":")
    proxy = CountingProxy((host, int(port)))
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.serve, HOST, 0))
    proxy.address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="counting-proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
