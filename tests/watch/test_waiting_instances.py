"""The instance that `wait_for_row_change` returns: that of the session, with its pending work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import WaitTimeoutError, get_transaction, wait_for_row_change
from pgtoolset.testing.contracts import MappedRows
from tests.support import Item


@pytest.fixture
def rows(session_maker: async_sessionmaker[AsyncSession]) -> MappedRows:
    return MappedRows(session_maker, Item, value="name")


async def during(session: AsyncSession, change: Callable[[], Awaitable[Any]]) -> Item:
    """Return what a wait for item 1 gives that has looked at it before the change."""
    looked = asyncio.Event()

    def is_changed(row: Item) -> bool:
        looked.set()
        return row.name != "one"

    task = asyncio.create_task(
        wait_for_row_change(session, Item, 1, interval=0.02, timeout=10, until=is_changed)
    )
    await asyncio.wait_for(looked.wait(), 10)
    await change()
    return await task


async def test_the_instance_of_the_session(rows: MappedRows) -> None:
    """The row is returned as the session's own instance, with the new values."""
    await rows.insert(1)
    async with rows.session() as session:
        row = await session.get(Item, 1)
        await session.commit()
        assert await during(session, lambda: rows.update(1, "two")) is row
        assert row.name == "two"


async def test_an_instance_as_baseline(rows: MappedRows) -> None:
    """A change since an instance was loaded is returned at once, and without one it is a
    timeout."""
    await rows.insert(1)
    async with rows.session() as session:
        row = await session.get(Item, 1)
        await session.commit()
        await rows.update(1, "two")
        wait = wait_for_row_change
        same = await wait(session, Item, 1, columns=[Item.name], baseline=row, timeout=0)
        assert same is row
        assert row.name == "two"
        with pytest.raises(WaitTimeoutError):
            await wait(session, Item, 1, baseline={"name": "two"}, timeout=0)


async def test_what_another_session_has_flushed(rows: MappedRows) -> None:
    """A flush of another session is not a change, and neither is its rollback."""
    await rows.insert(1)
    async with rows.session() as session, rows.session() as other:
        row = await other.get(Item, 1)
        row.name = "two"
        await other.flush()
        for _ in ("flushed", "rolled back"):
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(
                    session, Item, 1, interval=0.02, timeout=0.1, baseline={"name": "one"}
                )
            await other.rollback()


async def test_pending_changes_are_kept(rows: MappedRows) -> None:
    """The caller's transaction stays open, and an attribute with pending changes keeps them."""
    await rows.insert(1)
    async with rows.session() as session:
        async with get_transaction(session):
            await rows.write(session, 2)
            row = await session.get(Item, 1)
            row.name = "three"
            assert await during(session, lambda: rows.update(1, "two")) is row
            assert row.name == "three"
            assert await rows.stored() == {1}
    assert await rows.value_of(1) == "three"
