"""The instances that `lock_rows` returns: those of the session, with its pending changes."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import lock_rows
from pgtoolset.testing.contracts import MappedRows
from tests.support import Item


@pytest.fixture
def rows(session_maker: async_sessionmaker[AsyncSession]) -> MappedRows:
    return MappedRows(session_maker, Item, value="name")


async def test_an_instance_that_is_loaded(rows: MappedRows) -> None:
    """An instance that the session has is returned, with the values that the holder committed."""
    await rows.insert(1)
    async with rows.session() as holder, rows.session() as session:
        row = await session.get(Item, 1)
        await session.commit()
        [mine] = await lock_rows(holder, Item, [1])
        mine.name = "two"
        task = asyncio.create_task(lock_rows(session, Item, [1]))
        await asyncio.sleep(0.1)
        assert not task.done()
        await holder.commit()
        [same] = await task
        assert same is row
        assert same.name == "two"


async def test_pending_changes_are_kept(rows: MappedRows) -> None:
    """A change that the session has not flushed is flushed first, and not overwritten."""
    await rows.insert(1)
    async with rows.session() as session:
        row = await session.get(Item, 1)
        row.name = "three"
        [same] = await lock_rows(session, Item, [1])
        assert same is row
        assert row.name == "three"
        await session.commit()
    assert await rows.value_of(1) == "three"


async def test_a_row_that_is_changed_under_its_lock(rows: MappedRows) -> None:
    """A writer waits for the lock, and then changes the row that the holder has left."""
    await rows.insert(1)
    async with rows.session() as session:
        [row] = await lock_rows(session, Item, [1])
        task = asyncio.create_task(rows.update(1, "three"))
        await asyncio.sleep(0.1)
        assert not task.done()
        row.name = "two"
        await session.commit()
        await task
    assert await rows.value_of(1) == "three"
