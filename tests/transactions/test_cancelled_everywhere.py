"""A cancellation at every suspension of a block, the commit included.

Afterwards the pool is whole and the session is closed. A block that ended normally is committed,
one that raised is not. A cancellation that arrives during the COMMIT is delivered afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    create_db_context,
    create_db_dependency,
    get_transaction,
    on_commit,
    run_transaction,
)
from tests.support import DRIVER, Item, insert, interrupt_everywhere, stored, until

Maker = async_sessionmaker[AsyncSession]
Block = Callable[[Maker, int, list[AsyncSession]], Coroutine[Any, Any, None]]


async def in_context(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    async with create_db_context(maker)() as session:
        sessions.append(session)
        await insert(session, n)
        await session.execute(text("SELECT pg_sleep(0.002)"))


async def in_context_by_flush(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    async with create_db_context(maker)() as session:
        sessions.append(session)
        session.add(Item(id=n))


async def in_dependency(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    async with asynccontextmanager(create_db_dependency(maker))() as session:
        sessions.append(session)
        await insert(session, n)


async def in_transaction(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    session = maker()
    sessions.append(session)
    async with get_transaction(session):
        await insert(session, n)


async def in_serializable_transaction(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    session = maker()
    sessions.append(session)
    async with get_transaction(session, isolation_level="SERIALIZABLE", read_only=False):
        await insert(session, n)


async def in_nested_transaction(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    async with create_db_context(maker)() as session:
        sessions.append(session)
        async with get_transaction(session):
            await insert(session, n)
        try:
            async with get_transaction(session):
                await insert(session, -n)
                raise KeyError
        except KeyError:
            pass


async def in_explicit_commit(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    async with create_db_context(maker)() as session:
        sessions.append(session)
        await insert(session, n)
        await session.commit()


async def in_run_transaction(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    async def work(session: AsyncSession) -> None:
        sessions.append(session)
        await insert(session, n)

    await run_transaction(maker, work)


async def with_callback(maker: Maker, n: int, sessions: list[AsyncSession]) -> None:
    async def callback() -> None:
        await asyncio.sleep(0)

    async with create_db_context(maker)() as session:
        sessions.append(session)
        await insert(session, n)
        on_commit(session, callback)


BLOCKS = [
    in_context,
    in_context_by_flush,
    in_dependency,
    in_transaction,
    in_serializable_transaction,
    in_nested_transaction,
    in_explicit_commit,
    in_run_transaction,
    with_callback,
]


#: Whether there is a connection in the pool; "busy": there is one, and psycopg suspends at each
#: call, as it does in an event loop that it finds busy.
POOLS = ["cold", "warm", *(["busy"] if DRIVER == "psycopg" else [])]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pool", POOLS)
async def test_reported_and_stored_agree(
    engine: AsyncEngine,
    session_maker: Maker,
    other: asyncpg.Connection,
    block: Block,
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cancelled at any suspension, with and without a connection in the pool: see the module."""
    if pool == "busy":
        monkeypatch.setattr(psycopg.waiting, "MAX_BUSY_TIME", -1.0, raising=False)
    checked_out: Any = engine.pool
    reported: dict[int, str] = {}
    sessions: list[AsyncSession] = []

    async def work(n: int) -> None:
        if pool == "cold":
            await engine.dispose()
        try:
            await block(session_maker, n, sessions)
        except asyncio.CancelledError:
            reported[n] = "cancelled"
            raise
        reported[n] = "committed"
        await asyncio.sleep(0.05)
        reported[n] = "committed, not cancelled"

    async def check(n: int) -> None:
        assert checked_out.checkedout() == 0, f"a connection is lost at suspension {n}"
        for session in sessions:
            assert not session.in_transaction(), f"a session stays open at suspension {n}"
        sessions.clear()
        seen = await stored(other)
        assert -n not in seen
        assert (n in seen) == reported.get(n, "cancelled").startswith("committed"), (
            f"at suspension {n}: {reported.get(n)}"
        )
        async with create_db_context(session_maker)() as session:
            assert await session.scalar(text("SELECT 1")) == 1

    suspensions = await interrupt_everywhere(work, check)
    assert suspensions >= 3
    outcomes = set(reported.values())
    # The commit was reached, a cancellation in the middle of it was survived, and it was delivered
    # afterwards.
    assert outcomes == {"cancelled", "committed", "committed, not cancelled"}


async def test_timeout_in_the_commit(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A timeout that expires during the COMMIT breaks neither the block nor the code after it."""
    await other.execute(
        """
        CREATE OR REPLACE FUNCTION blocked() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER blocked AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION blocked();
        SELECT pg_advisory_lock(4711);
        """
    )

    async def commit_waits() -> bool:
        return bool(
            await other.fetchval(
                "SELECT count(*) FROM pg_locks"
                " WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"
            )
        )

    async def expire_in_the_commit(limit: asyncio.Timeout) -> None:
        await until(commit_waits)
        limit.reschedule(0)
        await until(lambda: task.cancelling() > 0)
        await other.execute("SELECT pg_advisory_unlock(4711)")

    task = asyncio.current_task()
    assert task is not None
    try:
        async with asyncio.TaskGroup() as group:
            async with asyncio.timeout(None) as limit:
                group.create_task(expire_in_the_commit(limit))
                async with create_db_context(session_maker)() as session:
                    await insert(session, 1)
            assert limit.expired()
            await asyncio.sleep(0.01)
        assert await stored(other) == {1}
    finally:
        await other.execute("SELECT pg_advisory_unlock_all(); DROP FUNCTION blocked CASCADE")
