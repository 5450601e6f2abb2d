"""What a connection that is given back is worth. Run as `python -m benchmarks.connections`.

- 60 requests on a pool of 5, each with a read, 200 ms outside of the database and another read: the
connection held against `release_connection` around the wait;
- a read, `release_connection` and another read, without a wait, against the two reads with a commit
between them by hand: what it costs;
- COPY of 100,000 rows through `driver_connection` against raw asyncpg in a transaction.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import asyncpg
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import create_db_context, driver_connection, release_connection

REQUESTS = 60
POOL = 5
OUTSIDE = 0.2
TURNS = 50
ROWS = [(number, f"row {number}") for number in range(100_000)]
TABLE = "pgtoolset_benchmark_copy"
SELECT = text("SELECT 1")


async def requests(engine: AsyncEngine, *, gives_back: bool) -> float:
    """Seconds for all requests."""
    db_context = create_db_context(async_sessionmaker(engine))

    async def request() -> None:
        async with db_context() as session:
            await session.execute(SELECT)
            async with release_connection(session) if gives_back else nullcontext():
                await asyncio.sleep(OUTSIDE)
            await session.execute(SELECT)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(REQUESTS):
            group.create_task(request())
    return time.perf_counter() - start


async def turns(engine: AsyncEngine, between: Callable[[AsyncSession], Awaitable[None]]) -> float:
    """Seconds for one turn."""
    db_context = create_db_context(async_sessionmaker(engine))
    start = time.perf_counter()
    for _ in range(TURNS):
        async with db_context() as session:
            await session.execute(SELECT)
            await between(session)
            await session.execute(SELECT)
    return (time.perf_counter() - start) / TURNS


async def given_back(session: AsyncSession) -> None:
    async with release_connection(session):
        pass


async def committed(session: AsyncSession) -> None:
    await session.commit()


async def copy_ours(engine: AsyncEngine) -> float:
    """Rows in a second."""
    start = time.perf_counter()
    async with create_db_context(async_sessionmaker(engine))() as session:
        async with driver_connection(session) as connection:
            assert isinstance(connection, asyncpg.Connection)
            await connection.copy_records_to_table(TABLE, records=ROWS)
    seconds = time.perf_counter() - start
    await empty(engine)
    return len(ROWS) / seconds


async def copy_raw(engine: AsyncEngine, raw: Any) -> float:
    """Rows in a second."""
    start = time.perf_counter()
    async with raw.transaction():
        await raw.copy_records_to_table(TABLE, records=ROWS)
    seconds = time.perf_counter() - start
    await empty(engine)
    return len(ROWS) / seconds


async def empty(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(f"TRUNCATE {TABLE}"))


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url() as url:
        engine = create_async_engine(url, pool_size=POOL, max_overflow=0, pool_timeout=60)
        plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        raw = await asyncpg.connect(plain)
        try:
            async with engine.begin() as connection:
                await connection.execute(text(f"DROP TABLE IF EXISTS {TABLE}"))
                await connection.execute(text(f"CREATE TABLE {TABLE} (id int, name text)"))
            await measure(engine, raw, rounds)
            async with engine.begin() as connection:
                await connection.execute(text(f"DROP TABLE {TABLE}"))
        finally:
            await raw.close()
            await engine.dispose()


async def measure(engine: AsyncEngine, raw: Any, rounds: int) -> None:
    headline(f"{REQUESTS} requests, a pool of {POOL}, {OUTSIDE * 1000:.0f} ms outside")
    results = await alternate(
        {
            "held": lambda: requests(engine, gives_back=False),
            "given back": lambda: requests(engine, gives_back=True),
        },
        rounds=max(3, rounds // 10),
        warm_up=1,
    )
    tell(
        "held / given back",
        Spread.of_ratios(results["held"], results["given back"]),
        ("at least", 5.0),
    )
    print(
        f"    held {Spread.of(results['held']).median:.2f} s, given back"
        f" {Spread.of(results['given back']).median:.2f} s"
    )
    headline("Without a wait, and COPY")
    figures = await alternate(
        {
            "given back": lambda: turns(engine, given_back),
            "committed": lambda: turns(engine, committed),
            "ours": lambda: copy_ours(engine),
            "raw": lambda: copy_raw(engine, raw),
        },
        rounds=rounds,
    )
    tell(
        "release_connection between two reads / commit() by hand",
        Spread.of_ratios(figures["given back"], figures["committed"]),
    )
    tell(
        "COPY of 100,000 rows, rows a second / raw asyncpg",
        Spread.of_ratios(figures["ours"], figures["raw"]),
        ("at least", 0.95),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.connections", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
