"""The fixtures of the tests of Many-to-Many writes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.m2m import models


@pytest.fixture
async def tables(engine: AsyncEngine) -> AsyncIterator[None]:
    """The tables, empty before and after."""
    await models.create(engine)
    yield
    await models.empty(engine)


@pytest.fixture
async def session(engine: AsyncEngine, tables: None) -> AsyncIterator[AsyncSession]:
    """A session on the empty tables."""
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session
