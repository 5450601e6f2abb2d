"""What a connection that is given back is worth. Run as `python -m benchmarks.connections`.

- 60 requests on a pool of 5, each with a read, 200 ms outside of the database and another read: the
  connection held against `release_connection` around the wait;
- a read, `release_connection` and another read, without a wait, against the two reads with a commit
  between them by hand: what it costs;
- COPY of 100,000 rows through `driver_connection` against raw asyncpg in a transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import TypeAlias

import asyncpg
from sqlalchemy import Column, Integer, MetaData, Table, Text, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from benchmarks._declared import Benchmark, Experiment, Measure, at_least
from benchmarks._harness import Figures, Turn, clocked, engines, plain, tables, timed
from benchmarks._run import alone
from pgtoolset import create_db_context, driver_connection, release_connection

REQUESTS = 60
POOL = 5
OUTSIDE = 0.2
Rows: TypeAlias = list[tuple[int, str]]

ROWS: Rows = [(number, f"row {number}") for number in range(100_000)]
SELECT = text("SELECT 1")

metadata = MetaData()
TABLE = Table("pgtoolset_benchmark_copy", metadata, Column("id", Integer), Column("name", Text))


async def requests(engine: AsyncEngine, *, gives_back: bool) -> Figures:
    """The time of all requests."""
    db_context = create_db_context(async_sessionmaker(engine))

    async def request() -> None:
        async with db_context() as session:
            await session.execute(SELECT)
            async with release_connection(session) if gives_back else nullcontext():
                await asyncio.sleep(OUTSIDE)
            await session.execute(SELECT)

    with clocked() as figures:
        async with asyncio.TaskGroup() as group:
            for _ in range(REQUESTS):
                group.create_task(request())
    return figures


async def reads(engine: AsyncEngine, between: Callable[[AsyncSession], Awaitable[None]]) -> Figures:
    """The time of two reads and what stands between them."""
    db_context = create_db_context(async_sessionmaker(engine))

    async def unit() -> None:
        async with db_context() as session:
            await session.execute(SELECT)
            await between(session)
            await session.execute(SELECT)

    return await timed(unit)


async def given_back(session: AsyncSession) -> None:
    async with release_connection(session):
        pass


async def committed(session: AsyncSession) -> None:
    await session.commit()


async def copied(engine: AsyncEngine, copy: Callable[[Rows], Awaitable[None]]) -> Figures:
    """The time of COPY in a transaction, after one of a single row that finds the caches cold."""
    await copy(ROWS[:1])
    with clocked() as figures:
        await copy(ROWS)
    await empty(engine)
    return figures


async def empty(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(f"TRUNCATE {TABLE.name}"))


@asynccontextmanager
async def waits(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with engines(url, 1, pool_size=POOL, max_overflow=0, pool_timeout=60) as (engine,):
        yield {
            "held": partial(requests, engine, gives_back=False),
            "given back": partial(requests, engine, gives_back=True),
        }


@asynccontextmanager
async def no_waits(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with engines(url, 1, pool_size=POOL, max_overflow=0) as (engine,):
        yield {
            "given back": partial(reads, engine, given_back),
            "committed": partial(reads, engine, committed),
        }


@asynccontextmanager
async def copies(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with (
        engines(url, 1, pool_size=POOL, max_overflow=0) as (engine,),
        tables(engine, metadata),
        AsyncExitStack() as stack,
    ):
        raw = await asyncpg.connect(plain(url))
        stack.push_async_callback(raw.close)
        db_context = create_db_context(async_sessionmaker(engine))

        async def ours(rows: Rows) -> None:
            async with db_context() as session, driver_connection(session) as connection:
                assert isinstance(connection, asyncpg.Connection)
                await connection.copy_records_to_table(TABLE.name, records=rows)

        async def theirs(rows: Rows) -> None:
            async with raw.transaction():
                await raw.copy_records_to_table(TABLE.name, records=rows)

        yield {
            "ours": partial(copied, engine, ours),
            "raw": partial(copied, engine, theirs),
            "raw again": partial(copied, engine, theirs),
        }


BENCHMARK = Benchmark(
    title="Connections",
    about="Connections that are given back while a request waits for something else, and COPY.",
    experiments=(
        Experiment(
            f"{REQUESTS} requests with {OUTSIDE * 1000:.0f} ms outside, on a pool of {POOL}",
            waits,
            (
                Measure(
                    "held",
                    "all requests, each holds its connection",
                    "given back",
                    "`release_connection` around the wait",
                    "held",
                    inverse=True,
                    target=at_least(5.0),
                ),
            ),
            seconds=8,
            warm_up=1,
        ),
        Experiment(
            "Without a wait",
            no_waits,
            (
                Measure(
                    "released",
                    "`release_connection` between two reads",
                    "given back",
                    "`commit()` by hand",
                    "committed",
                ),
            ),
            seconds=5,
        ),
        Experiment(
            "COPY of 100,000 rows",
            copies,
            (
                Measure(
                    "copy",
                    "rows a second, through `driver_connection`",
                    "ours",
                    "raw asyncpg",
                    "raw",
                    inverse=True,
                    target=at_least(0.95),
                ),
                Measure(
                    "copy-control",
                    "control: rows a second, raw asyncpg",
                    "raw again",
                    "itself",
                    "raw",
                    inverse=True,
                ),
            ),
            seconds=15,
        ),
    ),
)

if __name__ == "__main__":
    alone("connections")
