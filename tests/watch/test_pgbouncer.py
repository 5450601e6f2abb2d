"""Watching through PgBouncer in transaction mode, where no two statements need to meet the same
backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import RowWatcher, row_change_trigger, wait_for_row_change
from tests.pgbouncer import BACKENDS, WITHOUT_CACHES, pgbouncer
from tests.support import Item

WAITERS = 10


@pytest.fixture
async def bouncing(engine: AsyncEngine, database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine as it has to be made for PgBouncer: without caches of statements, and each with a
    name of its own."""
    async with pgbouncer(database_url) as url:
        bouncing = create_async_engine(url, pool_size=2 * WAITERS, connect_args=WITHOUT_CACHES)
        try:
            yield bouncing
        finally:
            await bouncing.dispose()


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_watcher(
    bouncing: AsyncEngine, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """Notifications do not come through, which costs one interval: the waiters are served, and
    others are not hurt."""
    async with engine.begin() as connection:
        for ddl in row_change_trigger(Item):
            await connection.execute(ddl)
    try:
        await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, 10) AS n")
        async with RowWatcher(bouncing, interval=0.05, notify=True) as watcher:
            streams = [watcher.changes(Item, n) for n in range(1, WAITERS + 1)]
            for stream in streams:
                async with asyncio.timeout(30):
                    await stream.__aenter__()
            for name in ("paid", "sent", "received"):
                await other.execute("UPDATE item SET name = $1", name)
                async with asyncio.timeout(30):
                    for stream in streams:
                        change = await anext(stream)
                        assert change.after == {"id": change.pk, "name": name}
    finally:
        await other.execute("DROP TRIGGER pgtoolset_insert ON item")
        for event in ("update", "delete", "truncate"):
            await other.execute(f"DROP TRIGGER pgtoolset_{event} ON item")


async def test_wait_for_row_change(bouncing: AsyncEngine, other: asyncpg.Connection) -> None:
    """More waiters than backends, which other statements keep changing, are all served."""
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, 10) AS n")
    busy = True

    async def shuffle() -> None:
        while busy:
            async with bouncing.connect() as connection:
                await connection.execute(text("SELECT pg_sleep(0.001)"))

    async def wait(number: int) -> str:
        async with AsyncSession(bouncing) as session:
            options: Any = {"baseline": {"name": ""}, "interval": 0.01, "timeout": 60}
            return (await wait_for_row_change(session, Item, number, **options)).name

    shuffles = [asyncio.create_task(shuffle()) for _ in range(BACKENDS)]
    waits = [asyncio.create_task(wait(number)) for number in range(1, WAITERS + 1)]
    await asyncio.sleep(0.5)
    await other.execute("UPDATE item SET name = 'paid'")
    try:
        assert set(await asyncio.gather(*waits)) == {"paid"}
    finally:
        busy = False
        await asyncio.gather(*shuffles)
