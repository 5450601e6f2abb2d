"""`holders(engine)`: each connection that is out, by whom, since when, from where, with what."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import AssertionPool, NullPool, StaticPool

from pgtoolset import (
    CodeLocation,
    UnsupportedDriverError,
    UnsupportedVersionError,
    create_db_context,
    create_db_dependency,
    get_transaction,
    holders,
    run_transaction,
    wait_for_row_change,
)
from tests.support import Item, insert

Maker = async_sessionmaker[AsyncSession]


def here() -> CodeLocation:
    """The line that calls."""
    frame = sys._getframe(1)
    return CodeLocation(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


async def test_a_holder(engine: AsyncEngine, session_maker: Maker) -> None:
    """A holder has the name of its task, its age, the line that took it, the last statement."""
    began_at = time.monotonic()

    async def place_order() -> None:
        async with create_db_context(session_maker)() as session:
            assert holders(engine) == []
            where = here(), await session.execute(text("SELECT 1"))
            [first] = holders(engine)
            await session.execute(text("SELECT  CAST(:secret AS text)"), {"secret": "hunter2"})
            [second] = holders(engine)
            for each in (first, second):
                assert each.task == "order 7"
                assert each.where == where[0]
                assert 0 <= each.seconds <= time.monotonic() - began_at
            assert (first.statement, second.seconds > first.seconds) == ("SELECT 1", True)
            assert str(second.statement).startswith("SELECT CAST(")
            assert "hunter2" not in str(second)
        assert holders(engine) == []

    await asyncio.create_task(place_order(), name="order 7")


async def test_the_longest_first(engine: AsyncEngine, session_maker: Maker) -> None:
    """The holder of the longest time stands first."""
    db_context = create_db_context(session_maker)
    async with db_context() as one, db_context() as two, db_context() as three:
        for number, session in enumerate((two, three, one)):
            await session.execute(text(f"SELECT {number}"))
        found = holders(engine)
        assert [each.statement for each in found] == ["SELECT 0", "SELECT 1", "SELECT 2"]
        assert [each.seconds for each in found] == sorted((e.seconds for e in found), reverse=True)


async def test_a_long_statement_is_cut(engine: AsyncEngine, session_maker: Maker) -> None:
    """A statement is one line, cut, without control characters and passwords."""
    hostile = "SELECT\n'\x1b[2J postgresql://me:hunter2@h/db' " + "-- x" * 100
    async with create_db_context(session_maker)() as session:
        await (await session.connection()).exec_driver_sql(hostile)
        [holder] = holders(engine)
    assert str(holder).isprintable()
    assert "hunter2" not in repr(holder)
    assert len(str(holder.statement)) < 250


# Where a connection was taken


@asynccontextmanager
async def helper(session: AsyncSession) -> AsyncIterator[AsyncSession]:
    yield session


async def in_a_context(maker: Maker) -> CodeLocation:
    async with create_db_context(maker)() as session:
        await insert(session, 1)
        return located(session)


def located(session: AsyncSession) -> CodeLocation:
    [holder] = holders(session.bind)  # type: ignore[arg-type]
    assert holder.where is not None
    return holder.where


async def by_run_transaction(maker: Maker) -> CodeLocation:
    async def work(session: AsyncSession) -> CodeLocation:
        await insert(session, 1)
        return located(session)

    return await run_transaction(maker, work)


async def by_get_transaction(maker: Maker) -> CodeLocation:
    async with maker() as session, get_transaction(session):
        await insert(session, 1)
        return located(session)


async def in_a_savepoint(maker: Maker) -> CodeLocation:
    async with create_db_context(maker)() as session, get_transaction(session):
        await insert(session, 1)
        return located(session)


async def by_a_task(maker: Maker) -> CodeLocation:
    async with create_db_context(maker)() as session:
        await asyncio.wait_for(asyncio.create_task(insert(session, 1)), 60)
        return located(session)


async def by_a_task_group(maker: Maker) -> CodeLocation:
    async with create_db_context(maker)() as session:
        async with asyncio.TaskGroup() as group:
            group.create_task(insert(session, 1))
        return located(session)


async def in_a_context_manager(maker: Maker) -> CodeLocation:
    async with create_db_context(maker)() as session, helper(session) as same:
        await insert(same, 1)
        return located(session)


@pytest.mark.parametrize(
    "use",
    [
        in_a_context,
        by_run_transaction,
        by_get_transaction,
        in_a_savepoint,
        by_a_task,
        by_a_task_group,
        in_a_context_manager,
    ],
)
async def test_where(session_maker: Maker, use: Callable[[Maker], Any]) -> None:
    """The line is that of the application, however many of ours and of SQLAlchemy lie below."""
    where = await use(session_maker)
    assert where.function == "insert"
    assert where.file.endswith("support.py")
    assert str(where).startswith("tests/support.py:")


async def test_where_a_synchronous_function_runs(session_maker: Maker) -> None:
    """A function that SQLAlchemy runs in its greenlet is found itself."""

    def work(session: Session) -> CodeLocation:
        session.execute(text("SELECT 1"))
        return here()

    async with create_db_context(session_maker)() as session:
        ran = await session.run_sync(work)
        assert located(session) == ran._replace(line=ran.line - 1)


async def test_where_the_commit_takes_it(engine: AsyncEngine, session_maker: Maker) -> None:
    """A connection that the end of a block takes, for a flush, is that of the line of the block."""
    seen = []

    def note(session: Session, *_: Any) -> None:
        seen.extend(holders(engine))

    async with create_db_context(session_maker)() as session:
        event.listen(session.sync_session, "after_flush", note)
        session.add(Item(id=1))
    assert [each.where.function for each in seen if each.where] == [
        "test_where_the_commit_takes_it"
    ]


async def test_where_of_an_endpoint(engine: AsyncEngine, session_maker: Maker) -> None:
    """With `Depends(get_db)` it is the line of the endpoint, and not one of FastAPI."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)
    needs_db = Depends(get_db)

    @app.get("/")
    async def read_order(session: AsyncSession = needs_db) -> list[Any]:
        where, _ = here(), await session.execute(text("SELECT 1"))
        return [where, located(session)]

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        where, found = (await client.get("/")).json()
    assert found == where
    assert where[2] == "read_order"


# Engines and pools


async def test_copies_of_an_engine_have_one_pool(engine: AsyncEngine, session_maker: Maker) -> None:
    """An engine, its copies with options and the engine below it give the same list."""
    copy = engine.execution_options(isolation_level="SERIALIZABLE")
    async with create_db_context(async_sessionmaker(copy))() as session:
        await session.execute(text("SELECT 1"))
        [holder] = holders(engine)
        for each in (copy, engine.sync_engine, copy.sync_engine):
            assert [other.where for other in holders(each)] == [holder.where]


async def test_a_session_with_several_engines(engine: AsyncEngine) -> None:
    """A session that finds its engine by the statement is seen with its first connection."""
    maker = async_sessionmaker(binds={Item: engine})
    async with create_db_context(maker)() as session:
        await session.get(Item, 1)
        [holder] = holders(engine)
        assert holder.where is not None
        assert holder.where.function == "test_a_session_with_several_engines"
        await session.get(Item, 1)
        [holder] = holders(engine)
        assert "FROM item" in str(holder.statement)
    assert holders(engine) == []


async def test_connections_without_a_session(engine: AsyncEngine) -> None:
    """From the first use of the engine on, connections that the library has no part in, too."""
    assert holders(engine) == []
    async with engine.connect() as connection:
        where, _ = here(), await connection.execute(text("SELECT 1"))
        [holder] = holders(engine)
        assert holder.statement == "SELECT 1"
        assert holder.where == where._replace(line=where.line - 1)
    assert holders(engine) == []


async def test_connections_from_before(engine: AsyncEngine) -> None:
    """A connection that was taken before the library has seen the engine is not in the list."""
    async with engine.connect(), engine.connect():
        assert holders(engine) == []
        async with engine.connect():
            assert len(holders(engine)) == 1
    assert holders(engine) == []


async def test_a_connection_is_still_opened(engine: AsyncEngine) -> None:
    """A connection that is being opened is out already: it has its place in the pool."""
    assert holders(engine) == []
    opening = asyncio.create_task(engine.connect().__aenter__(), name="opening")
    seen = []
    while not opening.done():
        seen += holders(engine)
        await asyncio.sleep(0)
    assert {each.task for each in seen} == {"opening"}
    await (await opening).close()
    assert holders(engine) == []


@pytest.mark.parametrize("poolclass", [NullPool, StaticPool, AssertionPool])
async def test_pools_of_other_kinds(database_url: str, poolclass: Any) -> None:
    """Pools of each kind that an asynchronous engine may have are observed, also when recreated."""
    engine = create_async_engine(database_url, poolclass=poolclass)
    try:
        db_context = create_db_context(async_sessionmaker(engine))
        for _ in range(2):
            for _ in range(2):
                async with db_context() as session:
                    await session.execute(text("SELECT 1"))
                    [holder] = holders(engine)
                    assert holder.statement == "SELECT 1"
                assert holders(engine) == []
            await engine.dispose()
    finally:
        await engine.dispose()


async def test_a_pool_stays_what_it_is(engine: AsyncEngine) -> None:
    """The pool keeps its class, and its limits after `dispose()`."""
    before = type(engine.pool)
    holders(engine)
    await engine.dispose()
    assert type(engine.pool) is before
    assert engine.pool.size() == 5  # type: ignore[attr-defined]


async def test_a_pool_that_cannot_be_observed(
    engine: AsyncEngine, session_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool without the methods that are looked at works as before; `holders` is an error."""
    monkeypatch.setattr("pgtoolset._postgres.holders._METHODS", ("_not_there",))
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(UnsupportedVersionError, match="cannot note who takes a connection"):
            holders(engine)


async def test_an_engine_of_another_database() -> None:
    """An engine whose driver is not supported is refused."""
    with pytest.raises(UnsupportedDriverError):
        holders(create_async_engine("sqlite+aiosqlite://"))


async def test_a_wait_for_a_row_is_seen(engine: AsyncEngine, session_maker: Maker) -> None:
    """The polls of a waiter take connections like everybody else, and give them back."""
    async with session_maker() as session:
        await insert(session, 1)
        await session.commit()
    async with session_maker() as session:
        waiting = wait_for_row_change(session, Item, 1, until=lambda row: True)
        assert (await waiting).id == 1
    assert holders(engine) == []


def test_types() -> None:
    """Connections are no engines."""
    for wrong in (AsyncConnection, Connection, None, "engine"):
        with pytest.raises(TypeError, match=r"^engine must be"):
            holders(wrong)  # type: ignore[arg-type]
