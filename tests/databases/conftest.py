"""A database of its own for each test of `cleanup_tables`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset.testing import create_worker_database
from tests.support import plain_url


@pytest.fixture
async def url(server_url: str) -> AsyncIterator[str]:
    """A database of the test's own."""
    async with create_worker_database(server_url, prefix="pgtoolset cleanup") as url:
        yield url


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
