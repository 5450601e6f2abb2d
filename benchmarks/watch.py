"""What `RowWatcher` costs and how soon its waiters receive a change. Run as `python -m
benchmarks.watch`.

- idle: CPU time of this process with waiters at a 0.5 s interval and nothing happening, as a share
  of one core, and against raw asyncpg that fetches and decodes the same rows at the same interval;
- detection: from the commit to the waiter's return, while all wait;
- notify: the same with `notify=True` and a trigger, against a bare asyncpg LISTEN that receives the
  same notification;
- writers: what the triggers leave of their transactions, on a server that waits for its disk;
- crowds: `RowWatcher`, `wait_for_row_change` and that of fastapi-toolsets (`_crowds.py`).
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks import _crowds
from benchmarks._declared import Benchmark, Curve, Experiment, Measure, at, at_most
from benchmarks._harness import Figures, Turn, nanoseconds_of, plain
from benchmarks._orders import CHANGE, INTERVAL, Order, orders, waiting
from benchmarks._run import alone
from pgtoolset import RowWatcher, row_change_trigger
from pgtoolset._postgres.notifications import channel_in

WAITERS = 10_000
SECONDS = 2.0
SIZES = (1, 10, 100, 1_000, 10_000, 50_000)
CHANGES = 100
#: Connections that write, and whether a commit waits for the disk.
WRITERS = ((1, "on"), (1, "off"), (16, "on"), (16, "off"))


async def share(seconds: float, *backends: int) -> Figures:
    """The shares of one core, of this process and with those of PostgreSQL, while others work."""
    theirs = sum(map(nanoseconds_of, backends))
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    await asyncio.sleep(seconds)
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    return {"share": cpu / wall, "both": (cpu + sum(map(nanoseconds_of, backends)) - theirs) / wall}


async def watchers_backends(url: str) -> list[int]:
    """The processes of PostgreSQL that serve somebody else in this database."""
    connection = await asyncpg.connect(url)
    found = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    await connection.close()
    return [row[0] for row in found]


async def idle(engine: AsyncEngine, url: str, waiters: int, seconds: float = SECONDS) -> Figures:
    """What a watcher takes while nothing happens."""
    async with RowWatcher(engine, interval=INTERVAL) as watcher, waiting(engine, watcher, waiters):
        backends = await watchers_backends(url)
        return await share(seconds, *backends) | {"connections": len(backends)}


async def raw(url: str, waiters: int, seconds: float = SECONDS) -> Figures:
    """The same for asyncpg alone."""
    connection = await asyncpg.connect(url)
    keys = list(range(1, waiters + 1))

    async def fetch() -> None:
        sql = f"SELECT id, status FROM {Order.__tablename__} WHERE id = ANY($1)"
        while True:
            await connection.fetch(sql, keys)
            await asyncio.sleep(INTERVAL)

    task = asyncio.create_task(fetch())
    await asyncio.sleep(0.7)
    try:
        return await share(seconds, connection.get_server_pid())
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


async def blocked(engine: AsyncEngine) -> Figures:
    """The longest callback while nothing happens."""
    async with RowWatcher(engine, interval=INTERVAL) as watcher, waiting(engine, watcher, WAITERS):
        with longest_callback() as longest:
            await asyncio.sleep(SECONDS)
        return {"longest": longest[0]}


async def detection(engine: AsyncEngine, url: str) -> Figures:
    """How long each of some changes took to reach its waiter."""
    connection = await asyncpg.connect(url)
    await connection.execute(
        f"UPDATE {Order.__tablename__} SET status = 'new' WHERE status <> 'new'"
    )
    changes = []
    async with (
        RowWatcher(engine, interval=INTERVAL) as watcher,
        waiting(engine, watcher, WAITERS) as tasks,
    ):
        for key in random.Random(0).sample(range(1, WAITERS + 1), CHANGES):
            await asyncio.sleep(random.random() * 0.1)
            await connection.execute(CHANGE, key)
            changes.append((tasks[key - 1], time.perf_counter()))
        delays = [await task - start for task, start in changes]
    await connection.close()
    centiles = statistics.quantiles(delays, n=100, method="inclusive")
    return {"p50": centiles[49], "p99": centiles[98]}


@asynccontextmanager
async def idlers(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with orders(url) as engine:
        yield {
            "ours": partial(idle, engine, plain(url), WAITERS),
            "raw": partial(raw, plain(url), WAITERS),
            "blocked": partial(blocked, engine),
        }


@asynccontextmanager
async def by_number(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with orders(url) as engine:
        turns: dict[str, Turn] = {}
        for size in SIZES:
            turns[at("watcher", size)] = partial(idle, engine, plain(url), size, 2 * INTERVAL)
            turns[at("raw", size)] = partial(raw, plain(url), size, 2 * INTERVAL)
        yield turns


@asynccontextmanager
async def detectors(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with orders(url) as engine:
        yield {"watcher": partial(detection, engine, plain(url))}


async def triggers(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        for ddl in row_change_trigger(Order):
            await connection.execute(ddl)
    await engine.dispose()


@asynccontextmanager
async def listeners(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    """Seconds from the start of a write to the watcher's change, and to a bare listener's
    notification."""
    table: Any = Order.__table__
    channel = channel_in(table, "public")
    sql = CHANGE.replace("$1", "1")
    async with orders(url) as engine, AsyncExitStack() as stack:
        await triggers(engine)
        writer, listener = await asyncpg.connect(plain(url)), await asyncpg.connect(plain(url))
        for connection in (writer, listener):
            stack.push_async_callback(connection.close)
        watcher = await stack.enter_async_context(RowWatcher(engine, interval=60, notify=True))
        stream = await stack.enter_async_context(watcher.changes(Order, 1))

        async def ours() -> Figures:
            start = time.perf_counter()
            write = asyncio.create_task(writer.execute(sql))
            await anext(stream)
            seconds = time.perf_counter() - start
            await write
            return {"wall": seconds}

        async def theirs() -> Figures:
            heard: asyncio.Future[float] = asyncio.get_running_loop().create_future()

            def hear(*_: Any) -> None:
                if not heard.done():
                    heard.set_result(time.perf_counter())

            await listener.add_listener(channel, hear)
            start = time.perf_counter()
            write = asyncio.create_task(writer.execute(sql))
            seconds = await heard - start
            await anext(stream)
            await listener.reset()
            await write
            return {"wall": seconds}

        yield {"watcher": ours, "listen": theirs}


#: A trigger that does nothing but notify.
BARE = f"""
CREATE OR REPLACE FUNCTION pgtoolset_benchmark_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_notify('pgtoolset_benchmark', ''); RETURN NULL; END $$;
CREATE TRIGGER bare AFTER UPDATE ON {Order.__tablename__}
FOR EACH STATEMENT EXECUTE FUNCTION pgtoolset_benchmark_notify()
"""


async def throughput(connections: list[asyncpg.Connection], trigger: str) -> Figures:
    """Transactions a second of one UPDATE each; each connection has a row of its own."""
    table = Order.__tablename__
    enabled = f", ENABLE TRIGGER {trigger}" if trigger else ""
    await connections[0].execute(f"ALTER TABLE {table} DISABLE TRIGGER USER{enabled}")
    done, start = 0, time.perf_counter()

    async def write(connection: asyncpg.Connection, key: int) -> None:
        nonlocal done
        while time.perf_counter() - start < 0.5:
            await connection.execute(f"UPDATE {table} SET status = 'written' WHERE id = $1", key)
            done += 1

    await asyncio.gather(*(write(connection, key) for key, connection in enumerate(connections, 1)))
    return {"rate": done / (time.perf_counter() - start)}


@asynccontextmanager
async def writers(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with orders(url) as engine, AsyncExitStack() as stack:
        await triggers(engine)
        owner = await asyncpg.connect(plain(url))
        await owner.execute(BARE)
        await owner.close()
        turns: dict[str, Turn] = {}
        for count, flush in WRITERS:
            connections = []
            for _ in range(count):
                settings = {"synchronous_commit": flush}
                connections.append(await asyncpg.connect(plain(url), server_settings=settings))
                stack.push_async_callback(connections[-1].close)
            for name, trigger in (("with", "pgtoolset_update"), ("bare", "bare"), ("without", "")):
                turns[f"{count} {flush}, {name}"] = partial(throughput, connections, trigger)
        yield turns


BENCHMARK = Benchmark(
    title="Watching rows",
    about=f"Waiters for changes of rows, at an interval of {INTERVAL:g} seconds.",
    settings={"fsync": "on", "full_page_writes": "on"},
    experiments=(
        Experiment(
            f"{WAITERS:,} idle waiters",
            idlers,
            (
                Measure(
                    "idle",
                    f"CPU time with {WAITERS:,} idle waiters",
                    "ours",
                    of="share",
                    unit="% of a core",
                    scale=100,
                    target=at_most(10),
                ),
                Measure(
                    "idle-raw",
                    f"CPU time with {WAITERS:,} idle waiters",
                    "ours",
                    "raw asyncpg that fetches the same rows",
                    "raw",
                    of="share",
                    target=at_most(1.5),
                ),
                Measure(
                    "idle-both",
                    "the same with PostgreSQL's part",
                    "ours",
                    "raw asyncpg with PostgreSQL's part",
                    "raw",
                    of="both",
                ),
                Measure(
                    "idle-connections",
                    f"connections for {WAITERS:,} waiters",
                    "ours",
                    of="connections",
                    unit="connections",
                    target=at_most(1),
                ),
                Measure(
                    "longest-callback",
                    "longest callback of the event loop meanwhile",
                    "blocked",
                    of="longest",
                    unit="ms",
                    scale=1000,
                    target=at_most(20),
                ),
            ),
            seconds=12,
            warm_up=1,
        ),
        Experiment(
            "1 to 50,000 idle waiters",
            by_number,
            curves=(
                Curve(
                    "idle-waiters",
                    "Idle waiters at 0.5 s: CPU time of the process",
                    "waiters",
                    "% of a core",
                    SIZES,
                    {"watcher": "RowWatcher", "raw": "raw asyncpg, the same rows"},
                    of="share",
                    scale=100,
                ),
            ),
            seconds=20,
            least=2,
            warm_up=0,
            quick=False,
        ),
        Experiment(
            "From the commit to the waiter",
            detectors,
            (
                Measure(
                    "detection",
                    f"delay of a change, p99, {WAITERS:,} waiters",
                    "watcher",
                    of="p99",
                    unit="ms",
                    scale=1000,
                    target=at_most(
                        600, "the interval and 100 ms, required before the code was written"
                    ),
                ),
                Measure(
                    "detection-p50", "the same, p50", "watcher", of="p50", unit="ms", scale=1000
                ),
            ),
            seconds=10,
            least=2,
            warm_up=0,
        ),
        Experiment(
            "Notifications",
            listeners,
            (
                Measure(
                    "notify",
                    "`notify=True`, from the start of a write",
                    "watcher",
                    "a bare LISTEN",
                    "listen",
                    target=at_most(3),
                ),
            ),
            seconds=6,
            rounds=1_000,
            warm_up=5,
        ),
        Experiment(
            "Writers with the triggers of notifications",
            writers,
            (
                *(
                    Measure(
                        f"writers-{count}-{flush}",
                        f"transactions a second, {count} connection{'s' * (count > 1)}, commits "
                        f"{'wait' if flush == 'on' else 'do not wait'} for the disk",
                        f"{count} {flush}, with",
                        "without the triggers",
                        f"{count} {flush}, without",
                        of="rate",
                    )
                    for count, flush in WRITERS
                ),
                Measure(
                    "writers-16-on-bare",
                    "transactions a second, 16 connections, commits wait for the disk",
                    "16 on, with",
                    "a trigger that does nothing but `pg_notify`",
                    "16 on, bare",
                    of="rate",
                ),
            ),
            seconds=15,
            warm_up=1,
            quick=False,
        ),
        _crowds.EXPERIMENT,
    ),
)

if __name__ == "__main__":
    alone("watch")
