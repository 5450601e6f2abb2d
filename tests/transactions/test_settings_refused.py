"""No statement runs without the settings of its transaction, whatever becomes of the BEGIN."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import TransactionAbortedError, create_db_context, get_transaction
from pgtoolset._postgres import discards
from pgtoolset._postgres.sqlstates import sqlstate_of
from tests.proxy import Cut, Proxy
from tests.settings import NOTHING, UNITS, Unit, by_context, left_behind, narrow, setting
from tests.support import DRIVER, connect_args, insert, interrupt_everywhere, stored

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"no_such_setting": 1}, "42704"),
    "bad value": ({"statement_timeout": "soon"}, "22023"),
    "missing role": ({"role": "nobody at all"}, "22023"),
    "no privilege": ({"role": "pg_monitor", "log_statement": "all"}, "42501"),
    "only at the start": ({"shared_buffers": "1GB"}, "55P02"),
}


@pytest.fixture
async def engine(database_url: str, other: asyncpg.Connection) -> AsyncIterator[AsyncEngine]:
    async with narrow(database_url) as engine:
        yield engine
    await other.execute("TRUNCATE item, part, account")


@pytest.mark.parametrize("wrong", REFUSED)
@pytest.mark.parametrize("unit", UNITS)
async def test_refused(
    engine: AsyncEngine, other: asyncpg.Connection, unit: Unit, wrong: str
) -> None:
    """A setting that PostgreSQL refuses is its own error at the first statement; no later one
    runs, the unit cannot end well, and the connection serves the next user."""
    settings, state = REFUSED[wrong]
    maker = async_sessionmaker(engine)
    pids: list[int] = []
    for is_first in (True, False):
        if not is_first:
            async with unit(maker) as session:
                pids.append(await session.scalar(text("SELECT pg_backend_pid()")) or 0)
        with pytest.raises(TransactionAbortedError):
            async with unit(maker, settings={"app.tenant": "a", **settings}) as session:
                with pytest.raises(DBAPIError) as caught:
                    await insert(session, 1)
                assert sqlstate_of(caught.value) == state
                for _ in range(2):
                    with pytest.raises(DBAPIError) as caught:
                        await insert(session, 2)
                    assert sqlstate_of(caught.value) == "25P02"
        assert await left_behind(engine) == NOTHING
        async with unit(maker, settings={"app.tenant": "b"}) as session:
            assert await setting(session) == "b"
            pids.append(await session.scalar(text("SELECT pg_backend_pid()")) or 0)
    assert len(set(pids)) == 1, "the connection was not needed any more"
    assert await stored(other) == set()


async def test_refused_again(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """After a rollback the next transaction of the unit is refused as the first was."""
    settings = {"statement_timeout": "soon"}
    with pytest.raises(TransactionAbortedError):
        async with by_context(async_sessionmaker(engine), settings=settings) as session:
            for _ in range(3):
                with pytest.raises(DBAPIError, match="soon"):
                    await insert(session, 1)
                await session.rollback()
            with pytest.raises(DBAPIError, match="soon"):
                async with session.begin_nested():
                    await insert(session, 1)
            with pytest.raises(DBAPIError):
                await insert(session, 1)
    assert await stored(other) == set()


async def write_tenant(session: AsyncSession, id_: int) -> None:
    """Write a row whose name is the tenant that the statement had."""
    await session.execute(
        text("INSERT INTO item VALUES (:id, coalesce(current_setting('app.tenant', true), ''))"),
        {"id": id_},
    )


@pytest.mark.parametrize("pool", ["cold", "warm", *(["busy"] if DRIVER == "psycopg" else [])])
@pytest.mark.parametrize("goes_on", ["not", "at once", "after a rollback"])
async def test_cancelled_everywhere(
    engine: AsyncEngine,
    other: asyncpg.Connection,
    pool: str,
    goes_on: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cancellation at any suspension, the message of the BEGIN included, lets no statement run
    without the settings, also of a unit that swallows it; the pool is whole afterwards."""
    if pool == "busy":
        monkeypatch.setattr(psycopg.waiting, "MAX_BUSY_TIME", -1.0, raising=False)
    db_context = create_db_context(
        async_sessionmaker(engine), settings={"app.tenant": "a", "lock_timeout": "9s"}
    )

    async def work(n: int) -> None:
        if pool == "cold":
            await engine.dispose()
        with suppress(TransactionAbortedError):
            async with db_context() as session:
                try:
                    await write_tenant(session, 10 * n)
                    await session.commit()
                    await write_tenant(session, 10 * n + 1)
                except asyncio.CancelledError:
                    if goes_on == "not":
                        raise
                    if goes_on == "after a rollback":
                        await session.rollback()
                    with suppress(SQLAlchemyError):
                        await write_tenant(session, 10 * n + 2)

    async def check(n: int) -> None:
        assert await left_behind(engine) == NOTHING, f"at suspension {n}"
        names = await other.fetch("SELECT DISTINCT name FROM item")
        assert [row["name"] for row in names] in ([], ["a"]), f"at suspension {n}"

    assert await interrupt_everywhere(work, check) >= 4
    assert await stored(other)


async def test_cut_everywhere(database_url: str, other: asyncpg.Connection) -> None:
    """A connection that is cut at any message, in each of several ways, lets no statement run
    without the settings, and the next transaction of the unit has them."""
    names: set[str] = set()
    async with Proxy.to(database_url) as proxy, narrow(proxy.url) as engine:
        db_context = create_db_context(async_sessionmaker(engine), settings={"app.tenant": "a"})
        for direction in ("to server", "to client"):
            for how in ("RST", "half"):
                for number in range(1, 4):
                    async with engine.connect() as connection:
                        await connection.execute(text("SELECT 1"))
                    with suppress(Exception):
                        async with db_context() as session:
                            proxy.cut_at_chunk(direction, number, how)
                            for id_ in (1, 2, 3):
                                try:
                                    await write_tenant(session, id_)
                                except Exception:
                                    await session.rollback()
                                    names.add(await setting(session))
                    proxy.cut = None
                    rows = await other.fetch(
                        "WITH gone AS (DELETE FROM item RETURNING name)"
                        " SELECT DISTINCT name FROM gone"
                    )
                    names |= {row["name"] for row in rows}
                    await engine.dispose()
    assert names == {"a"}


@pytest.mark.asyncpg(reason="command_timeout; psycopg has no such limit")
async def test_no_answer_to_the_begin(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BEGIN without an answer leaves no connection of unknown state to the next user."""
    monkeypatch.setattr(discards, "CLOSE_TIMEOUT", 0.1)
    async with (
        Proxy.to(database_url) as proxy,
        narrow(proxy.url, connect_args={"command_timeout": 0.3}) as engine,
    ):
        maker = async_sessionmaker(engine)
        async with engine.connect() as connection:
            before = await connection.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(TransactionAbortedError):
            async with by_context(maker, settings={"app.tenant": "a"}) as session:
                proxy.cut = Cut("to client", lambda _: True, "silence")
                with pytest.raises(TimeoutError):
                    await setting(session)
                with pytest.raises(SQLAlchemyError):
                    await setting(session)
        async with by_context(maker) as session:
            assert await setting(session) == ""
            assert await session.scalar(text("SELECT pg_backend_pid()")) != before


async def test_two_tasks(engine: AsyncEngine) -> None:
    """A statement of another task, on the connection of the session, waits for the settings too."""
    async with by_context(async_sessionmaker(engine), settings={"app.tenant": "a"}) as session:
        connection = await session.connection()
        found = await asyncio.gather(*(setting(connection) for _ in range(3)))
        assert found == ["a"] * 3


async def test_error_in_a_nested_block_first(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """Where a nested block is the first to use the connection, a refused setting of the unit
    fails the block and the unit."""
    maker = async_sessionmaker(engine)
    with pytest.raises(TransactionAbortedError):
        async with by_context(maker, settings={"statement_timeout": "soon"}) as session:
            with pytest.raises(DBAPIError):
                async with get_transaction(session, settings={"app.tenant": "a"}):
                    await insert(session, 1)
            with suppress(DBAPIError):
                await insert(session, 2)
    assert await stored(other) == set()
    assert await left_behind(engine) == NOTHING


@pytest.mark.parametrize("way", ["unit", "nested block", "joined"])
async def test_refused_by_the_driver(database_url: str, way: str) -> None:
    """A value that the driver cannot send, in the encoding of the client, is an error, and no
    statement runs without it."""
    arguments = connect_args(client_encoding="latin1", application_name="tests")
    settings = {"app.tenant": "\u4e2d"}
    async with narrow(database_url, connect_args=arguments) as engine:

        async def fail(maker: Any, unit: Any, block: Any) -> None:
            async with create_db_context(maker, settings=unit)() as session:
                async with get_transaction(session, settings=block):
                    for _ in range(2):
                        with pytest.raises((UnicodeEncodeError, SQLAlchemyError)):
                            await setting(session)

        with pytest.raises((UnicodeEncodeError, TransactionAbortedError, SQLAlchemyError)):
            if way == "joined":
                async with engine.connect() as connection:
                    await connection.begin()
                    await connection.execute(text("SELECT 1"))
                    await fail(async_sessionmaker(connection), settings, None)
            elif way == "unit":
                await fail(async_sessionmaker(engine), settings, None)
            else:
                await fail(async_sessionmaker(engine), None, settings)
        assert await left_behind(engine) == NOTHING
