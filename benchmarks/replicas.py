"""What a read with a token costs, and which reads standbys serve while the primary is written to.
Run as `python -m benchmarks.replicas`.

One primary and one streaming standby on this machine. Compared are transactions of one SELECT on
the standby: READ ONLY by hand, a read block without a token, one whose token the connection is
known to have, and one that asks the standby each time, as for a token that is new. Then several
clients write and read what they have written, as fast as they can: each read must show it.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from tests.nodes import Nodes

from benchmarks._harness import Spread, alternate, environment, headline, tell
from pgtoolset import ReadReplicas, get_transaction
from pgtoolset.replicas import _opening

#: Reads that are timed at once.
TURNS = 50

SELECT = text("SELECT name FROM item WHERE id = 1")


@contextmanager
def asked_each_time() -> Iterator[None]:
    fresh, _opening.FRESH = _opening.FRESH, -1.0
    try:
        yield
    finally:
        _opening.FRESH = fresh


async def timed(turn: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    for _ in range(TURNS):
        await turn()
    return (time.perf_counter() - start) / TURNS


async def costs(
    replicas: ReadReplicas[AsyncSession],
    standby: async_sessionmaker[AsyncSession],
    token: str,
    rounds: int,
) -> None:
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

    async def asked() -> float:
        with asked_each_time():
            return await timed(known)

    results = await alternate(
        {
            "by hand": lambda: timed(by_hand),
            "by hand again": lambda: timed(by_hand),
            "plain": lambda: timed(plain),
            "without": lambda: timed(without),
            "known": lambda: timed(known),
            "asked": asked,
        },
        rounds=rounds,
    )

    def ratio(one: str, other: str) -> Spread:
        return Spread.of_ratios(results[one], results[other])

    headline("One SELECT on a standby that has caught up")
    tell(
        "read(after=token) / get_transaction(read_only=True)",
        ratio("known", "plain"),
        ("at most", 1.1),
    )
    tell("read(after=token) / read()", ratio("known", "without"), ("at most", 1.1))
    tell("read(after=token) / by hand", ratio("known", "by hand"))
    tell("the standby asked each time / get_transaction", ratio("asked", "plain"))
    tell("by hand, control", ratio("by hand again", "by hand"))
    print(f"    by hand: {Spread.of(results['by hand']).median * 1e6:.0f} us")


async def share(
    replicas: ReadReplicas[AsyncSession],
    primary: async_sessionmaker[AsyncSession],
    clients: int,
    seconds: float,
) -> None:
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

    await asyncio.gather(*(client(number) for number in range(clients)))
    headline(f"{clients} clients that write and read what they have written")
    print(f"reads {reads}, on the standby {on_standby / reads:.1%}, stale {stale}")


async def run(rounds: int, clients: int, seconds: float) -> None:
    environment("sqlalchemy", "asyncpg")
    nodes = Nodes(18)
    engines = []
    try:
        await nodes.start()
        makers = []
        for server in (nodes.primary, nodes.standby):
            engines.append(create_async_engine(server.url(), pool_size=clients))
            makers.append(async_sessionmaker(engines[-1], expire_on_commit=False))
        primary, standby = makers
        replicas: ReadReplicas[AsyncSession] = ReadReplicas(primary, [standby])
        async with primary() as session:
            insert = "INSERT INTO item SELECT n, '' FROM generate_series(0, 99) AS n"
            await session.execute(text(insert))
            await session.commit()
            token = await replicas.position(session)
        await nodes.caught_up()
        await costs(replicas, standby, token, rounds)
        await share(replicas, primary, clients, seconds)
    finally:
        for engine in engines:
            await engine.dispose()
        await asyncio.to_thread(nodes.stop)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.rounds, arguments.clients, arguments.seconds))


if __name__ == "__main__":
    main()
