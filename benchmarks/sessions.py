"""What a session from pgtoolset costs beside one by hand. Run as `python -m benchmarks.sessions`.

Over HTTP: FastAPI under uvicorn, one server process per contestant, all of them alive at once on
one database, and keep-alive connections over loopback that are kept busy for a short round at one
server after the other. Compared are

- requests per second, which PostgreSQL, the client and the server make together, and
- CPU time of the server per request, from its own clock: less noisy, and blind to what PostgreSQL
does.

Before that every contestant shows that what it answered 2xx for is stored, whether it was stored
when the answer came, and how many connections a request without SQL takes from the pool.

Without HTTP: one SELECT in `db_context()` and in `session_maker.begin()`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from benchmarks._app import table_of
from benchmarks._client import Client
from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from benchmarks._peers import FASTAPI_TOOLSETS, install
from pgtoolset import create_db_context

ROOT = Path(__file__).resolve().parent.parent

OURS = "pgtoolset"
BY_HAND = "by_hand"
#: The same once more: the distance of its ratio from 1 says how far the others can be trusted.
CONTROL = "by_hand_again"
BARE = "bare_dependency"

SELECT = text("SELECT 1")


@dataclass(frozen=True, slots=True)
class Round:
    """What one server did in one round."""

    per_second: float
    microseconds: float  # of CPU time, per request


class Contestant:
    """A server and the connections to it."""

    def __init__(self, name: str, client: Client, engine: AsyncEngine) -> None:
        self.name = name
        self.client = client
        self._engine = engine
        self._table = table_of(name)

    async def clear(self) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(text(f"TRUNCATE {self._table.name}"))

    async def stored(self) -> int:
        async with self._engine.connect() as connection:
            return (
                await connection.execute(select(func.count()).select_from(self._table))
            ).scalar_one()

    async def round(self, path: str, seconds: float) -> Round:
        """Keep the server busy for some time, and ask it before and after how much CPU time it has
        used.

        It does so for a moment before the clock runs, because the others have had the processor's
        caches meanwhile.
        """
        await self.client.load(path, seconds=seconds / 5)
        before = await self.client.ask("/usage")
        load = await self.client.load(path, seconds=seconds)
        after = await self.client.ask("/usage")
        return Round(load.per_second, (after["cpu"] - before["cpu"]) / 1000 / load.answers)

    async def prove(self) -> None:
        """Print whether the answers told the truth, and what a request without SQL takes from the
        pool."""
        rows, at_once = await self.stored(), 0
        for number in range(1, 51):
            await self.client.ask("/insert")
            at_once += await self.stored() == rows + number
        rows = await self.stored()
        load = await self.client.load("/insert", seconds=0.5)
        for _ in range(50):
            kept = await self.stored() - rows
            if kept == load.answers:
                break
            await asyncio.sleep(0.1)  # who commits after the answer may need a moment
        before = await self.client.ask("/usage")
        for _ in range(100):
            await self.client.ask("/idle")
        after = await self.client.ask("/usage")
        checkouts = (after["checkouts"] - before["checkouts"]) / 100
        print(
            f"{self.name:<24} stored {kept} of {load.answers} answered 2xx; {at_once} of 50 "
            "before the answer; "
            f"connections taken without SQL: {checkouts:g} per request",
            flush=True,
        )


@asynccontextmanager
async def served(name: str, url: str, connections: int, paths: list[Path]) -> AsyncIterator[Client]:
    """A server process for the contestant, and connections to it."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * connections) as listening:
        port: int = listening.getsockname()[1]
        # A contestant that answers before it commits has more sessions at work than there are
        # connections.
        command = [
            sys.executable,
            "-m",
            "benchmarks._app",
            name,
            url,
            str(listening.fileno()),
            str(2 * connections),
        ]
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "PYTHONHASHSEED": "0",
            },
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
        )
    assert process.stdin is not None
    client = None
    try:
        client = await Client.connect(port, connections)
        yield client
    finally:
        if client is not None:
            client.close()
        process.stdin.close()
        await process.wait()


def line_up(uvloop: bool) -> dict[str, list[Path]]:
    """The contestants, and where their servers find what the environment does not have."""
    common = (
        [path for path in [install("uvloop==0.22.1", "httptools==0.7.1")] if path] if uvloop else []
    )
    contestants = {BY_HAND: common, OURS: common, CONTROL: common, BARE: common}
    for version in FASTAPI_TOOLSETS:
        peer = install(f"fastapi-toolsets=={version}")
        if peer is not None:
            contestants[f"fastapi_toolsets_{version.replace('.', '_')}"] = [*common, peer]
    return contestants


async def compete(
    contestants: Mapping[str, Contestant], path: str, rounds: int, seconds: float
) -> None:
    """Rounds of all contestants at one endpoint, and ours over each of the others."""

    def at(contestant: Contestant) -> Callable[[], Awaitable[Round]]:
        return lambda: contestant.round(path, seconds)

    for contestant in contestants.values():
        await contestant.clear()
    results = await alternate(
        {name: at(contestant) for name, contestant in contestants.items()}, rounds=rounds
    )
    headline(
        f"POST {path}: requests per second (more is better) and CPU time per request (less is "
        "better)"
    )
    for name, done in results.items():
        speed, cost = (
            Spread.of(each.per_second for each in done),
            Spread.of(each.microseconds for each in done),
        )
        print(
            f"{name:<24} {speed.median:7.0f} requests/s   {cost.median:7.0f} us of CPU time per "
            "request"
        )

    def compare(one: str, other: str, limit: float | None = None) -> None:
        ours, theirs = results[one], results[other]
        tell(
            f"{one} / {other}, requests per second",
            Spread.of_ratios(
                [each.per_second for each in ours], [each.per_second for each in theirs]
            ),
            None if limit is None else ("at least", limit),
        )
        tell(
            f"{one} / {other}, CPU time per request",
            Spread.of_ratios(
                [each.microseconds for each in ours], [each.microseconds for each in theirs]
            ),
        )

    compare(OURS, BY_HAND, 0.97)
    for peer in contestants.keys() - {BY_HAND, OURS, CONTROL, BARE}:
        compare(OURS, peer, 1.0)
    compare(OURS, BARE)
    compare(CONTROL, BY_HAND)


async def over_http(
    url: str, engine: AsyncEngine, rounds: int, seconds: float, connections: int, uvloop: bool
) -> None:
    lines = line_up(uvloop)
    tables = [table_of(name) for name in lines]
    async with engine.begin() as connection:
        for table in tables:
            await connection.run_sync(table.drop, checkfirst=True)
            await connection.run_sync(table.create)
            await connection.execute(
                text(f"ALTER TABLE {table.name} SET (autovacuum_enabled = off)")
            )
    async with AsyncExitStack() as stack:
        contestants = {}
        for name, paths in lines.items():
            client = await stack.enter_async_context(served(name, url, connections, paths))
            contestants[name] = Contestant(name, client, engine)
        headline("What the answers are worth")
        for contestant in contestants.values():
            await contestant.prove()
        for path in ("/insert", "/select-insert"):
            await compete(contestants, path, rounds, seconds)
    async with engine.begin() as connection:
        for table in tables:
            await connection.run_sync(table.drop)


async def without_http(url: str, rounds: int) -> None:
    """`db_context()` and `session_maker.begin()`, on an engine each, with one SELECT inside."""
    engines = create_async_engine(url), create_async_engine(url)
    db_context = create_db_context(async_sessionmaker(engines[0]))
    session_maker = async_sessionmaker(engines[1])

    async def units(
        block: Callable[[], AbstractAsyncContextManager[AsyncSession]],
    ) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(20):
            async with block() as session:
                await session.execute(SELECT)
        return (time.perf_counter() - wall) / 20, (time.process_time() - cpu) / 20

    results = await alternate(
        {
            "db_context": lambda: units(db_context),
            "session_maker": lambda: units(session_maker.begin),
            "control": lambda: units(session_maker.begin),
        },
        rounds=rounds,
        warm_up=10,
    )
    for engine in engines:
        await engine.dispose()
    headline("db_context() / session_maker.begin(), with one SELECT")
    theirs = results["session_maker"]
    for name, what in (
        ("db_context", "db_context()"),
        ("control", "control: session_maker.begin() once more"),
    ):
        ours = results[name]
        tell(
            f"{what}, wall time",
            Spread.of_ratios([wall for wall, _ in ours], [wall for wall, _ in theirs]),
        )
        tell(
            f"{what}, CPU time",
            Spread.of_ratios([cpu for _, cpu in ours], [cpu for _, cpu in theirs]),
        )


async def run(options: argparse.Namespace) -> None:
    environment("sqlalchemy", "asyncpg", "fastapi", "uvicorn")
    with database_url() as url:
        engine = create_async_engine(url)
        try:
            await over_http(
                url, engine, options.rounds, options.seconds, options.connections, options.uvloop
            )
        finally:
            await engine.dispose()
        await without_http(url, 2 * options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sessions", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one contestant in one round")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument(
        "--uvloop", action="store_true", help="serve with uvloop and httptools, a smaller base"
    )
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
