"""A network between a client and PostgreSQL that can be cut, slowed down and frozen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sqlalchemy import make_url


class Proxy:
    """Forwards TCP connections on the loopback interface to the server of a URL.

    Attributes:
        refusing: new connections are closed at once.
        frozen: nothing is forwarded and nothing closed, as where a machine has vanished: a
            half-open connection.
        delay: seconds before each chunk is forwarded.
    """

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.refusing = False
        self.frozen = False
        self.delay = 0.0
        self.accepted = 0

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

    def drop(self) -> None:
        """Cut every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        if self.refusing:
            writer.transport.abort()
            return
        host = self._url.query.get("host") or self._url.host
        assert isinstance(host, str)
        try:
            if host.startswith("/"):
                upstream = await asyncio.open_unix_connection(
                    f"{host}/.s.PGSQL.{self._url.port or 5432}"
                )
            else:
                upstream = await asyncio.open_connection(host, self._url.port or 5432)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(upstream[1])
        for source, sink in ((reader, upstream[1]), (upstream[0], writer)):
            task = asyncio.create_task(self._forward(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.frozen:
                    await asyncio.Event().wait()  # this connection is never heard of again
                sink.write(chunk)
                await sink.drain()
        sink.transport.abort()
