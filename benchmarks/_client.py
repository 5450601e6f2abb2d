"""An HTTP client that costs next to nothing: one fixed request, sent again as soon as its answer is
complete.

httpx takes longer for a request than the server under test, and on a machine with few processors it
would take the server's time.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass(slots=True)
class Load:
    """What a number of connections got done."""

    answers: int = 0
    seconds: float = 0.0
    bodies: list[bytes] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.answers / self.seconds


class _Connection(asyncio.Protocol):
    """Sends one request at a time. An answer other than 2xx, or a closed connection, ends it with
    an error."""

    def __init__(self) -> None:
        self.transport: Any = None
        self._received = b""
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        if self.transport.is_closing():
            raise ConnectionError("the server has closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or length is None or len(body) < int(length[1]) or self._answer is None:
            return
        self._received = b""
        if self._answer.done():  # cancelled meanwhile
            return
        if head[9:10] == b"2":
            self._answer.set_result(body)
        else:
            self._answer.set_exception(
                RuntimeError(f"answered {head[9:12].decode()}: {body[:500]!r}")
            )

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("the server closed the connection"))


class Client:
    """Keep-alive connections to one server."""

    def __init__(self, connections: list[_Connection], port: int) -> None:
        self._connections = connections
        self._port = port

    @classmethod
    async def connect(cls, port: int, connections: int) -> Client:
        loop = asyncio.get_running_loop()
        made = [
            await loop.create_connection(_Connection, "127.0.0.1", port) for _ in range(connections)
        ]
        return cls([protocol for _, protocol in made], port)

    async def ask(self, path: str) -> Any:
        """One request on one connection, and the object that was answered."""
        return json.loads(await self._connections[0].ask(self._request(path)))

    async def load(self, path: str, *, seconds: float) -> Load:
        """Keep every connection busy until the time is over, then wait for the answers that are on
        their way."""
        request = self._request(path)
        load = Load()
        start = time.perf_counter()
        end = start + seconds

        async def keep_busy(connection: _Connection) -> None:
            while time.perf_counter() < end:
                await connection.ask(request)
                load.answers += 1

        await asyncio.gather(*(keep_busy(connection) for connection in self._connections))
        load.seconds = time.perf_counter() - start
        return load

    def close(self) -> None:
        for connection in self._connections:
            connection.transport.close()

    def _request(self, path: str) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\n"
        return f"{head}content-length: 0\r\n\r\n".encode()
