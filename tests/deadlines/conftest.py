"""Fixtures of the room."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import create_db_context, deadline
from pgtoolset.protocols import DatabaseContext


@pytest.fixture
async def session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """A factory of sessions whose engine is connected: a short deadline is not spent on that."""
    session_maker = async_sessionmaker(engine, expire_on_commit=False)
    with deadline(60):
        async with create_db_context(session_maker)() as session:
            await session.execute(text("SELECT 1"))
    return session_maker


@pytest.fixture
def db_context(session_maker: async_sessionmaker[AsyncSession]) -> DatabaseContext[AsyncSession]:
    return create_db_context(session_maker)
