"""Row-level security: an error never claims a deletion that it cannot know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import RowDeletedError, RowNotFoundError, wait_for_row_change
from tests.support import Item, connect_args, roles, until
from tests.watch.crowd import Polls


@pytest.fixture
async def limited(
    engine: AsyncEngine, other: asyncpg.Connection, database_url: str
) -> AsyncIterator[AsyncEngine]:
    """An engine whose role sees the items that are not hidden."""
    arguments = connect_args(role="limited one")
    limited = create_async_engine(database_url, connect_args=arguments)
    async with roles(database_url, "limited one"):
        await other.execute(
            """GRANT SELECT, UPDATE, DELETE ON item TO "limited one";
               INSERT INTO item VALUES (1, 'seen');
               ALTER TABLE item ENABLE ROW LEVEL SECURITY;
               CREATE POLICY visible ON item USING (name <> 'hidden')"""
        )
        try:
            yield limited
        finally:
            await limited.dispose()
            await other.execute(
                "DROP POLICY visible ON item; ALTER TABLE item DISABLE ROW LEVEL SECURITY"
            )


async def test_a_row_that_becomes_hidden(limited: AsyncEngine, other: asyncpg.Connection) -> None:
    """A row that is hidden is not reported as deleted; the error names the role and the table."""
    polls = Polls(limited)
    async with AsyncSession(limited) as session:
        wait = asyncio.create_task(wait_for_row_change(session, Item, 1, interval=0.01))
        await until(lambda: len(polls.sizes) >= 2)
        await other.execute("UPDATE item SET name = 'hidden'")
        with pytest.raises(RowNotFoundError, match="row-level security hides it") as caught:
            await wait
    assert not isinstance(caught.value, RowDeletedError)
    assert "role limited one on item" in str(caught.value)


async def test_a_row_that_is_hidden(limited: AsyncEngine, other: asyncpg.Connection) -> None:
    """The same for a row that was hidden from the beginning, with a baseline and without."""
    await other.execute("UPDATE item SET name = 'hidden'")
    for options in ({}, {"baseline": {"name": "seen"}}, {"until": lambda item: True}):
        given: dict[str, Any] = dict(options)
        async with AsyncSession(limited) as session:
            with pytest.raises(RowNotFoundError, match="or row-level security") as caught:
                await wait_for_row_change(session, Item, 1, timeout=30, **given)
        assert not isinstance(caught.value, RowDeletedError)


async def test_hidden_from_the_transaction(engine: AsyncEngine, limited: AsyncEngine) -> None:
    """The same where only the session's own transaction cannot see it any more."""
    async with AsyncSession(limited) as session:
        await session.execute(text("SELECT 1"))
        await session.execute(text("UPDATE item SET name = 'seen too'"))
        await session.execute(text("DELETE FROM item"))
        with pytest.raises(RowNotFoundError, match="or row-level security"):
            await wait_for_row_change(session, Item, 1, until=lambda item: True)


async def test_a_role_that_sees_everything(
    limited: AsyncEngine, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """Security that is not active for the role leaves a deletion what it is."""
    await other.execute("DELETE FROM item")
    async with AsyncSession(engine) as session:
        with pytest.raises(RowDeletedError, match="was deleted"):
            await wait_for_row_change(session, Item, 1, baseline={"name": "seen"})


async def test_without_security(limited: AsyncEngine, other: asyncpg.Connection) -> None:
    """Without security on the table a deletion is one."""
    await other.execute("DELETE FROM item")
    await other.execute("ALTER TABLE item DISABLE ROW LEVEL SECURITY")
    async with AsyncSession(limited) as session:
        with pytest.raises(RowDeletedError, match="was deleted"):
            await wait_for_row_change(session, Item, 1, baseline={"name": "seen"})
