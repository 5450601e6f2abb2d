"""The network between the programs of the cluster: links that can be cut, and ports."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

HOST = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, outside of those that the kernel gives to clients.

    A port of the kernel's own range could be a client's by the time its program starts again.
    """
    try:
        limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        last = int(limits[0]) - 1
    except OSError:
        last = 32767
    found: list[int] = []
    while len(found) < count:
        port = random.randint(10_000, last)  # two runs that start together choose others
        with socket.socket() as tried, suppress(OSError):
            tried.bind((HOST, port))
            if port not in found:
                found.append(port)
    return found


class Link:
    """The way to one port, which everyone takes and which can be cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepts = True

    @property
    def port(self) -> int:
        """The port to connect to."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["Link"]:
        """Forward connections while the block runs."""
        self._server = await asyncio.start_server(self._accept, HOST, free_ports(1)[0])
        try:
            yield self
        finally:
            self._server.close()
            self.drop()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End every connection, and accept none until `mend`."""
        self._accepts = False
        self.drop()

    def mend(self) -> None:
        """Accept connections again."""
        self._accepts = True

    def drop(self) -> None:
        """End every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(HOST, self._target)
        except OSError:
            writer.transport.abort()
            return
        if not self._accepts:
            back.transport.abort()
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        self._pipe(reader, back)
        self._pipe(there, writer)

    def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(source, sink))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                sink.write(chunk)
                await sink.drain()
        sink.close()
        self._writers.discard(sink)
