"""What it costs to be observed. Run as `python -m benchmarks.observe`.

One SELECT in `db_context()`, on engines in alternation: one that has never had an observer, one
whose observer has unsubscribed, one with an observer that counts, and one with OpenTelemetry's
observer, which records into nothing. The first one takes part twice: the distance of its ratio from
1 says how far the others can be trusted.

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
from pgtoolset import create_db_context
from pgtoolset.observe import Event, TransactionEnded, subscribe
from pgtoolset.observe.otel import OpenTelemetryObserver

SELECT = text("SELECT 1")

#: Blocks of one contestant in one round.
BLOCKS = 20

ALONE, CONTROL = "never observed", "never observed once more"
ENDED, COUNTED, OTEL = "observed before", "an observer that counts", "OpenTelemetry"


class Counter:
    """Counts the transactions that it is called with."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: Event, /) -> None:
        self.count += isinstance(event, TransactionEnded)


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
    names = (ALONE, CONTROL, ENDED, COUNTED, OTEL)
    engines = {name: create_async_engine(url) for name in names}
    ended, counted = Counter(), Counter()
    subscribe(engines[ENDED], ended)()
    subscribe(engines[COUNTED], counted)
    subscribe(engines[OTEL], OpenTelemetryObserver(engines[OTEL]))
    results = await alternate(
        {name: blocks(engine) for name, engine in engines.items()}, rounds=rounds
    )
    assert ended.count == 0
    assert counted.count >= rounds * BLOCKS
    for engine in engines.values():
        await engine.dispose()
    headline("db_context() with one SELECT: wall time and CPU time of a block")
    for name, done in results.items():
        wall, cpu = (Spread.of(each[at] * 1e6 for each in done) for at in (0, 1))
        print(f"{name:<26} {wall.median:7.0f} us   {cpu.median:7.0f} us of CPU time")
    theirs = results[ALONE]
    for name in (CONTROL, ENDED, COUNTED, OTEL):
        ours = results[name]
        target = ("at least", 0.98) if name == ENDED else None
        speeds = [1 / wall for wall, _ in ours], [1 / wall for wall, _ in theirs]
        tell(f"{name} / {ALONE}, blocks per second", Spread.of_ratios(*speeds), target)
        costs = [cpu for _, cpu in ours], [cpu for _, cpu in theirs]
        tell(f"{name} / {ALONE}, CPU time", Spread.of_ratios(*costs))


async def run(options: argparse.Namespace) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url() as url:
        await compete(url, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observe", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
