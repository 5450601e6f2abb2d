"""What locks cost beside the bare statements, while they are free. Run as `python -m
benchmarks.locks`.

Each contestant works in a transaction that is open already, on a warm connection, and rolls back to
a savepoint after each turn, where the lock would otherwise be held already. So all are timed inside
a savepoint, which `lock_tables` and `advisory_lock` make anyway. `lock_rows` is timed with the
loading of its rows, in a transaction of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

import asyncpg
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks._declared import Benchmark, Curve, Experiment, Measure, at, at_most
from benchmarks._harness import Figures, Turn, backend_of, clocked, engines, plain, tables
from benchmarks._peers import LABELS, TOOLSETS
from benchmarks._run import alone
from benchmarks._worker import workers
from pgtoolset import advisory_lock, lock_rows, lock_tables

#: Calls in one turn: some ten milliseconds, so that there are many turns, and few that something
#: else on the machine has hit. In a shorter turn the caches are still those of the one before.
TURNS = 8
SIZES = (1, 10, 100, 1_000, 10_000, 100_000)

Step: TypeAlias = Callable[[AsyncSession], Awaitable[None]]


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "pgtoolset_benchmark_row"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def empty_table(number: int) -> Any:
    """A mapped class with an empty table."""
    name = f"pgtoolset_benchmark_lock_{number}"
    annotations = {"id": Mapped[int]}
    members = {"__tablename__": name, "id": mapped_column(primary_key=True)}
    return type(f"Lock{number}", (Base,), {**members, "__annotations__": annotations})


MODELS = [empty_table(number) for number in range(10)]


class Undo(Exception):
    """Ends a turn, and its locks with it."""


def ours(models: Sequence[Any], timeout: Any = "5s") -> Step:
    async def step(session: AsyncSession) -> None:
        async with lock_tables(session, models, mode="EXCLUSIVE", timeout=timeout):
            raise Undo

    return step


def bare(models: Sequence[Any]) -> Step:
    limit = text("SET LOCAL lock_timeout = '5s'")
    names = ", ".join(model.__tablename__ for model in models)
    lock = text(f"LOCK TABLE {names} IN EXCLUSIVE MODE")

    async def step(session: AsyncSession) -> None:
        async with session.begin_nested():
            await session.execute(limit)
            await session.execute(lock)
            raise Undo

    return step


async def advisory(session: AsyncSession) -> None:
    async with advisory_lock(session, 7_000_000_001):
        raise Undo


async def bare_advisory(session: AsyncSession) -> None:
    async with session.begin_nested():
        await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": 7_000_000_001})
        raise Undo


async def timed(engine: AsyncEngine, step: Step) -> Figures:
    """The time of one turn; the first is not measured."""
    async with AsyncSession(engine) as session:
        await session.begin()
        backend = await backend_of(session)
        with suppress(Undo):
            await step(session)
        with clocked(TURNS, backend) as figures:
            for _ in range(TURNS):
                with suppress(Undo):
                    await step(session)
        await session.rollback()
    return figures


@asynccontextmanager
async def peer(url: str) -> AsyncIterator[dict[str, Callable[..., Awaitable[Figures]]]]:
    """fastapi-toolsets: until version 3 `lock_tables` made a savepoint, and so undid its locks."""
    db: Any = importlib.import_module("fastapi_toolsets.db")
    mode = db.LockMode.EXCLUSIVE

    async def own_savepoint(session: AsyncSession) -> None:
        async with db.lock_tables(session, MODELS[:1], mode=mode):
            raise Undo

    async def savepoint_around(session: AsyncSession) -> None:
        async with session.begin_nested():
            async with db.lock_tables(None, MODELS[:1], session=session, mode=mode):
                raise Undo

    step = savepoint_around if hasattr(db, "Database") else own_savepoint
    async with engines(url, 1) as (engine,):
        yield {"one": partial(timed, engine, step)}


@asynccontextmanager
async def free_tables(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with (
        engines(url, 2) as (our_engine, their_engine),
        tables(our_engine, Base.metadata),
        workers(TOOLSETS, "benchmarks.locks:peer", url) as peers,
    ):
        yield {
            "one": partial(timed, our_engine, ours(MODELS[:1])),
            "one, bare": partial(timed, their_engine, bare(MODELS[:1])),
            "control": partial(timed, their_engine, bare(MODELS[:1])),
            "ten": partial(timed, our_engine, ours(MODELS)),
            "ten, bare": partial(timed, their_engine, bare(MODELS)),
            "no lookout": partial(timed, our_engine, ours(MODELS[:1], None)),
            "advisory": partial(timed, our_engine, advisory),
            "advisory, bare": partial(timed, their_engine, bare_advisory),
        } | {name: worker.turn("one") for name, worker in peers.items()}


async def rows_of(engine: AsyncEngine, lock: Callable[[AsyncSession], Awaitable[Any]]) -> Figures:
    """The time of locking and loading rows, in a transaction that is rolled back."""
    async with AsyncSession(engine) as session:
        backend = await backend_of(session)
        with clocked(1, backend) as figures:
            await lock(session)
        await session.rollback()
    return figures


async def raw_rows(raw: asyncpg.Connection, size: int) -> Figures:
    """The same statement for asyncpg, which makes no instance of a row."""
    sql = f"SELECT id, name FROM {Row.__tablename__} WHERE id = ANY($1) ORDER BY id FOR UPDATE"
    keys = list(range(1, size + 1))
    transaction = raw.transaction()
    await transaction.start()
    with clocked(1, raw.get_server_pid()) as figures:
        await raw.fetch(sql, keys)
    await transaction.rollback()
    return figures


async def selected(size: int, session: AsyncSession) -> None:
    """What one writes by hand: IN, which has one parameter for each key."""
    statement = select(Row).where(Row.id.in_(range(1, size + 1))).order_by(Row.id)
    (await session.scalars(statement.with_for_update())).all()


async def locked(size: int, session: AsyncSession) -> None:
    await lock_rows(session, Row, range(1, size + 1))


@asynccontextmanager
async def rows(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with (
        engines(url, 2) as (our_engine, their_engine),
        tables(our_engine, Base.metadata),
        AsyncExitStack() as stack,
    ):
        async with our_engine.begin() as connection:
            series = f"generate_series(1, {SIZES[-1]})"
            insert = f"INSERT INTO {Row.__tablename__} SELECT n, 'row ' || n FROM {series} n"
            await connection.execute(text(insert))
            await connection.execute(text(f"ANALYZE {Row.__tablename__}"))
        raw = await asyncpg.connect(plain(url))
        stack.push_async_callback(raw.close)
        turns: dict[str, Turn] = {}
        for size in SIZES:
            turns[at("pgtoolset", size)] = partial(rows_of, our_engine, partial(locked, size))
            turns[at("sqlalchemy", size)] = partial(rows_of, their_engine, partial(selected, size))
            turns[at("raw", size)] = partial(raw_rows, raw, size)
        yield turns


BENCHMARK = Benchmark(
    title="Locks",
    about="Locks that are free, in a transaction that is open already.",
    experiments=(
        Experiment(
            "Tables and keys",
            free_tables,
            (
                Measure(
                    "one-table",
                    "`lock_tables` on one table",
                    "one",
                    "a savepoint, `SET LOCAL lock_timeout` and `LOCK TABLE`",
                    "one, bare",
                    target=at_most(1.10),
                ),
                Measure(
                    "ten-tables",
                    "`lock_tables` on ten tables",
                    "ten",
                    "a savepoint and the same two round trips",
                    "ten, bare",
                    target=at_most(1.0),
                ),
                Measure(
                    "lookout",
                    "`lock_tables` with a timeout, and so a lookout for blockers",
                    "one",
                    "the same without",
                    "no lookout",
                    target=at_most(1.05),
                ),
                Measure(
                    "advisory",
                    "`advisory_lock`",
                    "advisory",
                    "a savepoint and `pg_advisory_xact_lock`",
                    "advisory, bare",
                    target=at_most(1.05),
                ),
                *(
                    Measure(
                        f"one-table-{name.replace(' ', '-')}",
                        "`lock_tables` on one table",
                        "one",
                        f"{LABELS[name]}, in a savepoint",
                        name,
                    )
                    for name in TOOLSETS
                ),
                Measure(
                    "control", "control: the bare statements", "control", "themselves", "one, bare"
                ),
            ),
            seconds=16,
            rounds=1_000,
            warm_up=4,
        ),
        Experiment(
            "Rows",
            rows,
            curves=(
                Curve(
                    "lock-rows",
                    "lock_rows: rows locked and loaded",
                    "rows",
                    "ms",
                    SIZES,
                    {
                        "pgtoolset": "pgtoolset",
                        "sqlalchemy": "SQLAlchemy, IN and FOR UPDATE",
                        "raw": "raw asyncpg, ANY and FOR UPDATE",
                    },
                    scale=1000,
                ),
            ),
            seconds=12,
            rounds=20,
            warm_up=1,
        ),
    ),
)

if __name__ == "__main__":
    alone("locks")
