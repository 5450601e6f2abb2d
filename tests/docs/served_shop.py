"""The example shop on a real socket, for the tests of its page that need no browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio
from examples.shop.app import create_app
from examples.shop.db import session_maker
from examples.shop.demo import own_schema
from examples.shop.page.live import Live
from examples.shop.serving import listen, serving
from examples.shop.settings import Settings
from fastapi import FastAPI

from tests.support import plain_url, until

#: The shop's engine is one of asyncpg, and neither a version nor a compiled module decides what
#: its page says.
ROOM = [
    pytest.mark.once,
    pytest.mark.asyncpg(reason="the shop's page"),
]

#: Seconds without a line, on a busy machine: an idle stream has a heartbeat before.
PATIENCE = 60


@dataclass(frozen=True)
class Shop:
    """A shop that is open."""

    app: FastAPI
    settings: Settings
    address: str


@dataclass(frozen=True)
class Served:
    """A shop that is open, a client of it, and a connection to its tables beside it."""

    app: FastAPI
    settings: Settings
    http: httpx.AsyncClient
    database: asyncpg.Connection

    @property
    def live(self) -> Live:
        live: Live = self.app.state.live
        return live

    @asynccontextmanager
    async def window(self) -> AsyncIterator[Window]:
        """A window that is open until the block ends."""
        async with self.http.stream("GET", "/live") as response:
            assert response.status_code == 200, await response.aread()
            yield Window(response.aiter_lines())

    async def case(self) -> dict[str, Any]:
        """An order that a customer of its own can make."""
        case = (await self.http.post("/cases")).json()
        lines = [{"sku": "cup", "quantity": 1}]
        return {"customer_id": case["customer_id"], "lines": lines, "voucher": case["voucher"]}

    async def evidence(self, order: dict[str, Any]) -> dict[str, int]:
        """What is left of a customer's orders."""
        response = await self.http.get(f"/cases/{order['customer_id']}")
        evidence: dict[str, int] = response.json()
        return evidence

    async def sessions(self, name: str) -> int:
        """How many sessions of that name PostgreSQL has, also asked within a transaction."""
        await self.database.execute("SELECT pg_stat_clear_snapshot()")
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
        return int(await self.database.fetchval(query, name))


class Window:
    """What a window has received: the latest of each section."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines
        self.sections: dict[str, Any] = {}

    async def until(self, section: str, holds: Any = lambda value: True) -> Any:
        """Read until a section is there and `holds` is true of it."""
        while section not in self.sections or not holds(self.sections[section]):
            await self._read()
        return self.sections[section]

    async def to_the_end(self) -> None:
        """Read until the server ends the stream; an error where it breaks it off."""
        try:
            while True:
                await self._read()
        except StopAsyncIteration:
            pass

    async def _read(self) -> None:
        async with asyncio.timeout(PATIENCE):
            line = await anext(self._lines)
        if line.startswith("event: "):
            data = await anext(self._lines)
            self.sections[line.removeprefix("event: ")] = json.loads(data.removeprefix("data: "))


@asynccontextmanager
async def opened(database_url: str) -> AsyncIterator[Shop]:
    """A shop in a schema of its own, until the block ends. Of two at once, the later one has the
    session maker."""
    settings = Settings.from_url(database_url)
    bind = session_maker.kw.get("bind")
    try:
        with listen("0") as listener:
            app = create_app(settings)
            async with own_schema(settings), serving(app, listener) as address:
                yield Shop(app, settings, address)
    finally:
        session_maker.configure(bind=bind)


@asynccontextmanager
async def visited(shop: Shop) -> AsyncIterator[Served]:
    """A client of the shop, and a connection beside it."""
    url = plain_url(shop.settings.url.render_as_string(hide_password=False))
    server_settings = shop.settings.server_settings(f"{shop.settings.schema}_tests")
    database = await asyncpg.connect(url, server_settings=server_settings)
    try:
        async with client(shop.address) as http:
            yield Served(shop.app, shop.settings, http, database)
    finally:
        await database.close()


def client(address: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=address, limits=limits, timeout=60, trust_env=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def open_shop(database_url: str) -> AsyncIterator[Shop]:
    async with opened(database_url) as shop:
        yield shop


@pytest.fixture
async def shop(open_shop: Shop) -> AsyncIterator[Served]:
    """The shop, which has all its connections again after the test."""
    async with visited(open_shop) as served:
        yield served
    pool = open_shop.app.state.engine.pool
    await until(lambda: served.live.windows == pool.checkedout() == 0)
