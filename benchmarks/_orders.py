"""Orders that are watched: their table, and those who wait for a change of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks._harness import engines, tables
from pgtoolset import RowWatcher
from pgtoolset.events import Event, WatcherLooked
from pgtoolset.observe import subscribe

INTERVAL = 0.5
ROWS = 50_000

#: Looks of a watcher after which it has nothing to do but to look.
LOOKS = 3


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "pgtoolset_benchmark_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]


#: Changes one row.
CHANGE = f"UPDATE {Order.__tablename__} SET status = status || '!' WHERE id = $1"


@asynccontextmanager
async def orders(url: str) -> AsyncIterator[AsyncEngine]:
    """The table with its rows, and an engine."""
    async with engines(url, 1) as (engine,), tables(engine, Base.metadata):
        async with engine.begin() as connection:
            series = f"SELECT n, 'new' FROM generate_series(1, {ROWS}) AS n"
            await connection.execute(text(f"INSERT INTO {Order.__tablename__} {series}"))
            await connection.execute(text(f"ANALYZE {Order.__tablename__}"))
        await engine.dispose()  # a connection that is counted is the watcher's
        yield engine


@asynccontextmanager
async def waiting(
    engine: AsyncEngine, watcher: RowWatcher, count: int
) -> AsyncIterator[list[asyncio.Task[float]]]:
    """So many waiters on rows of their own, which wait and do nothing else any more; each gives the
    time of its return.

    A row that has changed before its waiter's first look is a change as well, however late a
    loaded machine makes that look.
    """

    async def wait(key: int) -> float:
        await watcher.wait(Order, key, columns=[Order.status], baseline={"status": "new"})
        return time.perf_counter()

    tasks: list[asyncio.Task[float]] = []
    try:
        async with served(engine, count):
            tasks += [asyncio.create_task(wait(key)) for key in range(1, count + 1)]
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def served(engine: AsyncEngine, count: int) -> AsyncIterator[None]:
    """Leave the block once a watcher has looked for all its waiters, and again.

    Its first look fetches all rows and its second takes the first snapshot, so that the third is
    the first that finds nothing to do.
    """
    looks, are_over = 0, asyncio.Event()

    def looked(event: Event) -> None:
        nonlocal looks
        if isinstance(event, WatcherLooked) and event.waiters >= count and not event.failed:
            looks += 1
            if looks == LOOKS:
                are_over.set()

    unsubscribe = subscribe(engine, looked)
    try:
        yield
        await are_over.wait()
    finally:
        unsubscribe()
