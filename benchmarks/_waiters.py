"""Waiters by the hundred and thousand: what they cost, who is lost and how soon they hear, theirs
and ours."""

from __future__ import annotations

import asyncio
import importlib
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from benchmarks import _peers
from benchmarks._harness import headline
from pgtoolset import RowWatcher, wait_for_row_change

#: Waits for one change of the row with this key.
Wait = Callable[[int], Awaitable[Any]]

#: Seconds before the first change, in which everybody has had a first look; and after the last, to
#: hear of it.
SETTLE, REST = 10.0, 5.0

#: The shortest run in which there is time for the changes between those two.
SHORTEST = SETTLE + REST + 5.0

CHANGES = 100

#: Connections of the pool; and the seconds between two checkouts by somebody who does not watch.
POOL, PROBE = 10, 0.05


def load_peer() -> Any:
    folder = _peers.install(f"fastapi-toolsets=={_peers.FASTAPI_TOOLSETS[-1]}")
    if folder is None:
        return None
    sys.path.append(str(folder))
    try:
        return importlib.import_module("fastapi_toolsets.db.watch").wait_for_row_change
    except ImportError as error:
        print(f"fastapi-toolsets: left out, because it cannot be imported: {error}")
        return None


async def compare(url: str, model: Any, counts: list[int], seconds: float, interval: float) -> None:
    """Print a line for each number of waiters and each contestant.

    A pool of 10 connections, for which a checkout waits 30 seconds. Somebody else takes one of them
    now and then, in the same event loop.
    """
    peer = load_peer()
    headline(
        f"waiters at {interval} s for {seconds:.0f} s; {CHANGES} rows change: share of one core, "
        "waiters that failed, changes that nobody heard of, detection, a checkout by somebody else"
    )

    def polling(function: Any) -> Callable[[AsyncEngine, int], Awaitable[None]]:
        async def run(engine: AsyncEngine, count: int) -> None:
            async def wait(key: int) -> None:
                async with AsyncSession(engine) as session:
                    await function(session, model, key, columns=["status"], interval=interval)

            await measure(names[function], wait, engine, url, model.__tablename__, count, seconds)

        return run

    async def watcher(engine: AsyncEngine, count: int) -> None:
        async with RowWatcher(engine, interval=interval) as watcher:
            await measure(
                "RowWatcher",
                lambda key: watcher.wait(model, key, columns=["status"]),
                engine,
                url,
                model.__tablename__,
                count,
                seconds,
            )

    names = {
        wait_for_row_change: "wait_for_row_change",
        peer: f"fastapi-toolsets {_peers.FASTAPI_TOOLSETS[-1]}",
    }
    contestants = [watcher, polling(wait_for_row_change), *([polling(peer)] if peer else [])]
    for count in counts:
        for contestant in contestants:
            engine = create_async_engine(url, pool_size=POOL, max_overflow=0)
            try:
                await contestant(engine, count)
            finally:
                await engine.dispose()


async def measure(
    name: str, wait: Wait, engine: AsyncEngine, url: str, table: str, count: int, seconds: float
) -> None:
    told: dict[int, float] = {}
    failures: Counter[str] = Counter()
    checkouts: list[float] = []
    most = 0

    async def somebody_else() -> None:
        while True:
            begun = time.perf_counter()
            connection = engine.connect()
            try:
                await connection.start()
            except PoolTimeoutError:
                failures["checkout by somebody else"] += 1
            finally:
                checkouts.append(time.perf_counter() - begun)  # so far, where the time is over
            await connection.close()
            await asyncio.sleep(PROBE)

    async def waiter(key: int) -> None:
        try:
            await wait(key)
        except Exception as error:
            failures[type(error).__name__] += 1
        else:
            told[key] = time.perf_counter()

    keys = random.Random(0).sample(range(1, count + 1), CHANGES)
    changed: dict[int, float] = {}
    pause = (seconds - SETTLE - REST) / CHANGES
    tasks = [asyncio.create_task(waiter(key)) for key in range(1, count + 1)]
    tasks.append(asyncio.create_task(somebody_else()))
    # In a thread with a loop of its own: the one that is measured may be late.
    writer = threading.Thread(target=lambda: asyncio.run(write(url, table, keys, changed, pause)))
    cpu, start = time.process_time(), time.perf_counter()
    writer.start()
    while time.perf_counter() - start < seconds:
        most = max(most, engine.pool.checkedout())  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
    share = (time.process_time() - cpu) / (time.perf_counter() - start)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    writer.join()
    delays = [told[key] - changed[key] for key in keys if key in told]
    detection, checkout = milliseconds(delays), milliseconds(checkouts)
    lost = sum(key not in told for key in keys)
    errors = f" ({', '.join(failures)})" if failures else ""
    print(
        f"{count:>6} {name:<24} {share:6.1%}   failed {failures.total():>4}{errors}   unheard "
        f"{lost:>3}   "
        f"p50 {detection[49]:6.0f} ms, p99 {detection[98]:6.0f} ms   "
        f"checkout p50 {checkout[49]:6.1f} ms, p99 {checkout[98]:6.0f} ms, max "
        f"{max(checkouts) * 1000:6.0f} ms   "
        f"connections of the pool {most:>2}",
        flush=True,
    )


def milliseconds(seconds: list[float]) -> list[float]:
    """The centiles of some times."""
    if len(seconds) < 2:
        return [float("nan")] * 99
    return statistics.quantiles([each * 1000 for each in seconds], n=100, method="inclusive")


async def write(
    url: str, table: str, keys: list[int], changed: dict[int, float], pause: float
) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", "", 1))
    try:
        await asyncio.sleep(SETTLE)
        for key in keys:
            await connection.execute(
                f"UPDATE {table} SET status = status || '!' WHERE id = $1", key
            )
            changed[key] = time.perf_counter()
            await asyncio.sleep(pause)
    finally:
        await connection.close()
