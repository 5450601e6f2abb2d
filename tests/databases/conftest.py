"""Databases that a test makes, and an empty one for each test of `cleanup_tables`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tests.databases.making import PREFIX
from tests.support import plain_url


@pytest.fixture
def url(empty_database: str) -> str:
    """A database that is made for the test."""
    return empty_database


@pytest.fixture
async def own(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await engine.dispose()


@pytest.fixture
async def sql(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that has nothing to do with the engine."""
    connection = await asyncpg.connect(
        plain_url(url), server_settings={"application_name": "who forgot"}
    )
    yield connection
    await connection.close()


@pytest.fixture
async def session(own: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(own, expire_on_commit=False) as session:
        yield session


@pytest.fixture
async def databases_gone(other: asyncpg.Connection) -> AsyncIterator[None]:
    """Drop each database that a test has created under the prefix."""
    yield
    for name in await other.fetch(
        "SELECT datname FROM pg_database WHERE starts_with(datname, $1)", PREFIX
    ):
        await other.execute('DROP DATABASE "{}" WITH (FORCE)'.format(name[0].replace('"', '""')))


@pytest.fixture
def connect_to(server_url: str) -> Callable[..., Any]:
    """Connects to a database of any name."""

    async def connect(name: str, **settings: str) -> asyncpg.Connection:
        return await asyncpg.connect(plain_url(server_url), database=name, server_settings=settings)

    return connect
