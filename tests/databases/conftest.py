"""An empty database for each test of `cleanup_tables`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

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
