"""What tests pay for their databases. Run as `python -m benchmarks.testing`.

- `cleanup_tables` after a test that wrote into three of 200 tables, against fastapi-toolsets' own,
and against a DELETE
  of just those three by a program that knows which they are;
- a database for a worker as a copy of a template, until it can be used, against CREATE DATABASE and
`create_all` of 50
  tables by hand, and against fastapi-toolsets' `create_worker_database` with the same `create_all`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import asyncpg
from sqlalchemy import (
    Column,
    DateTime,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    Text,
    func,
    insert,
    make_url,
    text,
)
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from benchmarks import _peers
from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import cleanup_tables, create_database, drop_database
from pgtoolset.databases import seal_database
from pgtoolset.testing import create_worker_database

PREFIX = "pgtoolset_benchmark"


def tables(count: int) -> MetaData:
    """Tables as an application has them: a serial, an index, and for three of four a reference to
    the one before."""
    metadata = MetaData()
    for number in range(count):
        Table(
            f"table_{number}",
            metadata,
            Column("id", Integer, primary_key=True),
            Column("name", Text, index=True),
            Column("created", DateTime(timezone=True), server_default=func.now()),
            *([Column("before_id", ForeignKey(f"table_{number - 1}.id"))] if number % 4 else []),
        )
    return metadata


class Base:
    """What fastapi-toolsets takes for a declarative base."""

    metadata = tables(200)


def load_peer(module: str) -> Any:
    folder = _peers.install(f"fastapi-toolsets=={_peers.FASTAPI_TOOLSETS[-1]}")
    if folder is None:
        return None
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        return importlib.import_module(f"fastapi_toolsets.{module}")
    except ImportError as error:
        print(f"fastapi-toolsets: left out, because it cannot be imported: {error}")
        return None


async def create_all(url: str, metadata: MetaData) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


async def cleaning(server_url: str, rounds: int) -> None:
    """Three dirty tables of 200."""
    peer = load_peer("db.testing")
    parent, child, other = (Base.metadata.tables[f"table_{number}"] for number in (12, 13, 100))
    async with AsyncExitStack() as stack:

        async def session_on_tables(name: str) -> AsyncSession:
            """Of a database of its own: what one truncates, the others would have to plan anew."""
            url = await stack.enter_async_context(
                create_worker_database(server_url, name, prefix=f"{PREFIX}_clean")
            )
            await create_all(url, Base.metadata)
            engine = create_async_engine(url)
            stack.push_async_callback(engine.dispose)
            return await stack.enter_async_context(AsyncSession(engine))

        async def timed(
            session: AsyncSession, clean: Callable[[AsyncSession], Awaitable[None]]
        ) -> float:
            await session.execute(
                insert(parent), [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
            )
            await session.execute(insert(child), [{"before_id": 1}, {"before_id": 2}])
            await session.execute(insert(other), [{"name": "three"}])
            await session.commit()
            start = time.perf_counter()
            await clean(session)
            return time.perf_counter() - start

        async def by_hand(session: AsyncSession) -> None:
            for table in (child, parent, other):
                await session.execute(table.delete())
            await session.execute(
                text(
                    "SELECT setval('table_13_id_seq', 1, false), setval('table_100_id_seq', 1, "
                    "false)"
                )
            )
            await session.commit()

        async def ours(session: AsyncSession) -> None:
            await cleanup_tables(session, Base)

        async def theirs(session: AsyncSession) -> None:
            await peer.cleanup_tables(session, Base)

        async def nothing() -> float:
            start = time.perf_counter()
            await ours(our_session)
            return time.perf_counter() - start

        our_session, hand_session, peer_session = [
            await session_on_tables(name) for name in ("ours", "hand", "peer")
        ]
        turns: dict[str, Callable[[], Awaitable[float]]] = {
            "ours": lambda: timed(our_session, ours),
            "nothing": nothing,
            "hand": lambda: timed(hand_session, by_hand),
        }
        if peer is not None:
            turns["peer"] = lambda: timed(peer_session, theirs)
        results = await alternate(turns, rounds=rounds)
    headline("cleanup_tables, 3 of 200 tables dirty")
    if peer is not None:
        tell(
            "times faster than fastapi-toolsets",
            Spread.of_ratios(results["peer"], results["ours"]),
            ("at least", 15),
        )
    tell(
        "time / DELETE of those three by hand",
        Spread.of_ratios(results["ours"], results["hand"]),
        ("at most", 3),
    )
    for name, label in (
        ("ours", "cleanup_tables"),
        ("nothing", "with nothing to do"),
        ("peer", "fastapi-toolsets"),
    ):
        if name in results:
            print(f"    {label}: {Spread.of(results[name]).median * 1e3:.1f} ms")


async def worker_databases(server_url: str, rounds: int) -> None:
    """From nothing to a database with 50 tables that can be used."""
    metadata = tables(50)
    peer = load_peer("pytest.utils")
    template = f"{PREFIX}_template"
    await drop_database(template, server_url=server_url, missing_ok=True, force=True)
    await create_database(template, server_url=server_url)
    await create_all(
        make_url(server_url).set(database=template).render_as_string(hide_password=False), metadata
    )
    await seal_database(template, server_url=server_url)
    plain_url = "postgresql://" + server_url.partition("://")[2]

    async def until_ready(block: AbstractAsyncContextManager[str], create: bool) -> float:
        start = time.perf_counter()
        async with block as url:
            if create:
                await create_all(url, metadata)
            return time.perf_counter() - start

    async def by_hand() -> float:
        start = time.perf_counter()
        connection = await asyncpg.connect(plain_url)
        await connection.execute(f"CREATE DATABASE {PREFIX}_hand")
        await connection.close()
        url = (
            make_url(server_url)
            .set(database=f"{PREFIX}_hand")
            .render_as_string(hide_password=False)
        )
        await create_all(url, metadata)
        ready = time.perf_counter() - start
        await drop_database(f"{PREFIX}_hand", server_url=server_url)
        return ready

    turns: dict[str, Callable[[], Awaitable[float]]] = {
        "template": lambda: until_ready(
            create_worker_database(server_url, prefix=PREFIX, template=template), False
        ),
        "empty": lambda: until_ready(create_worker_database(server_url, prefix=PREFIX), True),
        "hand": by_hand,
    }
    if peer is not None:
        turns["peer"] = lambda: until_ready(
            peer.create_worker_database(server_url, prefix=f"{PREFIX}_peer", server_url=server_url),
            True,
        )
    results = await alternate(turns, rounds=rounds)
    await drop_database(template, server_url=server_url)
    headline("a worker's database with 50 tables, until it can be used")
    tell(
        "template: times faster than CREATE DATABASE and create_all",
        Spread.of_ratios(results["hand"], results["template"]),
        ("at least", 2),
    )
    tell(
        "template: times faster than without",
        Spread.of_ratios(results["empty"], results["template"]),
    )
    if peer is not None:
        tell(
            "template: times faster than fastapi-toolsets",
            Spread.of_ratios(results["peer"], results["template"]),
        )
    print(f"    from the template: {Spread.of(results['template']).median * 1e3:.0f} ms")


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url() as url:
        await cleaning(url, rounds)
        await worker_databases(url, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
