"""What the library does for each statement: noted with its holder, at the price of two calls."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

import pgtoolset
from pgtoolset import (
    TransactionAbortedError,
    create_db_context,
    deadline,
    get_transaction,
    holders,
)
from tests.support import Item, stored, swallow_error

Maker = async_sessionmaker[AsyncSession]

_HERE = str(Path(pgtoolset.__file__).parent)


@contextmanager
def calls_of_ours() -> Iterator[Counter[str]]:
    """Counts the calls of functions of the library, in each greenlet."""
    counts: Counter[str] = Counter()

    def note(frame: Any, happened: str, _: object) -> None:
        if happened == "call" and frame.f_code.co_filename.startswith(_HERE):
            counts[frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("nested", [False, True])
async def test_a_statement_costs_one_call(session_maker: Maker, nested: bool) -> None:
    """Without a deadline and settings a statement is one call of the library's, and a text of the
    caller's is two."""
    async with create_db_context(session_maker)() as session, AsyncExitStack() as stack:
        if nested:
            await stack.enter_async_context(get_transaction(session))
        for statement in (text("SELECT 1"), select(Item)):
            await session.execute(statement)
        for statement, most in ((text("SELECT 1"), 2), (select(Item), 1)):
            with calls_of_ours() as counts:
                await session.execute(statement)
            assert 1 <= counts.total() <= most, counts


async def test_a_deadline_elsewhere_costs_nothing(session_maker: Maker) -> None:
    """A deadline that has ended leaves nothing behind for the statements after it."""
    async with create_db_context(session_maker)() as session:
        with deadline(60):
            await session.execute(text("SELECT 1"))
        await session.execute(text("SELECT 1"))
        with calls_of_ours() as ours:
            await session.execute(text("SELECT 1"))
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
        with calls_of_ours() as ours:
            await session.execute(text("SELECT 1"))
    assert ours.total() <= 2, ours


# Around the methods of a dialect


def wrap(engine: AsyncEngine, seen: list[str]) -> None:
    """Do what tools do that follow statements: put a function around a method of the dialect."""
    execute = engine.dialect.do_execute

    def traced(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        seen.append(statement)
        execute(cursor, statement, parameters, context=context)

    vars(engine.dialect)["do_execute"] = traced


@pytest.mark.parametrize("moment", ["before", "between", "after"])
async def test_a_dialect_that_others_wrap(
    engine: AsyncEngine, session_maker: Maker, moment: str
) -> None:
    """A function that others put around a method of the dialect goes on to be called, once for
    each statement, whenever they have done so."""
    seen: list[str] = []
    if moment == "before":
        wrap(engine, seen)
    assert holders(engine) == []
    if moment == "between":
        wrap(engine, seen)
    db_context = create_db_context(session_maker)
    async with db_context() as session:
        await session.execute(text("SELECT 1"))
    if moment == "after":
        wrap(engine, seen)
    del seen[:]
    async with db_context() as session:
        await session.execute(text("SELECT 'noted'"))
        [holder] = holders(engine)
        assert holder.statement == "SELECT 'noted'"
    assert [each for each in seen if "noted" in each] == ["SELECT 'noted'"]


@pytest.mark.parametrize("noted", [False, True])
async def test_a_statement_without_a_context(engine: AsyncEngine, noted: bool) -> None:
    """The methods take a statement without its context, as those of SQLAlchemy do."""
    if noted:
        async with create_db_context(async_sessionmaker(engine))() as session:
            await session.execute(text("SELECT 1"))
    assert holders(engine) == []

    def run(connection: Connection) -> list[Any]:
        dialect: Any = connection.dialect
        found: list[Any] = []
        for execute, arguments in (
            (dialect.do_execute, ["SELECT 1", ()]),
            (dialect.do_execute_no_params, ["SELECT 2"]),
        ):
            cursor: Any = connection.connection.cursor()
            execute(cursor, *arguments)
            found.append(cursor.fetchone()[0])
            cursor.close()
        return found

    async with engine.connect() as connection:
        assert await connection.run_sync(run) == [1, 2]


async def test_each_way_to_execute_is_noted(engine: AsyncEngine, session_maker: Maker) -> None:
    """A statement is noted however SQLAlchemy sends it: with parameters, without, and many."""
    async with create_db_context(session_maker)() as session:
        connection = await session.connection()
        plain = {"no_parameters": True}
        insert, rows = "INSERT INTO item (id, name) VALUES (:id, '')", [{"id": 1}, {"id": 2}]
        for sending, beginning in (
            (connection.execute(text("SELECT 1")), "SELECT 1"),
            (connection.exec_driver_sql("SELECT 2", execution_options=plain), "SELECT 2"),
            (connection.execute(text(insert), rows), "INSERT INTO item"),
        ):
            await sending
            [holder] = holders(engine)
            assert str(holder.statement).startswith(beginning)


# Which connection a statement is noted with, and which COMMIT is verified


async def test_a_detached_connection(engine: AsyncEngine, session_maker: Maker, other: Any) -> None:
    """What runs on a connection that has left its pool is not noted with the next one that has its
    place there, and is committed."""
    async with session_maker() as session, get_transaction(session):
        connection = await session.connection()
        pooled: Any = await connection.get_raw_connection()
        raw = pooled.driver_connection
        connection.sync_connection.detach()  # type: ignore[union-attr]
        assert holders(engine) == []
        async with create_db_context(session_maker)() as next_one:
            await next_one.execute(text("SELECT 'next'"))
            await session.execute(text("INSERT INTO item (id, name) VALUES (1, '')"))
            [holder] = holders(engine)
            assert holder.statement == "SELECT 'next'"
    await raw.close()  # SQLAlchemy leaves one of psycopg to its destructor
    assert await stored(other) == {1}


async def test_two_engines_with_one_pool(engine: AsyncEngine, database_url: str) -> None:
    """A commit is verified over each engine, also where the pool's connections are known from
    another one."""
    second = create_async_engine(database_url, pool=engine.sync_engine.pool)
    for each in (engine, second):
        db_context = create_db_context(async_sessionmaker(each))
        async with db_context() as session:
            await session.execute(text("SELECT 1"))
        with pytest.raises(TransactionAbortedError):
            async with db_context() as session:
                await swallow_error(session)
