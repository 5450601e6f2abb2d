"""The tour's means: a client of the shop, clients that hang up, and a witness who asks PostgreSQL itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from examples.shop.console import NotProved, expect
from examples.shop.settings import Settings


class Shop:
    """The shop over HTTP."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    @classmethod
    @asynccontextmanager
    async def at(cls, address: str) -> AsyncIterator[Self]:
        """A client without limits of its own: 200 requests at once are 200 requests at once."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60, trust_env=False) as http:
            yield cls(http)

    async def get(self, path: str, *, status: int = 200, **query: str | float) -> Any:
        """The JSON of a resource; any other status than `status` is a `NotProved`."""
        return self._json(await self.http.get(path, params=query), status)

    async def post(self, path: str, body: object, *, status: int = 201) -> Any:
        """The JSON of the answer; any other status than `status` is a `NotProved`."""
        return self._json(await self.http.post(path, json=body), status)

    async def stock(self, sku: str) -> int:
        product = await self.get(f"/products/{sku}")
        return int(product["stock"])

    async def mails_to(self, customer: dict[str, Any]) -> list[str]:
        """The subjects of the mails that a customer got."""
        return [mail["subject"] for mail in await self.get("/mails") if mail["to"] == customer["email"]]

    async def checked_out(self) -> int:
        """How many connections of the application's pool are in use."""
        pool = await self.get("/pool")
        return int(pool["checked_out"])

    @staticmethod
    def _json(response: httpx.Response, status: int) -> Any:
        if response.status_code != status:
            what = f"{response.request.method} {response.request.url.path}"
            raise NotProved(what, expected=status, seen=f"{response.status_code} {response.text}")
        return response.json()


@dataclass
class Session:
    """What pg_stat_activity tells of a connection of the shop."""

    state: str
    waits_for_lock: bool


class Witness:
    """Connections to PostgreSQL that have nothing to do with the shop's pool."""

    def __init__(self, settings: Settings, engine: AsyncEngine, connection: AsyncConnection) -> None:
        self._settings = settings
        self._engine = engine
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def of(cls, settings: Settings) -> AsyncIterator[Self]:
        """A witness whose every statement is a transaction of its own, so that it sees all that is committed."""
        engine = create_async_engine(
            settings.url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"server_settings": settings.server_settings(f"{settings.application_name}_tour")},
        )
        async with engine.connect() as connection:
            yield cls(settings, engine, connection)

    async def value(self, query: str, **parameters: object) -> Any:
        """The one value of a query."""
        return await self._connection.scalar(text(query), parameters)

    async def sessions(self) -> list[Session]:
        """The shop's connections, as PostgreSQL sees them."""
        rows = await self._connection.execute(
            text("SELECT state, wait_event_type FROM pg_stat_activity WHERE application_name = :name"),
            {"name": self._settings.application_name},
        )
        return [Session(state or "starting", wait_event_type == "Lock") for state, wait_event_type in rows]

    async def waiting_for_locks(self) -> int:
        return sum(session.waits_for_lock for session in await self.sessions())

    @asynccontextmanager
    async def holding(self, sku: str) -> AsyncIterator[None]:
        """Update a product and stay in the transaction: who wants to update it waits until the block ends."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="READ COMMITTED")
            async with connection.begin():
                await connection.execute(text("UPDATE products SET stock = stock WHERE sku = :sku"), {"sku": sku})
                yield


@dataclass
class Caller:
    """One request on a socket of its own, of a client that hangs up before it has the whole answer."""

    host: str
    port: int
    method: str
    path: str
    body: object = None
    sent: bool = False
    answer_began: bool = False
    _task: "asyncio.Task[None] | None" = field(default=None, repr=False)

    def call(self) -> None:
        """Start the request."""
        self._task = asyncio.create_task(self._talk())

    async def hang_up(self) -> None:
        """Close the socket, wherever the request is now; `NotProved` where the answer was complete already."""
        assert self._task is not None
        expect(f"{self.method} {self.path} to be unanswered", self._task.done(), False)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _talk(self) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            content = b"" if self.body is None else json.dumps(self.body).encode()
            head = [
                f"{self.method} {self.path} HTTP/1.1",
                f"Host: {self.host}:{self.port}",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
            ]
            writer.write("\r\n".join([*head, "", ""]).encode() + content)
            await writer.drain()
            self.sent = True
            await reader.readexactly(1000)
            self.answer_began = True
            await asyncio.Event().wait()
        finally:
            writer.transport.abort()
