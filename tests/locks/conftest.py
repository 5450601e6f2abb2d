"""Fixtures of the tests of locks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateSchema, DropSchema

from tests.locks.locking import SCHEMA, Base


@pytest.fixture
async def odd_tables(engine: AsyncEngine) -> AsyncIterator[None]:
    """The tables of `locking`, for one test."""
    async with engine.begin() as connection:
        await connection.execute(CreateSchema(SCHEMA))
        await connection.run_sync(Base.metadata.create_all)
    yield
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.execute(DropSchema(SCHEMA, cascade=True))
