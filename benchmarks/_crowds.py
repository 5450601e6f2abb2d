"""Waiters by the hundred and thousand: their cost, the changes that they miss, and their delay."""

from __future__ import annotations

import asyncio
import importlib
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import asyncpg
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from benchmarks._declared import Curve, Experiment, Measure, at
from benchmarks._harness import Figures, Turn, plain
from benchmarks._orders import CHANGE, INTERVAL, Order, orders
from benchmarks._peers import LABELS, TOOLSETS
from benchmarks._worker import workers
from pgtoolset import RowWatcher, wait_for_row_change

#: Waits for one change of the row with this key.
Wait: TypeAlias = Callable[[int], Awaitable[Any]]

#: Seconds before the first change, in which all have had a first look, in which rows change, and
#: after the last change.
SETTLE, BUSY, REST = 6.0, 5.0, 5.0

COUNTS = (100, 500, 1_000)
CHANGES = 80

#: Connections of the pool; and the seconds between two checkouts by code that does not watch.
POOL, PROBE = 10, 0.05


async def crowd(
    url: str, watches: Callable[[AsyncEngine, int], Awaitable[Figures]], count: int
) -> Figures:
    """A crowd on a pool of its own, for which a checkout waits 30 seconds."""
    engine = create_async_engine(url, pool_size=POOL, max_overflow=0)
    try:
        return await watches(engine, count)
    finally:
        await engine.dispose()


def polling(url: str, function: Any) -> Callable[[AsyncEngine, int], Awaitable[Figures]]:
    """Each waiter polls in a session of its own."""

    async def run(engine: AsyncEngine, count: int) -> Figures:
        async def wait(key: int) -> None:
            async with AsyncSession(engine) as session:
                await function(session, Order, key, columns=["status"], interval=INTERVAL)

        return await measured(wait, engine, url, count)

    return run


def watching(url: str) -> Callable[[AsyncEngine, int], Awaitable[Figures]]:
    """One watcher serves all."""

    async def run(engine: AsyncEngine, count: int) -> Figures:
        async with RowWatcher(engine, interval=INTERVAL) as watcher:
            return await measured(
                lambda key: watcher.wait(Order, key, columns=["status"]), engine, url, count
            )

    return run


async def measured(wait: Wait, engine: AsyncEngine, url: str, count: int) -> Figures:
    """Have some of the awaited rows change, and say what became of the waiters."""
    told: dict[int, float] = {}
    failures: Counter[str] = Counter()
    checkouts: list[float] = []

    async def other_code() -> None:
        while True:
            begun = time.perf_counter()
            connection = engine.connect()
            try:
                await connection.start()
            except PoolTimeoutError:
                failures["checkout"] += 1
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
    tasks = [asyncio.create_task(waiter(key)) for key in range(1, count + 1)]
    tasks.append(asyncio.create_task(other_code()))
    # In a thread with a loop of its own: the loop that is measured may be late.
    writer = threading.Thread(target=lambda: asyncio.run(write(url, keys, changed)))
    cpu, start = time.process_time(), time.perf_counter()
    writer.start()
    try:
        await asyncio.sleep(SETTLE + BUSY + REST)
        share = (time.process_time() - cpu) / (time.perf_counter() - start)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(writer.join)
    delays = [told[key] - changed[key] for key in keys if key in told]
    # A change that no waiter has seen by the end has waited at least so long.
    delays += [BUSY + REST] * (CHANGES - len(delays))
    return {
        "share": share,
        "failed": failures.total(),
        "missed": sum(key not in told for key in keys),
        "p50": centile(delays, 50),
        "p99": centile(delays, 99),
        "checkout": centile(checkouts, 99),
    }


def centile(figures: list[float], number: int) -> float:
    """A centile of some times, in seconds."""
    if len(figures) == 1:
        return figures[0]
    return statistics.quantiles(figures, n=100, method="inclusive")[number - 1]


async def write(url: str, keys: list[int], changed: dict[int, float]) -> None:
    """Change the rows one after the other."""
    connection = await asyncpg.connect(plain(url))
    try:
        await asyncio.sleep(SETTLE)
        for key in keys:
            await connection.execute(CHANGE, key)
            changed[key] = time.perf_counter()
            await asyncio.sleep(BUSY / CHANGES)
    finally:
        await connection.close()


@asynccontextmanager
async def peer(url: str) -> AsyncIterator[dict[str, Callable[..., Awaitable[Figures]]]]:
    """fastapi-toolsets, whose waiters poll each for themselves."""
    db = importlib.import_module("fastapi_toolsets.db")
    if not hasattr(db, "wait_for_row_change"):
        db = importlib.import_module("fastapi_toolsets.db.watch")
    yield {"crowd": partial(crowd, url, polling(url, db.wait_for_row_change))}


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with orders(url), workers(TOOLSETS, "benchmarks._crowds:peer", url) as peers:
        turns: dict[str, Turn] = {}
        for count in COUNTS:
            turns[at("watcher", count)] = partial(crowd, url, watching(url), count)
            ours = polling(url, wait_for_row_change)
            turns[at("function", count)] = partial(crowd, url, ours, count)
            for name, worker in peers.items():
                turns[at(name, count)] = worker.turn("crowd", count)
        yield turns


SERIES = {"watcher": "RowWatcher", "function": "wait_for_row_change"} | {
    name: LABELS[name] for name in TOOLSETS
}


def measures() -> tuple[Measure, ...]:
    """What becomes of 500 and of 1,000 waiters."""
    made = []
    for count in COUNTS[1:]:
        for name, label in SERIES.items():
            contestant, key = at(name, count), f"{name.replace(' ', '-')}-{count}"
            what = (
                f"{count:,} waiters, {label}"
                if name in TOOLSETS
                else f"{count:,} waiters, `{label}`"
            )
            made += [
                Measure(
                    f"{key}-share",
                    f"{what}: CPU time",
                    contestant,
                    of="share",
                    unit="% of a core",
                    scale=100,
                ),
                Measure(
                    f"{key}-p99", f"{what}: delay of a change, p99", contestant, of="p99", unit="s"
                ),
                Measure(
                    f"{key}-missed",
                    f"{what}: changes missed, of {CHANGES}",
                    contestant,
                    of="missed",
                    unit="changes",
                ),
            ]
    return tuple(made)


def curve(name: str, title: str, y: str, of: str, scale: float = 1) -> Curve:
    """A figure over the number of waiters."""
    return Curve(f"crowds-{name}", title, "waiters", y, COUNTS, SERIES, of=of, scale=scale)


EXPERIMENT = Experiment(
    "Crowds of waiters",
    contestants,
    measures(),
    (
        curve("share", "Waiters at 0.5 s: CPU time of the process", "% of a core", "share", 100),
        curve("p99", "Waiters at 0.5 s: delay of a change, p99", "seconds", "p99"),
        curve(
            "checkout", "Waiters at 0.5 s: a checkout by other code, p99", "ms", "checkout", 1000
        ),
    ),
    seconds=192,
    rounds=1,
    least=1,
    warm_up=0,
    quick=False,
    note=f"{CHANGES} rows change within {BUSY:g} seconds, on a pool of {POOL} connections, while "
    f"other code takes one of them every {PROBE * 1000:.0f} milliseconds. A change that is missed "
    f"counts as {BUSY + REST:g} seconds. The first row changes {SETTLE:g} seconds after the "
    "waiters begin; a waiter that had no connection until then has not seen the row before.",
)
