"""Settings inside of a transaction: of a savepoint, and of a session joined to a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)

from pgtoolset import (
    DeadlineExceededError,
    TransactionAbortedError,
    create_db_context,
    deadline,
    get_transaction,
)
from tests.settings import (
    NOTHING,
    UNITS,
    Unit,
    by_context,
    everything,
    left_behind,
    narrow,
    setting,
)
from tests.support import insert, stored, swallow_error

OUTER = {"app.tenant": "outer", "lock_timeout": "3s"}
INNER = {
    "app.tenant": "inner",
    "app.user": "me",
    "search_path": "pg_temp",
    "statement_timeout": 9999,
}


@pytest.fixture
async def engine(database_url: str, other: asyncpg.Connection) -> AsyncIterator[AsyncEngine]:
    async with narrow(database_url) as engine:
        yield engine
    await other.execute("TRUNCATE item, part, account")


# Savepoints


@pytest.mark.parametrize("fault", [None, KeyError])
@pytest.mark.parametrize("is_joined", [False, True])
async def test_after_a_deadline(
    engine: AsyncEngine, is_joined: bool, fault: type[Exception] | None
) -> None:
    """What was before is back after the block also where a deadline was over at its end: the
    transaction goes on, and must not be that of another tenant."""
    async with engine.connect() as connection, connection.begin():
        joined = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
        session = joined()
        async with session, get_transaction(session, settings=OUTER):
            before = await everything(session)
            block = (
                create_db_context(joined, settings=INNER)()
                if is_joined
                else get_transaction(session, settings=INNER)
            )
            with suppress(KeyError), deadline(0.3):
                async with block as inner:
                    assert await setting(inner) == "inner"
                    await asyncio.sleep(0.35)
                    with pytest.raises(DeadlineExceededError):
                        await inner.execute(text("SELECT 1"))
                    if fault is not None:
                        raise fault
            assert await everything(session) == before


@pytest.mark.parametrize("is_used", [True, False])
@pytest.mark.parametrize("unit", UNITS)
async def test_released(engine: AsyncEngine, unit: Unit, is_used: bool) -> None:
    """A nested block has its settings with those around it, and they are back after its RELEASE;
    also where the block is the first that uses the connection."""
    async with unit(async_sessionmaker(engine), settings=OUTER) as session:
        before = await everything(session) if is_used else ("outer", "0", "3s", *NOTHING[3:])
        async with get_transaction(session, settings=INNER):
            inside = await everything(session)
            assert inside == ("inner", "9999ms", "3s", "none", "pg_temp", "tests")
            assert await setting(session, "app.user") == "me"
            async with session.begin_nested():
                assert await everything(session) == inside
        assert await everything(session) == before
        assert await setting(session, "app.user") == ""
    assert await left_behind(engine) == NOTHING


@pytest.mark.parametrize("fault", [KeyError, DBAPIError])
async def test_rolled_back(engine: AsyncEngine, fault: type[Exception]) -> None:
    """An error of any kind in a nested block puts back what was before."""
    async with by_context(async_sessionmaker(engine), settings=OUTER) as session:
        before = await everything(session)
        with pytest.raises(fault):
            async with get_transaction(session, settings=INNER):
                assert await setting(session) == "inner"
                if fault is KeyError:
                    raise KeyError
                await session.execute(text("SELECT 1 / 0"))
        assert await everything(session) == before
        with pytest.raises(TransactionAbortedError):
            async with get_transaction(session, settings=INNER):
                await swallow_error(session)
        assert await everything(session) == before


async def test_a_savepoint_of_the_caller(engine: AsyncEngine) -> None:
    """A rollback inside of a nested block goes back to the block's settings, not past them."""
    async with by_context(async_sessionmaker(engine), settings=OUTER) as session:
        async with get_transaction(session, settings=INNER):
            inner = await session.begin_nested()
            await session.execute(text("SET LOCAL app.tenant = 'by hand'"))
            await inner.rollback()
            assert await setting(session) == "inner"
        assert await setting(session) == "outer"


async def test_without_a_statement(engine: AsyncEngine) -> None:
    """A nested block without a statement takes no connection."""
    async with by_context(async_sessionmaker(engine), settings=OUTER) as session:
        async with get_transaction(session, settings=INNER):
            pass
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert await setting(session) == "outer"


async def test_another_connection_of_the_block(engine: AsyncEngine, database_url: str) -> None:
    """Each connection that a nested block uses has its settings, and its own earlier ones after."""
    async with narrow(database_url) as second:
        session = AsyncSession(engine)
        async with session, get_transaction(session, settings=OUTER):
            assert await setting(session) == "outer"
            async with get_transaction(session, settings=INNER):
                for each in (engine, second):
                    connection = await session.connection(bind_arguments={"bind": each.sync_engine})
                    assert await setting(connection) == "inner"
            for each in (engine, second):
                connection = await session.connection(bind_arguments={"bind": each.sync_engine})
                assert await setting(connection) == "outer"
        assert await left_behind(second) == NOTHING
    assert await left_behind(engine) == NOTHING


# A session joined to a connection

MODES = ["conditional_savepoint", "rollback_only", "create_savepoint", "control_fully"]


@pytest.mark.parametrize("end", ["commit", "error", "rollback"])
@pytest.mark.parametrize("has_begun", [True, False], ids=["begun", "not begun"])
@pytest.mark.parametrize("mode", MODES)
async def test_joined(engine: AsyncEngine, mode: Any, has_begun: bool, end: str) -> None:
    """A unit joined to the transaction of a connection has its settings, and what comes after it on
    that connection has none: the caller, another session, and the next unit."""
    async with engine.connect() as connection:
        await connection.begin()
        if has_begun:
            await connection.execute(text("SELECT 1"))
        maker = async_sessionmaker(connection, join_transaction_mode=mode)
        try:
            async with create_db_context(maker, settings=INNER)() as session:
                assert (await everything(session))[:2] == ("inner", "9999ms")
                if end == "error":
                    raise KeyError
                if end == "rollback":
                    await session.rollback()
        except KeyError:
            pass
        assert await everything(connection) == NOTHING
        async with maker() as session:
            assert await everything(session) == NOTHING
            await session.commit()
        async with create_db_context(maker, settings={"app.user": "7"})() as session:
            assert (await setting(session), await setting(session, "app.user")) == ("", "7")
        assert await everything(connection) == NOTHING
    assert await left_behind(engine) == NOTHING


@pytest.mark.parametrize("mode", MODES)
async def test_joined_and_committed_inside(engine: AsyncEngine, mode: Any) -> None:
    """Each transaction of a joined unit has the settings, also after commits and rollbacks of its
    own."""
    async with engine.connect() as connection:
        await connection.begin()
        await connection.execute(text("SELECT 1"))
        maker = async_sessionmaker(connection, join_transaction_mode=mode)
        async with create_db_context(maker, settings=OUTER)() as session:
            for step in (session.commit, session.commit, session.rollback, session.commit):
                assert await setting(session) == "outer"
                async with get_transaction(session, settings=INNER):
                    assert await setting(session) == "inner"
                assert await setting(session) == "outer"
                await step()
                assert await setting(connection) == ""
            assert await setting(session) == "outer"
        assert await everything(connection) == NOTHING


async def test_bound_without_a_transaction(engine: AsyncEngine) -> None:
    """On a connection in no transaction the unit begins its own, with the settings."""
    async with engine.connect() as connection:
        maker = async_sessionmaker(connection)
        for _ in range(2):
            async with create_db_context(maker, settings=OUTER)() as session:
                assert await setting(session) == "outer"
                await session.commit()
                assert await setting(session) == "outer"
            assert await everything(connection) == NOTHING
            await connection.rollback()


async def test_the_plugins_session(pg_session: AsyncSession) -> None:
    """Two units with settings in one test of the plugin see none of each other's."""
    maker = async_sessionmaker(pg_session.bind, join_transaction_mode="create_savepoint")
    for value in ("a", "b"):
        async with create_db_context(maker, settings={"app.tenant": value})() as session:
            assert await setting(session) == value
            await session.commit()
            assert await setting(session) == value
        assert await setting(pg_session) == ""
        async with get_transaction(pg_session, settings={"app.tenant": value}):
            assert await setting(pg_session) == value
        assert await setting(pg_session) == ""


async def test_refused_inside(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A setting that is refused in a nested block fails that block alone."""
    async with by_context(async_sessionmaker(engine), settings=OUTER) as session:
        await insert(session, 1)
        for wrong in ({"no_such_setting": 1}, {"statement_timeout": "soon"}, {"role": "nobody"}):
            with pytest.raises(DBAPIError):
                async with get_transaction(session, settings={"app.tenant": "x", **wrong}):
                    await insert(session, 2)
            assert await setting(session) == "outer"
    assert await stored(other) == {1}
    assert await left_behind(engine) == NOTHING


async def test_no_value_in_an_error(engine: AsyncEngine) -> None:
    """The error of a refused setting does not repeat the others' values."""
    wrong = {"app.key": "the secret", "statement_timeout": "soon"}
    maker = async_sessionmaker(engine)
    async with by_context(maker) as session:
        with pytest.raises(DBAPIError) as caught:
            async with get_transaction(session, settings=wrong):
                await session.execute(text("SELECT 1"))
        assert "the secret" not in f"{caught.value} {caught.value!r}"
    with pytest.raises(DBAPIError) as caught:
        async with by_context(maker, settings=wrong) as session:
            await session.execute(text("SELECT 1"))
    assert "the secret" not in f"{caught.value} {caught.value!r}"
