"""Locks through PgBouncer in transaction mode: the process ids are those of the backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import LockTimeoutError, advisory_lock, get_transaction, lock_rows, lock_tables
from tests.locks.locking import holding, nothing_left, pid_of
from tests.pgbouncer import WITHOUT_CACHES, pgbouncer
from tests.support import Account, Item

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture(params=["without caches", "with caches"])
async def bouncing(
    engine: AsyncEngine, database_url: str, other: asyncpg.Connection, request: Any
) -> AsyncIterator[AsyncEngine]:
    """An engine behind PgBouncer, which may keep the client's prepared statements."""
    await other.execute("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    arguments: dict[str, Any] = WITHOUT_CACHES if request.param == "without caches" else {}
    async with pgbouncer(database_url) as url:
        bouncing = create_async_engine(url, connect_args=arguments)
        try:
            yield bouncing
        finally:
            await bouncing.dispose()


async def take(session: AsyncSession, kind: str, **arguments: Any) -> None:
    if kind == "rows":
        await lock_rows(session, Account, [1], **arguments)
    elif kind == "advisory":
        async with advisory_lock(session, 42, **arguments):
            pass
    else:
        async with lock_tables(session, [Item], mode="EXCLUSIVE", **arguments):
            pass


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ"])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("rows", {"timeout": 0.5}),
        ("rows", {"nowait": True}),
        ("advisory", {"timeout": 0.5}),
        ("tables", {"timeout": 0.5}),
        ("tables", {"nowait": True}),
    ],
)
async def test_blockers(
    bouncing: AsyncEngine,
    other: asyncpg.Connection,
    kind: str,
    arguments: dict[str, Any],
    isolation_level: Any,
) -> None:
    """The error names the holder and not the caller itself, whose own locks it knows."""
    both = "LOCK TABLE item IN SHARE MODE; SELECT pg_advisory_xact_lock(42); SELECT FROM account"
    async with holding(other, f"{both} WHERE id = 1 FOR UPDATE") as pid:
        async with (
            AsyncSession(bouncing) as session,
            get_transaction(session, isolation_level=isolation_level),
        ):
            # Held by this very session, and in conflict with what it wants.
            async with lock_tables(session, [Item], mode="SHARE", nowait=True):
                own = await pid_of(session)
            with pytest.raises(LockTimeoutError) as caught:
                await take(session, kind, **arguments)
            assert [blocker.pid for blocker in caught.value.blockers] == [pid], own
    await nothing_left(other)


@pytest.mark.parametrize("bouncing", ["without caches"], indirect=True)
async def test_nothing_is_left(bouncing: AsyncEngine, other: asyncpg.Connection) -> None:
    """After many locks, timeouts and cancellations, pg_locks is empty."""

    async def work(number: int) -> None:
        async with AsyncSession(bouncing) as session:
            kind = ("rows", "advisory", "tables")[number % 3]
            await take(session, kind, timeout="20s" if number % 5 else "1ms")

    tasks = [asyncio.create_task(work(number)) for number in range(60)]
    for task in tasks[7::11]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        expected = LockTimeoutError | asyncio.CancelledError
        assert result is None or isinstance(result, expected), result
    await nothing_left(other)
