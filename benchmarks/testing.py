"""What tests pay for their databases. Run as `python -m benchmarks.testing`.

- `cleanup_tables` after a test that wrote into three of 200 tables, against fastapi-toolsets' own,
  and against a DELETE of just those three by a program that knows which they are, and that has an
  index on the foreign key between them; and over 1 to 100,000 rows in them;
- a database for a worker as a copy of a template, until it can be used, against CREATE DATABASE and
  `create_all` of 50 tables by hand, and against fastapi-toolsets' `create_worker_database` with the
  same `create_all`.

Copying a template is copying some 600 files, so that part measures the disk as much as anything.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, ClassVar, TypeAlias

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
    make_url,
    text,
)
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks._declared import Benchmark, Curve, Experiment, Measure, at, at_least, at_most
from benchmarks._harness import Figures, Turn, backend_of, clocked, engines, plain
from benchmarks._peers import LABELS, TOOLSETS
from benchmarks._run import alone
from benchmarks._worker import workers
from pgtoolset import cleanup_tables, create_database, drop_database
from pgtoolset.databases import seal_database
from pgtoolset.testing import create_worker_database

PREFIX = "pgtoolset_benchmark"
TEMPLATE = f"{PREFIX}_template"
SIZES = (1, 10, 100, 1_000, 10_000, 100_000)

Clean: TypeAlias = Callable[[AsyncSession], Awaitable[None]]


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

    metadata: ClassVar = tables(200)


#: The tables that are written to, a referenced one last.
DIRTY = ("table_13", "table_12", "table_100")


def in_database(url: str, name: str) -> str:
    """The URL of another database on the same server."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


async def create_all(url: str, metadata: MetaData) -> None:
    async with engines(url, 1) as (engine,), engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


async def dirty(session: AsyncSession, rows: int) -> None:
    """Insert so many rows into a table and into one that references it, and one into another."""
    series = f"generate_series(1, {rows}) n"
    await session.execute(text(f"INSERT INTO table_12 (id, name) SELECT n, 'one' FROM {series}"))
    await session.execute(text(f"INSERT INTO table_13 (before_id) SELECT n FROM {series}"))
    await session.execute(text("INSERT INTO table_100 (name) VALUES ('three')"))
    await session.commit()


async def by_hand(session: AsyncSession) -> None:
    for name in DIRTY:
        await session.execute(text(f"DELETE FROM {name}"))
    await session.execute(
        text("SELECT setval('table_13_id_seq', 1, false), setval('table_100_id_seq', 1, false)")
    )
    await session.commit()


async def ours(session: AsyncSession) -> None:
    await cleanup_tables(session, Base)


#: From so many rows on, each turn begins with tables that are new: dead rows would pile up.
MANY = 1_000


async def begin_anew(url: str) -> None:
    """Empty the tables that are written to, and end what still works on them."""
    connection = await asyncpg.connect(plain(url))
    try:
        await connection.execute(
            """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
               WHERE datname = current_database() AND state <> 'idle'
               AND backend_type = 'client backend' AND pid <> pg_backend_pid()"""
        )
        await connection.execute(f"TRUNCATE {', '.join(DIRTY)} RESTART IDENTITY CASCADE")
    finally:
        await connection.close()


@asynccontextmanager
async def cleaned(
    url: str, name: str, clean: Clean, *, index: bool = False
) -> AsyncIterator[Callable[..., Any]]:
    """A turn for a number of rows, in a database of its own: what one truncates, the others would
    have to plan again.

    A turn that fails leaves nothing to the next one: each has a session of its own.
    """
    async with create_worker_database(url, name, prefix=f"{PREFIX}_clean") as own:
        await create_all(own, Base.metadata)
        async with engines(own, 1) as (engine,):
            if index:
                async with engine.begin() as connection:
                    await connection.execute(text("CREATE INDEX ON table_13 (before_id)"))
            has_failed = False

            async def run(rows: int) -> Figures:
                nonlocal has_failed
                if has_failed or rows >= MANY:
                    await begin_anew(own)
                has_failed = True
                async with AsyncSession(engine) as session:
                    backend = await backend_of(session)
                    await session.rollback()
                    if rows:
                        await dirty(session, rows)
                    with clocked(1, backend) as figures:
                        await clean(session)
                has_failed = False
                return figures

            yield run


@asynccontextmanager
async def peer(url: str) -> AsyncIterator[dict[str, Callable[..., Awaitable[Figures]]]]:
    """fastapi-toolsets, in databases whose names have its version."""
    db = importlib.import_module("fastapi_toolsets.db")
    utils = importlib.import_module("fastapi_toolsets.pytest.utils")
    is_old = hasattr(db, "cleanup_tables")
    if not is_old:
        db = importlib.import_module("fastapi_toolsets.db.testing")
    name = "peer3" if is_old else "peer6"

    async def theirs(session: AsyncSession) -> None:
        await db.cleanup_tables(session, Base)

    async def worker_database() -> Figures:
        if is_old:
            own = utils.create_worker_database(url, default_test_db=f"{PREFIX}_{name}")
        else:
            own = utils.create_worker_database(url, prefix=f"{PREFIX}_{name}", server_url=url)
        return await until_ready(own, fill=True)

    async with cleaned(url, name, theirs) as clean:
        yield {"clean": clean, "database": worker_database}


@asynccontextmanager
async def cleaners(url: str, sizes: tuple[int, ...]) -> AsyncIterator[Mapping[str, Turn]]:
    async with (
        cleaned(url, "ours", ours) as our_turn,
        # Without it, 100,000 rows take PostgreSQL a quarter of an hour.
        cleaned(url, "hand", by_hand, index=True) as hand,
        workers(TOOLSETS, "benchmarks.testing:peer", url) as peers,
    ):
        turns: dict[str, Turn] = {"nothing": partial(our_turn, 0)}
        for size in sizes:
            turns[at("pgtoolset", size)] = partial(our_turn, size)
            turns[at("hand", size)] = partial(hand, size)
            for name, worker in peers.items():
                turns[at(name, size)] = worker.turn("clean", size)
        yield turns


async def until_ready(block: AbstractAsyncContextManager[str], *, fill: bool) -> Figures:
    """The time until a database with 50 tables can be used."""
    with clocked() as figures:
        url = await block.__aenter__()
        if fill:
            await create_all(url, tables(50))
    await block.__aexit__(None, None, None)
    return figures


async def created_by_hand(url: str) -> Figures:
    name = f"{PREFIX}_hand"
    with clocked() as figures:
        connection = await asyncpg.connect(plain(url))
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        await create_all(in_database(url, name), tables(50))
    await drop_database(name, server_url=url)
    return figures


@asynccontextmanager
async def databases(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    await drop_database(TEMPLATE, server_url=url, missing_ok=True, force=True)
    await create_database(TEMPLATE, server_url=url)
    await create_all(in_database(url, TEMPLATE), tables(50))
    await seal_database(TEMPLATE, server_url=url)

    def made(**options: Any) -> AbstractAsyncContextManager[str]:
        return create_worker_database(url, prefix=PREFIX, **options)

    async with workers(TOOLSETS, "benchmarks.testing:peer", url) as peers:
        turns: dict[str, Turn] = {
            "template": lambda: until_ready(made(template=TEMPLATE), fill=False),
            "empty": lambda: until_ready(made(), fill=True),
            "hand": partial(created_by_hand, url),
        }
        yield turns | {name: worker.turn("database") for name, worker in peers.items()}
    await drop_database(TEMPLATE, server_url=url)


DATABASE = "`create_worker_database(template=...)`"

BENCHMARK = Benchmark(
    title="Databases of tests",
    about="Emptying tables between tests, and a database for each worker.",
    experiments=(
        Experiment(
            "`cleanup_tables`, 3 of 200 tables with rows",
            partial(cleaners, sizes=(2,)),
            (
                *(
                    Measure(
                        f"cleanup-{name.replace(' ', '-')}",
                        f"{LABELS[name]}, `cleanup_tables`",
                        at("pgtoolset", 2),
                        "`cleanup_tables`",
                        at(name, 2),
                        inverse=True,
                        target=at_least(15) if name == TOOLSETS[-1] else None,
                    )
                    for name in TOOLSETS
                ),
                Measure(
                    "cleanup-by-hand",
                    "`cleanup_tables`",
                    at("pgtoolset", 2),
                    "DELETE from those three by hand",
                    at("hand", 2),
                    target=at_most(3),
                ),
                Measure(
                    "cleanup-nothing",
                    "`cleanup_tables` where all are empty",
                    "nothing",
                    unit="ms",
                    scale=1000,
                ),
            ),
            note="By hand, the three tables are known. `cleanup_tables` looks at all 200 first: "
            "the row of empty tables is this look alone.",
            seconds=12,
        ),
        Experiment(
            "`cleanup_tables` with 1 to 100,000 rows in two of 200 tables",
            partial(cleaners, sizes=SIZES),
            curves=(
                Curve(
                    "cleanup",
                    "cleanup_tables, 3 of 200 tables with rows",
                    "rows",
                    "ms",
                    SIZES,
                    {"pgtoolset": "pgtoolset", "hand": "DELETE by hand, with an index"}
                    | {name: LABELS[name] for name in TOOLSETS},
                    scale=1000,
                ),
            ),
            seconds=15,
            rounds=20,
            warm_up=1,
            quick=False,
        ),
        Experiment(
            "A worker's database with 50 tables, until it can be used",
            databases,
            (
                Measure(
                    "worker-by-hand",
                    "CREATE DATABASE and `create_all`",
                    "template",
                    DATABASE,
                    "hand",
                    inverse=True,
                    target=at_least(2),
                ),
                Measure(
                    "worker-empty",
                    "`create_worker_database()` and `create_all`",
                    "template",
                    DATABASE,
                    "empty",
                    inverse=True,
                ),
                *(
                    Measure(
                        f"worker-{name.replace(' ', '-')}",
                        f"{LABELS[name]}, `create_worker_database` and `create_all`",
                        "template",
                        DATABASE,
                        name,
                        inverse=True,
                    )
                    for name in TOOLSETS
                ),
            ),
            seconds=14,
            warm_up=1,
        ),
    ),
)

if __name__ == "__main__":
    alone("testing")
