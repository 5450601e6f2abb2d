"""What a session from pgtoolset costs beside one by hand. Run as `python -m benchmarks.sessions`.

FastAPI under uvicorn, one server process per contestant, all of them alive at once on one database,
and keep-alive connections over loopback that are kept busy for a short round at one server after
the other. Compared are

- requests per second, which PostgreSQL, the client and the server make together, and
- CPU time of the server per request, from its own clock: less noisy, and blind to what PostgreSQL
  does.

Like is compared with like only as far as the first experiment says: which contestants had stored
their row when the answer came, and what a request without SQL takes from the pool.

`_app.py` is the application under test, `_client.py` the client that loads it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks._app import table_of
from benchmarks._client import Client
from benchmarks._declared import Benchmark, Experiment, Measure, at_least, at_most, with_cpu
from benchmarks._harness import Figures, Turn, engines
from benchmarks._peers import LABELS, folder_of
from benchmarks._run import alone

ROOT = Path(__file__).resolve().parent.parent

OURS, BY_HAND, BARE = "pgtoolset", "by_hand", "bare_dependency"
#: The same once more: the distance of its ratio from 1 says how far the others can be trusted.
CONTROL = "by_hand_again"
CONTESTANTS = (BY_HAND, OURS, CONTROL, BARE, *LABELS)

INSERT, BOTH = "/insert", "/select-insert"
SECONDS = 0.04
CONNECTIONS = 8


class Contestant:
    """A server, which is started by its first turn, and the connections to it."""

    def __init__(self, name: str, url: str, engine: AsyncEngine) -> None:
        self._name = name
        self._url = url
        self._engine = engine
        self._table = table_of(name)
        self._client: Client | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def _connect(self) -> Client:
        """Start the server where it is not running, and return the connections to it."""
        if self._client is not None:
            return self._client
        folder = await asyncio.to_thread(folder_of, self._name) if self._name in LABELS else ""
        # One connection may have several sessions at work where the answer comes before the commit.
        size = 2 * CONNECTIONS
        with socket.create_server(("127.0.0.1", 0), backlog=size) as listening:
            port: int = listening.getsockname()[1]
            number = listening.fileno()
            command = [sys.executable, "-m", "benchmarks._app", self._name, self._url]
            self._process = await asyncio.create_subprocess_exec(
                *command,
                str(number),
                str(size),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": "0"},
                stdin=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[number],
            )
        self._client = await Client.connect(port, CONNECTIONS)
        await self._clear()
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()

    async def _clear(self) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(text(f"TRUNCATE {self._table.name}"))

    async def _stored(self) -> int:
        async with self._engine.connect() as connection:
            count = select(func.count()).select_from(self._table)
            return (await connection.execute(count)).scalar_one()

    async def load(self, path: str) -> Figures:
        """Keep the server busy for some time, and ask it before and after how much CPU time it has
        used.

        It does so for a moment before the clock runs, because the others have had the processor's
        caches meanwhile.
        """
        client = await self._connect()
        await client.load(path, seconds=SECONDS / 5)
        before = await client.ask("/usage")
        load = await client.load(path, seconds=SECONDS)
        after = await client.ask("/usage")
        cpu = (after["cpu"] - before["cpu"]) / 1e9 / load.answers
        return {"wall": 1 / load.per_second, "cpu": cpu}

    async def prove(self) -> Figures:
        """Count the answers whose row was stored when they came, and the connections that a request
        without SQL takes from the pool."""
        client = await self._connect()
        rows, at_once = await self._stored(), 0
        for number in range(1, 21):
            await client.ask("/insert")
            at_once += await self._stored() == rows + number
        before = await client.ask("/usage")
        for _ in range(50):
            await client.ask("/idle")
        after = await client.ask("/usage")
        return {
            "stored": at_once / 20,
            "checkouts": (after["checkouts"] - before["checkouts"]) / 50,
        }


@asynccontextmanager
async def contestants(url: str, *paths: str) -> AsyncIterator[Mapping[str, Turn]]:
    """Turns that load each path of each server, or prove what its answers are worth."""
    async with engines(url, 1) as (engine,):
        made: dict[str, Contestant] = {}
        for name in CONTESTANTS:
            table = table_of(name)
            async with engine.begin() as connection:
                await connection.run_sync(table.drop, checkfirst=True)
                await connection.run_sync(table.create)
                quiet = f"ALTER TABLE {table.name} SET (autovacuum_enabled = off)"
                await connection.execute(text(quiet))
            made[name] = Contestant(name, url, engine)
        try:
            if paths:
                yield {
                    turn_of(name, path): partial(each.load, path)
                    for name, each in made.items()
                    for path in paths
                }
            else:
                yield {name: each.prove for name, each in made.items()}
        finally:
            for name, each in made.items():
                await each.close()
                async with engine.begin() as connection:
                    await connection.run_sync(table_of(name).drop)


def turn_of(name: str, path: str) -> str:
    """The name of the turn that loads a path of a server."""
    return f"{name} {path}"


def words(name: str) -> str:
    """How the page names a contestant."""
    known = {
        BY_HAND: "`session_maker.begin()` in the endpoint",
        OURS: "`Depends(get_db)`",
        BARE: "the shortest dependency with `yield`",
    }
    return known.get(name) or LABELS[name]


def key(name: str) -> str:
    return name.replace(" ", "-").replace("_", "-")


def truth() -> list[Measure]:
    """What the answers are worth."""
    made = []
    for name in (OURS, *LABELS):
        stored, taken = (at_least(100), at_most(0)) if name == OURS else (None, None)
        made += [
            Measure(
                f"stored-{key(name)}",
                f"{words(name)}: rows stored when the answer came",
                name,
                of="stored",
                unit="%",
                scale=100,
                target=stored,
            ),
            Measure(
                f"checkouts-{key(name)}",
                f"{words(name)}: connections for a request without SQL",
                name,
                of="checkouts",
                unit="connections",
                target=taken,
            ),
        ]
    return made


def beside(path: str, what: str) -> list[Measure]:
    """Requests per second of ours and of each of the others."""
    prefix, ours = path.removeprefix("/"), turn_of(OURS, path)
    targets = {BY_HAND: at_least(0.97), **dict.fromkeys(LABELS, at_least(1)), "alchemy": None}
    made = []
    for name in (BY_HAND, *LABELS, BARE):
        measure = Measure(
            f"{prefix}-{key(name)}",
            f"requests a second, {what}, {words(OURS)}",
            ours,
            words(name),
            turn_of(name, path),
            inverse=True,
            target=targets.get(name),
        )
        cpu = Measure(
            f"{prefix}-{key(name)}-cpu",
            f"CPU time of the server, {what}, {words(OURS)}",
            ours,
            words(name),
            turn_of(name, path),
            of="cpu",
        )
        made += [measure, cpu]
    control = Measure(
        f"{prefix}-control",
        f"control: requests a second, {what}, by hand",
        turn_of(CONTROL, path),
        "itself",
        turn_of(BY_HAND, path),
    )
    bare = Measure(
        f"{prefix}-dependency",
        f"requests a second, {what}, {words(BARE)}",
        turn_of(BARE, path),
        words(BY_HAND),
        turn_of(BY_HAND, path),
        inverse=True,
    )
    return [*made, bare, *with_cpu(control)]


BENCHMARK = Benchmark(
    title="Sessions over HTTP",
    about="FastAPI under uvicorn, a server process for each contestant, eight connections.",
    packages=("fastapi", "uvicorn"),
    experiments=(
        Experiment(
            "The worth of an answer",
            contestants,
            tuple(truth()),
            seconds=6,
            rounds=5,
            warm_up=1,
        ),
        Experiment(
            "Requests",
            lambda url: contestants(url, INSERT, BOTH),
            (*beside(INSERT, "INSERT"), *beside(BOTH, "SELECT and INSERT")),
            note="Nothing behind `Depends` can come closer to code in the endpoint than the "
            "shortest dependency does: what it lacks to 1 is the price of FastAPI's dependencies.",
            seconds=36,
            warm_up=3,
        ),
    ),
)

if __name__ == "__main__":
    alone("sessions")
