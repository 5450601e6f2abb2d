"""What a read with a token costs, and which reads standbys serve while the primary is written to.
Run as `python -m benchmarks.replicas`.

One primary and one streaming standby on this machine. Compared are transactions of one SELECT on
the standby: READ ONLY by hand, a read block without a token, one whose token the connection is
known to have, and one that asks the standby each time, as for a token that is new. Then several
clients write and read what they have written, as fast as they can: each read must show it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TypeAlias

from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from benchmarks._declared import Benchmark, Experiment, Measure, at_most
from benchmarks._harness import Figures, Turn, timed
from benchmarks._run import alone
from pgtoolset import ReadReplicas, get_transaction
from pgtoolset.replicas import _opening

#: Reads in one turn, and clients that write.
CLIENTS = 8

SELECT = text("SELECT name FROM item WHERE id = 1")

Replicas: TypeAlias = ReadReplicas[AsyncSession]
Maker: TypeAlias = async_sessionmaker[AsyncSession]


@contextmanager
def asked_each_time() -> Iterator[None]:
    fresh, _opening.FRESH = _opening.FRESH, -1.0
    try:
        yield
    finally:
        _opening.FRESH = fresh


@asynccontextmanager
async def two_nodes() -> AsyncIterator[tuple[Maker, Maker]]:
    """Session factories of a primary and of its standby."""
    from tests.nodes import Nodes

    nodes = Nodes(18)
    engines: list[AsyncEngine] = []
    try:
        await nodes.start()
        urls = [server.url() for server in (nodes.primary, nodes.standby)]
        engines += [create_async_engine(url, pool_size=CLIENTS) for url in urls]
        primary, standby = (async_sessionmaker(each, expire_on_commit=False) for each in engines)
        async with primary() as session:
            insert = "INSERT INTO item SELECT n, '' FROM generate_series(0, 99) AS n"
            await session.execute(text(insert))
            await session.commit()
        await nodes.caught_up()
        yield primary, standby
    finally:
        for engine in engines:
            await engine.dispose()
        await asyncio.to_thread(nodes.stop)


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with two_nodes() as (primary, standby):
        replicas: Replicas = ReadReplicas(primary, [standby])
        async with primary() as session:
            await session.execute(SELECT)
            token = await replicas.position(session)

        async def by_hand() -> None:
            async with standby() as session:
                await session.connection(execution_options={"postgresql_readonly": True})
                await session.scalar(SELECT)
                await session.commit()

        async def plain() -> None:
            async with standby() as session, get_transaction(session, read_only=True):
                await session.scalar(SELECT)

        async def without() -> None:
            async with replicas.read() as session:
                await session.scalar(SELECT)

        async def known() -> None:
            async with replicas.read(after=token) as session:
                await session.scalar(SELECT)

        async def asked() -> Figures:
            with asked_each_time():
                return await timed(known)

        yield {
            "by hand": partial(timed, by_hand),
            "control": partial(timed, by_hand),
            "plain": partial(timed, plain),
            "without": partial(timed, without),
            "known": partial(timed, known),
            "asked": asked,
        }


async def under_load(replicas: Replicas, primary: Maker, seconds: float) -> Figures:
    """The shares of reads that a standby served, and that did not show what their client wrote."""
    on_standby = reads = stale = 0
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal on_standby, reads, stale
        value = 0
        while time.monotonic() < end:
            value += 1
            async with primary() as session:
                await session.execute(
                    text("UPDATE item SET name = :value WHERE id = :id"),
                    {"value": str(value), "id": number},
                )
                await session.commit()
                token = await replicas.position(session)
            async with replicas.read(after=token, isolation_level="REPEATABLE READ") as session:
                look = text("SELECT name, pg_is_in_recovery() FROM item WHERE id = :id")
                name, recovers = (await session.execute(look, {"id": number})).one()
                reads += 1
                stale += name != str(value)
                on_standby += recovers

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return {"standby": on_standby / reads, "stale": stale, "rate": reads / seconds}


@asynccontextmanager
async def loaded(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with two_nodes() as (primary, standby):
        replicas: Replicas = ReadReplicas(primary, [standby])
        yield {"clients": partial(under_load, replicas, primary, 2.0)}


READ = "`read(after=token)`"

BENCHMARK = Benchmark(
    title="Reading on standbys",
    about="A primary and a streaming standby on this machine.",
    experiments=(
        Experiment(
            "One SELECT on a standby that has caught up",
            contestants,
            (
                Measure(
                    "token",
                    READ,
                    "known",
                    "`get_transaction(read_only=True)` on it",
                    "plain",
                    target=at_most(1.1),
                ),
                Measure("token-none", READ, "known", "`read()`", "without", target=at_most(1.1)),
                Measure("token-by-hand", READ, "known", "READ ONLY by hand", "by hand"),
                Measure(
                    "token-asked",
                    f"{READ}, the standby asked each time",
                    "asked",
                    "`get_transaction(read_only=True)` on it",
                    "plain",
                ),
                Measure("control", "control: by hand", "control", "itself", "by hand"),
            ),
            seconds=14,
        ),
        Experiment(
            f"{CLIENTS} clients that write and read what they have written",
            loaded,
            (
                Measure(
                    "on-standby",
                    "reads that the standby served",
                    "clients",
                    of="standby",
                    unit="%",
                    scale=100,
                ),
                Measure(
                    "stale",
                    "reads that did not show the write",
                    "clients",
                    of="stale",
                    unit="reads",
                    target=at_most(0),
                ),
            ),
            seconds=4,
            warm_up=1,
        ),
    ),
)

if __name__ == "__main__":
    alone("replicas")
