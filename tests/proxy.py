"""A network between a client and PostgreSQL that can be cut, slowed down and frozen."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sqlalchemy import make_url

Direction: TypeAlias = Literal["to server", "to client"]

#: How a connection ends at a chunk: reset or closed before it, closed after its first half, reset
#: for the client after the whole of it, or silent from then on, without an end.
How: TypeAlias = Literal["RST", "FIN", "half", "whole", "silence"]


@dataclass(frozen=True)
class Cut:
    """Ends the connection at the first chunk for which `at` returns `True`.

    Attributes:
        times: how many connections it ends.
        meanwhile: what happens in the place of the cut, before each of them ends.
    """

    direction: Direction
    at: Callable[[bytes], bool]
    how: How
    times: int = 1
    meanwhile: Callable[[], Awaitable[None]] | None = None


class Proxy:
    """Forwards TCP connections on the loopback interface to the server of a URL.

    Attributes:
        refusing: new connections are closed at once.
        frozen: nothing is forwarded and nothing closed, as where a machine has vanished: a
            half-open connection.
        delay: seconds before each chunk is forwarded.
        cut: where the next connections end; `None` afterwards.
        counts: the number of chunks in each direction.
    """

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.refusing = False
        self.frozen = False
        self.delay = 0.0
        self.accepted = 0
        self.cut: Cut | None = None
        self.counts: dict[Direction, int] = {"to server": 0, "to client": 0}

    @classmethod
    @asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator[Proxy]:
        proxy = cls(url)
        proxy._server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
        try:
            yield proxy
        finally:
            proxy._server.close()
            proxy.drop()
            for task in proxy._tasks:
                task.cancel()
            await asyncio.gather(*proxy._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        url = self._url.set(host="127.0.0.1", port=port, query={})
        return url.render_as_string(hide_password=False)

    def cut_at_chunk(self, direction: Direction, number: int, how: How) -> None:
        """Cut at the `number`-th chunk from now in one direction."""
        last = self.counts[direction] + number
        self.cut = Cut(direction, lambda _: self.counts[direction] >= last, how)

    def cut_at_commit(
        self,
        how: How,
        direction: Direction = "to client",
        *,
        times: int = 1,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Cut at the next COMMIT, or at the answer to it."""
        # The message of the client, and the command tag of the server.
        self.cut = Cut(direction, lambda chunk: b"COMMIT" in chunk, how, times, meanwhile)

    def drop(self) -> None:
        """Cut every connection."""
        for writer in self._writers:
            writer.transport.abort()

    def drop_clients(self) -> None:
        """Cut every connection towards the client; the server does not hear of it."""
        for writer in self._clients:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        self._clients.add(writer)
        if self.refusing:
            writer.transport.abort()
            return
        host = self._url.query.get("host") or self._url.host
        assert isinstance(host, str)
        port = int(str(self._url.query.get("port") or self._url.port or 5432))
        try:
            if host.startswith("/"):
                upstream = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            else:
                upstream = await asyncio.open_connection(host, port)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(upstream[1])
        pipes: list[tuple[Direction, asyncio.StreamReader, asyncio.StreamWriter]] = [
            ("to server", reader, upstream[1]),
            ("to client", upstream[0], writer),
        ]
        for direction, source, sink in pipes:
            task = asyncio.create_task(
                self._forward(source, sink, direction, (writer, upstream[1]))
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        direction: Direction,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.frozen:
                    await asyncio.Event().wait()  # this connection is never heard of again
                self.counts[direction] += 1
                if self.cut is not None and self.cut.direction == direction and self.cut.at(chunk):
                    cut = self.cut
                    self.cut = replace(cut, times=cut.times - 1) if cut.times > 1 else None
                    await self._end(cut, chunk, sink, ends)
                    return
                sink.write(chunk)
                await sink.drain()
        sink.transport.abort()

    async def _end(
        self,
        cut: Cut,
        chunk: bytes,
        sink: asyncio.StreamWriter,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        if cut.how == "silence":
            await asyncio.Event().wait()
        if cut.how in ("half", "whole"):
            sink.write(chunk if cut.how == "whole" else chunk[: len(chunk) // 2])
            await sink.drain()
        if cut.how == "whole":
            ends[0].transport.abort()  # the client does not see the answer
        if cut.meanwhile is not None:
            await cut.meanwhile()
        for end in ends:
            if cut.how == "RST":
                # Closing a socket without lingering sends RST in place of FIN.
                linger = struct.pack("ii", 1, 0)
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                end.transport.abort()
            else:
                end.close()
