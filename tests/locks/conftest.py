"""Fixtures of the tests of locks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateSchema, DropSchema

from pgtoolset._postgres import lookout
from tests.locks.locking import SCHEMA, Base
from tests.support import plain_url


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error waits for the names of its blockers, however slow the machine is."""
    monkeypatch.setattr(lookout, "_GRACE", 20.0)
    monkeypatch.setattr(lookout, "_SHORT_GRACE", 20.0)


@pytest.fixture
async def onlooker(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that sees what happens while `other` is busy."""
    connection = await asyncpg.connect(plain_url(database_url))
    try:
        yield connection
    finally:
        await connection.close()


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
