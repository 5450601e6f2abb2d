"""One browser, and one shop in a schema of its own, for the tests of this room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg
import pytest_asyncio
from examples.shop.app import create_app
from examples.shop.browser import chromium
from examples.shop.demo import own_schema
from examples.shop.serving import listen, serving
from examples.shop.settings import Settings
from playwright.async_api import Browser

from tests.browser.windows import Windows
from tests.support import plain_url


@dataclass(frozen=True)
class Shop:
    """A shop that is open, and a connection to its tables beside it."""

    address: str
    settings: Settings
    database: asyncpg.Connection

    @staticmethod
    async def connected(settings: Settings, name: str) -> asyncpg.Connection:
        """A connection that the page takes for one of this shop."""
        url = settings.url.render_as_string(hide_password=False)
        return await asyncpg.connect(
            plain_url(url), server_settings=settings.server_settings(f"{settings.schema}_{name}")
        )


# Of the package, not of the session: other rooms look at every session of their server.
@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def shop(database_url: str) -> AsyncIterator[Shop]:
    settings = Settings.from_url(database_url)
    with listen("0") as listener:
        async with own_schema(settings), serving(create_app(settings), listener) as address:
            database = await Shop.connected(settings, "tests")
            try:
                yield Shop(address, settings, database)
            finally:
                await database.close()


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def _windows(browser: Browser, shop: Shop) -> AsyncIterator[Windows]:
    windows = Windows(browser, shop.address)
    try:
        yield windows
    finally:
        await windows.close()


@pytest_asyncio.fixture(loop_scope="session")
async def windows(_windows: Windows) -> AsyncIterator[Windows]:
    """Windows that are checked at the end of the test."""
    async with _windows.checked():
        yield _windows


@pytest_asyncio.fixture(loop_scope="session")
async def sale(shop: Shop) -> AsyncIterator[asyncpg.Connection]:
    """A connection that may hold a sale open; what it has not committed is rolled back."""
    connection = await Shop.connected(shop.settings, "till")
    try:
        yield connection
    finally:
        await connection.close()
