"""`advisory_lock`: one at a time, and pending changes are flushed under the lock."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import asyncpg
import pytest
from fastapi import Depends, FastAPI
from httpx import ASGITransport, AsyncClient
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import (
    LockTimeoutError,
    advisory_lock,
    create_db_context,
    create_db_dependency,
    get_transaction,
    lock_tables,
)
from tests.locks.locking import TAKE, holding, nothing_left, settings_of, waiting
from tests.support import Account, Item, insert, stored

Maker = async_sessionmaker[AsyncSession]


async def test_only_one_at_a_time(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Of many read-modify-writes at a time, each waits for the one before."""
    async with session_maker() as session, session.begin():
        await insert(session, 1)

    async def increment_alone() -> None:
        async with session_maker() as session, advisory_lock(session, "counter"):
            await increment(session)

    await asyncio.gather(*(increment_alone() for _ in range(20)))
    assert await other.fetchval("SELECT name FROM item WHERE id = 1") == "20"


async def test_only_one_at_a_time_nested(session_maker: Maker, other: asyncpg.Connection) -> None:
    """In a transaction that goes on after the block, no increment is lost either."""
    db_context = create_db_context(session_maker)
    async with db_context() as session:
        await insert(session, 1)

    async def increment_nested() -> None:
        async with db_context() as session:
            async with get_transaction(session):
                async with advisory_lock(session, "counter"):
                    await increment(session)
            # The work is not committed yet: whoever had the lock now would read the old number.
            await session.execute(text("SELECT pg_sleep(0.005)"))

    await asyncio.gather(*(increment_nested() for _ in range(20)))
    assert await other.fetchval("SELECT name FROM item WHERE id = 1") == "20"


async def test_only_one_at_a_time_in_endpoints(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Of concurrent requests with `Depends(get_db)`, each sees what the one before has written."""
    get_db = create_db_dependency(session_maker=session_maker)
    needs_db = Depends(get_db)
    app = FastAPI()

    @app.post("/")
    async def add_one(session: AsyncSession = needs_db) -> None:
        async with advisory_lock(session, "counter"):
            item = await session.get_one(Item, 1)
            item.name = str(int(item.name) + 1)

    await other.execute("INSERT INTO item (id, name) VALUES (1, '0')")
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        responses = await asyncio.gather(*(client.post("/") for _ in range(10)))
    assert {response.status_code for response in responses} == {200}
    assert await other.fetchval("SELECT name FROM item WHERE id = 1") == "10"
    await nothing_left(other)


async def increment(session: AsyncSession) -> None:
    """Read a number and write the next one, without a lock on the row in between."""
    number = int(await session.scalar(text("SELECT '0' || name FROM item WHERE id = 1")) or 0)
    await session.execute(
        text("UPDATE item SET name = :name WHERE id = 1"), {"name": str(number + 1)}
    )


@pytest.mark.parametrize("kind", ["advisory", "tables"])
async def test_pending_changes_are_flushed_under_the_lock(
    session_maker: Maker, other: asyncpg.Connection, onlooker: asyncpg.Connection, kind: str
) -> None:
    """While a nested block waits, no row of its pending changes is locked; then they are stored."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, 'old')")

    async def work() -> None:
        async with session_maker() as session, get_transaction(session):
            item = await session.get_one(Item, 1)
            item.name = "new"
            session.add(Item(id=2))
            block: AbstractAsyncContextManager[Any] = (
                advisory_lock(session, 42)
                if kind == "advisory"
                else lock_tables(session, [Account], mode="EXCLUSIVE")
            )
            async with block:
                assert await session.scalar(text("SELECT name FROM item WHERE id = 1")) == "new"

    async with holding(other, f"{TAKE}; LOCK TABLE account"):
        task = asyncio.create_task(work())
        await waiting(onlooker)
        await onlooker.execute("SELECT FROM item WHERE id = 1 FOR UPDATE NOWAIT")
    await task
    assert await stored(other) == {1, 2}


@pytest.mark.parametrize("pending", [False, True])
async def test_timeout_with_pending_changes(
    session_maker: Maker, other: asyncpg.Connection, pending: bool
) -> None:
    """After a timeout the changes are pending as before, and the transaction stores them."""
    async with holding(other, TAKE), session_maker() as session, get_transaction(session):
        await insert(session, 1)
        if pending:
            session.add(Item(id=2))
        with pytest.raises(LockTimeoutError):
            async with advisory_lock(session, 42, timeout=0.05):
                pass
        assert bool(session.new) == pending
        assert await settings_of(session) == "0"
    assert await stored(other) == ({1, 2} if pending else {1})


async def test_pending_changes_are_not_the_blocks(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Changes that were pending before the block survive its rollback."""
    async with session_maker() as session:
        session.add(Item(id=1))
        with pytest.raises(KeyError):
            async with advisory_lock(session, 42):
                session.add(Item(id=2))
                raise KeyError
        await session.commit()
    assert await stored(other) == {1}
