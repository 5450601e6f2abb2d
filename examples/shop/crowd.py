"""Clients that hang up: each sends one request over a socket of its own, and leaves before it has
the whole answer."""

import asyncio
import json

import httpx

from examples.shop.console import expect


class Caller:
    """One such client."""

    def __init__(self, url: httpx.URL, request: bytes) -> None:
        self._url = url
        self._request = request
        self._task: asyncio.Task[None] | None = None
        self.sent = False
        self.answer_began = False

    def call(self, group: asyncio.TaskGroup) -> None:
        """Start the request."""
        self._task = group.create_task(self._talk())

    async def hang_up(self) -> None:
        """Close the socket, wherever the request is now."""
        assert self._task is not None
        expect("the request is still under way", not self._task.done(), True)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _talk(self) -> None:
        reader, writer = await asyncio.open_connection(self._url.host, self._url.port)
        try:
            writer.write(self._request)
            await writer.drain()
            self.sent = True
            await reader.readexactly(1000)  # the headers, and a part of the body
            self.answer_began = True
            await asyncio.Event().wait()
        finally:
            writer.transport.abort()


class Crowd:
    """A number of callers that all want the same."""

    def __init__(
        self, size: int, base_url: httpx.URL, method: str, path: str, body: object = None
    ) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\n"
            f"Host: {base_url.netloc.decode()}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self._callers = [Caller(base_url, head.encode() + content) for _ in range(size)]

    def call(self, group: asyncio.TaskGroup) -> None:
        """Start all the requests."""
        for caller in self._callers:
            caller.call(group)

    async def hang_up(self) -> None:
        """Close all the sockets, at once as far as the server can tell."""
        await asyncio.gather(*(caller.hang_up() for caller in self._callers))

    async def sent(self) -> int:
        """How many have sent their request."""
        return sum(caller.sent for caller in self._callers)

    async def answered(self) -> int:
        """How many have received the beginning of an answer."""
        return sum(caller.answer_began for caller in self._callers)
