"""What `RowWatcher` costs and how soon it tells. Run as `python -m benchmarks.watch`.

- idle: CPU time of this process with waiters at a 0.5 s interval and nothing happening, as a share
of one core, and
  against raw asyncpg that fetches and decodes the same rows at the same interval, in the same
  round;
- detection: from the commit to the waiter's return, while all wait;
- notify: the same with `notify=True` and a trigger, against a bare asyncpg LISTEN that hears the
same notification;
- writers: what the trigger costs them, on a server that waits for its disk;
- waiters: `RowWatcher`, `wait_for_row_change` and the one of fastapi-toolsets, by number of waiters
(`_waiters.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks import _waiters, _writers
from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import RowWatcher, row_change_trigger
from pgtoolset._postgres.notifications import channel_in

INTERVAL = 0.5


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "pgtoolset_benchmark_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]


@asynccontextmanager
async def waiting(watcher: RowWatcher, count: int) -> AsyncIterator[list[asyncio.Task[float]]]:
    """So many waiters on rows of their own; each gives the time of its return."""

    async def wait(id_: int) -> float:
        await watcher.wait(Order, id_, columns=[Order.status])
        return time.perf_counter()

    tasks = [asyncio.create_task(wait(id_)) for id_ in range(1, count + 1)]
    await asyncio.sleep(1 + count / 10_000)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def idle(engine: AsyncEngine, waiters: int, seconds: float) -> float:
    """The share of one core that a watcher takes while nothing happens."""
    async with RowWatcher(engine, interval=INTERVAL) as watcher, waiting(watcher, waiters):
        return await share(seconds)


async def raw(url: str, waiters: int, seconds: float) -> float:
    """The same for asyncpg alone."""
    connection = await asyncpg.connect(url)
    keys = list(range(1, waiters + 1))

    async def fetch() -> None:
        while True:
            await connection.fetch(
                "SELECT id, status FROM pgtoolset_benchmark_orders WHERE id = ANY($1)", keys
            )
            await asyncio.sleep(INTERVAL)

    task = asyncio.create_task(fetch())
    await asyncio.sleep(1)
    try:
        return await share(seconds)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await connection.close()


@contextmanager
def longest_callback() -> Iterator[list[float]]:
    """CPU seconds of the longest callback that an event loop has run in the block, for which all
    others had to wait."""
    longest = [0.0]
    run = asyncio.Handle._run

    def timed(self: asyncio.Handle) -> None:
        start = time.thread_time()
        run(self)
        longest[0] = max(longest[0], time.thread_time() - start)

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield longest
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]


async def blocked(engine: AsyncEngine, waiters: int, seconds: float) -> float:
    """Milliseconds of the longest callback while nothing happens."""
    async with RowWatcher(engine, interval=INTERVAL) as watcher, waiting(watcher, waiters):
        with longest_callback() as longest:
            await asyncio.sleep(seconds)
        return longest[0] * 1000


async def share(seconds: float) -> float:
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


async def detection(
    engine: AsyncEngine, url: str, waiters: int, changes: int
) -> tuple[list[float], int]:
    """How long each of some changes took to be told, and how many connections served."""
    connection = await asyncpg.connect(url)
    delays = []
    async with RowWatcher(engine, interval=INTERVAL) as watcher, waiting(watcher, waiters) as tasks:
        for id_ in random.Random(0).sample(range(1, waiters + 1), changes):
            await asyncio.sleep(random.random() * 0.1)
            await connection.execute(
                "UPDATE pgtoolset_benchmark_orders SET status = status || '!' WHERE id = $1", id_
            )
            start = time.perf_counter()
            delays.append((tasks[id_ - 1], start))
        told = [await task - start for task, start in delays]
        served = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    await connection.close()
    return told, served


async def notified(engine: AsyncEngine, url: str, changes: int) -> tuple[list[float], list[float]]:
    """Seconds from the start of a write to the watcher's change, and to a bare listener's
    notification."""
    writer, listener = await asyncpg.connect(url), await asyncpg.connect(url)
    heard = asyncio.Queue[float]()
    channel = channel_in(Order.__table__, "public")  # type: ignore[arg-type]
    async with (
        RowWatcher(engine, interval=60, notify=True) as watcher,
        watcher.changes(Order, 1) as stream,
    ):
        ours, theirs = [], []
        for number in range(2 * changes):
            if number % 2:
                await listener.add_listener(
                    channel, lambda *_: heard.put_nowait(time.perf_counter())
                )
            start = time.perf_counter()
            write = asyncio.create_task(
                writer.execute(
                    "UPDATE pgtoolset_benchmark_orders SET status = status || '.' WHERE id = 1"
                )
            )
            if number % 2:
                theirs.append(await heard.get() - start)
                await anext(stream)
                await listener.reset()
            else:
                await anext(stream)
                ours.append(time.perf_counter() - start)
            await write
    await writer.close()
    await listener.close()
    return ours, theirs


async def run_watcher(
    engine: AsyncEngine, url: str, rounds: int, waiters: int, seconds: float
) -> None:
    """Everything but the crowds."""
    headline(f"idle, {waiters} waiters at {INTERVAL} s")
    shares = await alternate(
        {"ours": lambda: idle(engine, waiters, seconds), "raw": lambda: raw(url, waiters, seconds)},
        rounds=rounds,
        warm_up=1,
    )
    tell("share of one core", Spread.of(shares["ours"]), ("at most", 0.10))
    tell("watcher / raw asyncpg", Spread.of_ratios(shares["ours"], shares["raw"]), ("at most", 1.5))
    stretches = [await blocked(engine, waiters, seconds) for _ in range(rounds)]
    tell("longest callback of the event loop, milliseconds", Spread.of(stretches), ("at most", 20))
    headline("CPU time per waiter and tick, in microseconds")
    for count in (1_000, 10_000, 50_000):
        figures = [await idle(engine, count, seconds) * INTERVAL / count * 1e6 for _ in range(2)]
        tell(f"{count} waiters", Spread.of(figures))
    headline(f"detection, {waiters} waiters at {INTERVAL} s")
    delays, served = await detection(engine, url, waiters, 200)
    centiles = statistics.quantiles(delays, n=100)
    print(
        f"p50 {centiles[49] * 1000:.0f} ms, p99 {centiles[98] * 1000:.0f} ms (target 600), max "
        f"{max(delays) * 1000:.0f} ms; {served} connection(s)"
    )
    async with engine.begin() as connection:
        for ddl in row_change_trigger(Order):
            await connection.execute(ddl)
    await engine.dispose()
    headline("notify=True / a bare LISTEN, from the start of the write")
    ours, theirs = await notified(engine, url, 300)
    p50 = statistics.median(ours), statistics.median(theirs)
    print(
        f"p50 {p50[0] * 1000:.2f} ms / {p50[1] * 1000:.2f} ms = {p50[0] / p50[1]:.2f} (target at "
        "most 3)"
    )
    await _writers.compare(url, Order.__tablename__, rounds)


async def run(
    rounds: int, waiters: int, seconds: float, crowd_seconds: float, only_crowds: bool
) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url(fsync="on", full_page_writes="on") as url:
        engine = create_async_engine(url)
        plain = url.replace("+asyncpg", "", 1)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
                await connection.run_sync(Base.metadata.create_all)
                await connection.execute(
                    text(
                        "INSERT INTO pgtoolset_benchmark_orders SELECT n, 'new' FROM "
                        "generate_series(1, :count) AS n"
                    ),
                    {"count": 50_000},
                )
                await connection.execute(text("ANALYZE pgtoolset_benchmark_orders"))
            await engine.dispose()
            if not only_crowds:
                await run_watcher(engine, plain, rounds, waiters, seconds)
            if crowd_seconds:
                await _waiters.compare(
                    url, Order, [100, 500, 1_000, 2_000], crowd_seconds, INTERVAL
                )
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
        finally:
            await engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waiters", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument(
        "--crowd-seconds",
        type=float,
        default=45,
        help="for each number of waiters and contestant, at least 20; 0 leaves them out",
    )
    parser.add_argument(
        "--only-crowds", action="store_true", help="that comparison and nothing else"
    )
    options = parser.parse_args()
    if 0 < options.crowd_seconds < _waiters.SHORTEST:
        parser.error(
            f"--crowd-seconds must be at least {_waiters.SHORTEST:g}, or 0: the waiters need "
            f"{_waiters.SETTLE:g} s to begin and {_waiters.REST:g} s to hear of the last change"
        )
    asyncio.run(
        run(
            options.rounds,
            options.waiters,
            options.seconds,
            options.crowd_seconds,
            options.only_crowds,
        )
    )


if __name__ == "__main__":
    main()
