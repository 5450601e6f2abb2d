"""An engine at the address of a pair of servers, with either driver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from tests.cluster.moved.moving import POOL
from tests.nodes import Nodes


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return f"postgresql+{request.param}"


@pytest.fixture
async def engine(nodes: Nodes, driver: str) -> AsyncIterator[AsyncEngine]:
    """An engine at the address of the pair."""
    engine = create_async_engine(nodes.address(driver=driver), pool_size=POOL, max_overflow=0)
    pool: Any = engine.pool
    try:
        yield engine
        assert pool.checkedout() == 0, "the test left a connection checked out"
    finally:
        await engine.dispose()


@pytest.fixture
def maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)
