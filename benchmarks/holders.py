"""What it costs to know who holds the connections of a pool. Run as `python -m benchmarks.holders`.

One SELECT in `db_context()`, on engines in alternation: one whose holders are noted, one whose idle
transactions are reported too, and one whose pool and statements are left as SQLAlchemy made them.
The last one takes part twice: the distance of its ratio from 1 says how far the others can be
trusted.

Compared are blocks per second of one task, and CPU time of this process per block: the backend does
the same for all.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import create_db_context, holders, warn_of_idle_transactions
from pgtoolset._postgres import statements
from pgtoolset._postgres.holders import _KEY, Holders, IdleLimit

SELECT = text("SELECT 1")

#: Blocks of one contestant in one round.
BLOCKS = 20

NOTED, REPORTED, ALONE, CONTROL = "noted", "idle reported", "left alone", "left alone once more"


def leave_alone(engine: AsyncEngine) -> None:
    """Have the library believe that it notes the holders and the statements of an engine."""
    vars(engine.sync_engine.pool)[_KEY] = Holders(IdleLimit())
    vars(engine.dialect)[statements._KEY] = {}


async def check(engine: AsyncEngine, count: int) -> None:
    """Prove that the holders of an engine are noted, or are not."""
    async with create_db_context(async_sessionmaker(engine))() as session:
        await session.execute(SELECT)
        assert len(holders(engine)) == count


def blocks(engine: AsyncEngine) -> Callable[[], Awaitable[tuple[float, float]]]:
    """Return a function that runs blocks and returns wall time and CPU time of one."""
    db_context = create_db_context(async_sessionmaker(engine))

    async def measure() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(BLOCKS):
            async with db_context() as session:
                await session.execute(SELECT)
        return (time.perf_counter() - wall) / BLOCKS, (time.process_time() - cpu) / BLOCKS

    return measure


async def compete(url: str, rounds: int) -> None:
    engines = {name: create_async_engine(url) for name in (NOTED, REPORTED, ALONE, CONTROL)}
    for name in (ALONE, CONTROL):
        leave_alone(engines[name])
    warn_of_idle_transactions(engines[REPORTED], 60)
    for name, engine in engines.items():
        await check(engine, int(name in (NOTED, REPORTED)))
    results = await alternate(
        {name: blocks(engine) for name, engine in engines.items()}, rounds=rounds
    )
    for engine in engines.values():
        await engine.dispose()
    headline("db_context() with one SELECT: wall time and CPU time of a block")
    for name, done in results.items():
        wall, cpu = (Spread.of(each[at] * 1e6 for each in done) for at in (0, 1))
        print(f"{name:<24} {wall.median:7.0f} us   {cpu.median:7.0f} us of CPU time")
    theirs = results[ALONE]
    for name in (NOTED, REPORTED, CONTROL):
        ours = results[name]
        target = None if name == CONTROL else ("at least", 0.98)
        speeds = [1 / wall for wall, _ in ours], [1 / wall for wall, _ in theirs]
        tell(f"{name} / {ALONE}, blocks per second", Spread.of_ratios(*speeds), target)
        costs = [cpu for _, cpu in ours], [cpu for _, cpu in theirs]
        tell(f"{name} / {ALONE}, CPU time", Spread.of_ratios(*costs))


async def run(options: argparse.Namespace) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url() as url:
        await compete(url, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.holders", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
