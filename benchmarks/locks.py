"""What `lock_tables` costs beside the bare statements. Run as `python -m benchmarks.locks`.

Each contestant works in a transaction that is open already, on a warm connection, with the locks
free, and rolls back to a savepoint after each turn where the lock would otherwise be held already.
So every one of them is timed inside a savepoint, which `lock_tables` makes anyway:

- one table: `lock_tables` against `begin_nested()` with `SET LOCAL lock_timeout` and `LOCK TABLE`;
- ten tables: `lock_tables` against `begin_nested()` with two round trips, `SET LOCAL` and one LOCK
of all ten;
- the lookout for blockers, while the lock is free: `lock_tables` with a timeout against
`timeout=None`, which has none.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from sqlalchemy import Column, Integer, MetaData, Table, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import lock_tables

metadata = MetaData()
TABLES = [
    Table(f"pgtoolset_benchmark_lock_{number}", metadata, Column("id", Integer))
    for number in range(10)
]
TURNS = 20

Turn: TypeAlias = Callable[[AsyncSession], Awaitable[None]]


class Undo(Exception):
    """Ends a turn, and its locks with it."""


def ours(tables: Sequence[Table], timeout: Any = "5s") -> Turn:
    async def turn(session: AsyncSession) -> None:
        async with lock_tables(session, tables, mode="EXCLUSIVE", timeout=timeout):
            raise Undo

    return turn


def bare(tables: Sequence[Table]) -> Turn:
    limit = text("SET LOCAL lock_timeout = '5s'")
    lock = text(f"LOCK TABLE {', '.join(table.name for table in tables)} IN EXCLUSIVE MODE")

    async def turn(session: AsyncSession) -> None:
        async with session.begin_nested():
            await session.execute(limit)
            await session.execute(lock)
            raise Undo

    return turn


async def timed(engine: AsyncEngine, turn: Turn) -> float:
    """Seconds for one turn; the first is not measured."""
    async with AsyncSession(engine) as session:
        await session.begin()
        start = 0.0
        for number in range(TURNS + 1):
            if number == 1:
                start = time.perf_counter()
            try:
                await turn(session)
            except Undo:
                pass
        seconds = (time.perf_counter() - start) / TURNS
        await session.rollback()
    return seconds


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url() as url:
        our_engine, their_engine = create_async_engine(url), create_async_engine(url)
        try:
            async with our_engine.begin() as connection:
                await connection.run_sync(metadata.drop_all)
                await connection.run_sync(metadata.create_all)
            headline("lock_tables / SET LOCAL lock_timeout and LOCK TABLE, the locks free")
            turns: dict[str, Callable[[], Awaitable[float]]] = {
                "one": lambda: timed(our_engine, ours(TABLES[:1])),
                "one, bare": lambda: timed(their_engine, bare(TABLES[:1])),
                "one, bare again": lambda: timed(their_engine, bare(TABLES[:1])),
                "ten": lambda: timed(our_engine, ours(TABLES)),
                "ten, bare": lambda: timed(their_engine, bare(TABLES)),
                "no lookout": lambda: timed(our_engine, ours(TABLES[:1], None)),
            }
            results = await alternate(turns, rounds=rounds, warm_up=5)

            def ratio(one: str, other: str) -> Spread:
                return Spread.of_ratios(results[one], results[other])

            tell("one table", ratio("one", "one, bare"), ("at most", 1.10))
            tell("one table, control", ratio("one, bare again", "one, bare"))
            tell("ten tables / two round trips", ratio("ten", "ten, bare"), ("at most", 1.0))
            tell(
                "with a timeout / without, one table", ratio("one", "no lookout"), ("at most", 1.05)
            )
            print(f"    bare, one table: {Spread.of(results['one, bare']).median * 1e6:.0f} us")
            async with our_engine.begin() as connection:
                await connection.run_sync(metadata.drop_all)
        finally:
            await our_engine.dispose()
            await their_engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.locks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
