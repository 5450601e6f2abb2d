"""The tour's means: a client of the shop, and a witness who asks PostgreSQL itself."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self
from uuid import uuid4

import httpx
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from examples.shop.console import NotProved
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
        async with httpx.AsyncClient(
            base_url=address, limits=limits, timeout=60, trust_env=False
        ) as http:
            yield cls(http)

    async def get(self, path: str, *, status: int = 200, **query: str | float) -> Any:
        """The JSON of a resource; any other status than `status` is a `NotProved`."""
        return self._json(await self.http.get(path, params=query), status)

    async def post(self, path: str, body: object, *, status: int = 201) -> Any:
        """The JSON of the answer; any other status than `status` is a `NotProved`."""
        return self._json(await self.http.post(path, json=body), status)

    async def lines(self, path: str, **query: str | float) -> list[str]:
        """The lines of a text, read to its end."""
        response = await self.http.get(path, params=query)
        return response.raise_for_status().text.splitlines()

    async def register(self, name: str) -> dict[str, Any]:
        """A new customer of that name."""
        customer: dict[str, Any] = await self.post(
            "/customers", {"name": name, "email": f"{name.lower()}-{uuid4().hex[:8]}@example.org"}
        )
        return customer

    async def stock(self, sku: str) -> int:
        product = await self.get(f"/products/{sku}")
        return int(product["stock"])

    async def mails_to(self, customer: dict[str, Any]) -> list[str]:
        """The subjects of the mails that a customer got."""
        return [
            mail["subject"] for mail in await self.get("/mails") if mail["to"] == customer["email"]
        ]

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


class Witness:
    """Connections to PostgreSQL that have nothing to do with the shop's pool."""

    def __init__(
        self, settings: Settings, engine: AsyncEngine, connection: AsyncConnection
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def of(cls, settings: Settings) -> AsyncIterator[Self]:
        """A witness whose every statement is a transaction of its own, so that it sees all that is
        committed."""
        engine = create_async_engine(
            settings.url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={
                "server_settings": settings.server_settings(f"{settings.application_name}_tour")
            },
        )
        async with engine.connect() as connection:
            yield cls(settings, engine, connection)

    async def value(self, query: str, **parameters: object) -> Any:
        """The one value of a query."""
        return await self._connection.scalar(text(query), parameters)

    async def orders_of(self, customer: dict[str, Any]) -> int:
        """How many orders of a customer are committed."""
        return int(
            await self.value(
                "SELECT count(*) FROM orders WHERE customer_id = :id", id=customer["id"]
            )
        )

    async def states(self) -> list[str]:
        """What the shop's connections are doing, one of pg_stat_activity's words for each."""
        return await self._shop_connections("state")

    async def watching(self) -> int:
        """How many connections the shop's watcher has."""
        name = self._settings.watcher_name
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = :name"
        return int(await self.value(query, name=name))

    async def send_orders_of(self, customer: dict[str, Any]) -> None:
        """Set the status of all orders of a customer, behind the back of the shop."""
        query = text("UPDATE orders SET status = 'sent' WHERE customer_id = :id")
        await self._connection.execute(query, {"id": customer["id"]})

    async def waiting_for_locks(self) -> int:
        """How many of the shop's connections wait for a lock."""
        return (await self._shop_connections("wait_event_type")).count("Lock")

    @asynccontextmanager
    async def holding(self, sku: str) -> AsyncIterator[None]:
        """Update a product and stay in the transaction: who wants to update it waits until the
        block ends."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="READ COMMITTED")
            async with connection.begin():
                await connection.execute(
                    text("UPDATE products SET stock = stock WHERE sku = :sku"), {"sku": sku}
                )
                yield

    @asynccontextmanager
    async def holding_till(self) -> AsyncIterator[int]:
        """Begin a sale and stay in the transaction; yields the pid of the connection."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="READ COMMITTED")
            async with connection.begin():
                pid = int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())
                await connection.execute(text("INSERT INTO till_sales (cents) VALUES (100)"))
                yield pid

    async def _shop_connections(self, column: str) -> list[str]:
        rows = await self._connection.scalars(
            text(
                f"SELECT coalesce({column}, '') FROM pg_stat_activity WHERE application_name = "
                ":name"
            ),
            {"name": self._settings.application_name},
        )
        return list(rows)
