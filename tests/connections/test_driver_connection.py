"""driver_connection: the driver's own connection inside the transaction of a session."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    DeadlineExceededError,
    TransactionAbortedError,
    TransactionStateError,
    create_db_context,
    deadline,
    driver_connection,
    get_transaction,
    on_commit,
    release_connection,
)
from tests.support import DRIVER, DRIVER_ERROR, Item, insert, interrupt_everywhere, stored

Maker = async_sessionmaker[AsyncSession]
ROWS = [(number, f"row {number}") for number in range(1, 101)]


async def copy(connection: Any, rows: Any = ROWS) -> None:
    if DRIVER == "asyncpg":
        await connection.copy_records_to_table("item", records=rows)
        return
    async with connection.cursor() as cursor, cursor.copy("COPY item FROM STDIN") as copying:
        for row in rows:
            await copying.write_row(row)


async def value(connection: Any, statement: str) -> Any:
    if DRIVER == "asyncpg":
        return await connection.fetchval(statement)
    cursor = await connection.execute(statement)
    (found,) = await cursor.fetchone()
    return found


async def test_inside_the_transaction(session_maker: Maker, other: Any) -> None:
    """Pending changes are flushed first, and what is executed there is seen by the session, and
    stored with it."""
    async with create_db_context(session_maker)() as session:
        session.add(Item(id=1000, name="pending"))
        async with driver_connection(session) as connection:
            assert await value(connection, "SELECT name FROM item") == "pending"
            await copy(connection)
            assert await session.scalar(text("SELECT count(*) FROM item")) == 101
        assert await stored(other) == set()
    assert len(await stored(other)) == 101


async def test_gone_with_the_rollback(session_maker: Maker, other: Any) -> None:
    """A rollback of the session undoes it."""
    with pytest.raises(KeyError):
        async with create_db_context(session_maker)() as session:
            async with driver_connection(session) as connection:
                await copy(connection)
            raise KeyError
    assert await stored(other) == set()


@pytest.mark.parametrize("begins", ["unit", "autobegin", "begin", "settings", "options"])
async def test_begins_the_transaction(session_maker: Maker, other: Any, begins: str) -> None:
    """The transaction is begun, with its settings and options, before the block."""
    if begins == "unit":
        context = create_db_context(session_maker)()
    elif begins == "settings":
        context = create_db_context(session_maker, settings={"app.tenant_id": "7"})()
    else:
        context = session_maker()
    async with context as session:
        if begins == "begin":
            await session.begin()
        if begins == "options":
            block = get_transaction(session, isolation_level="SERIALIZABLE")
            await block.__aenter__()
        async with driver_connection(session) as connection:
            if begins == "settings":
                assert await value(connection, "SELECT current_setting('app.tenant_id')") == "7"
            if begins == "options":
                assert await value(connection, "SHOW transaction_isolation") == "serializable"
            await connection.execute("INSERT INTO item VALUES (1, '')")
            assert await stored(other) == set()
            async with connection.transaction():  # a savepoint
                await connection.execute("INSERT INTO item VALUES (2, '')")
            assert await stored(other) == set()
        await session.rollback()
    assert await stored(other) == set()


async def test_error_that_leaves_the_block(session_maker: Maker) -> None:
    """An error that leaves the block and is swallowed outside is the cause at the end of the
    unit."""
    with pytest.raises(TransactionAbortedError) as caught:
        async with create_db_context(session_maker)() as session:
            with pytest.raises(DRIVER_ERROR) as swallowed:
                async with driver_connection(session) as connection:
                    await connection.execute("SELECT 1 / 0")
    assert caught.value.__cause__ is swallowed.value


async def test_error_that_is_swallowed_inside(session_maker: Maker) -> None:
    """An error that the block has swallowed is reported too, without a wrong cause."""
    with pytest.raises(TransactionAbortedError, match="SQLAlchemy did not see") as caught:
        async with create_db_context(session_maker)() as session:
            async with driver_connection(session) as connection:
                with pytest.raises(DRIVER_ERROR):
                    await connection.execute("SELECT 1 / 0")
    assert caught.value.__cause__ is None


async def test_honest_in_a_plain_session(session_maker: Maker) -> None:
    """So is one in a session without a block of ours."""
    async with session_maker() as session:
        async with driver_connection(session) as connection:
            with pytest.raises(DRIVER_ERROR):
                await connection.execute("SELECT 1 / 0")
        with pytest.raises(TransactionAbortedError):
            await session.commit()


async def test_error_in_a_savepoint(session_maker: Maker, other: Any) -> None:
    """A nested block rolls an error back, and the rest is stored."""
    async with create_db_context(session_maker)() as session:
        await insert(session, 1)
        with pytest.raises(DRIVER_ERROR):
            async with get_transaction(session), driver_connection(session) as connection:
                await connection.execute("INSERT INTO item VALUES (2, '')")
                await connection.execute("SELECT 1 / 0")
        async with driver_connection(session) as connection:
            await connection.execute("INSERT INTO item VALUES (3, '')")
    assert await stored(other) == {1, 3}


async def commit(connection: Any) -> None:
    await connection.execute("COMMIT")


async def rollback(connection: Any) -> None:
    await connection.execute("ROLLBACK")


async def commit_and_go_on(connection: Any) -> None:
    await connection.execute("COMMIT")
    if DRIVER == "asyncpg":
        await connection.execute("BEGIN")
    await connection.execute("INSERT INTO item VALUES (2, '')")


async def by_its_method(connection: Any) -> None:
    if DRIVER == "psycopg":
        await connection.commit()
        await connection.set_autocommit(True)
    else:
        await connection.reset()


@pytest.mark.parametrize("catches", [False, True])
@pytest.mark.parametrize("end", [commit, rollback, commit_and_go_on, by_its_method])
async def test_transaction_that_is_ended(
    engine: AsyncEngine, session_maker: Maker, other: Any, end: Any, catches: bool
) -> None:
    """A block that ends the transaction raises, and the unit reports no success, also where the
    error is caught; its callbacks do not run and the pool is whole."""
    log: list[int] = []
    with pytest.raises(TransactionStateError, match="driver_connection has ended") as caught:
        async with create_db_context(session_maker)() as session:
            on_commit(session, lambda: log.append(1))
            try:
                async with driver_connection(session) as connection:
                    await end(connection)
            except TransactionStateError:
                if not catches:
                    raise
    assert isinstance(caught.value, TransactionStateError)
    assert log == []
    assert await stored(other) == set()
    async with session_maker() as session:
        assert await session.scalar(text("SELECT 1")) == 1
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_transaction_that_is_ended_at_a_deadline(session_maker: Maker, other: Any) -> None:
    """A deadline that is over at the end of the block does not hide that it has ended the
    transaction."""
    with pytest.raises(TransactionStateError, match="driver_connection has ended"):
        async with create_db_context(session_maker)() as session:
            with suppress(DeadlineExceededError), deadline(0.3):
                async with driver_connection(session) as connection:
                    await commit_and_go_on(connection)
                    await asyncio.sleep(0.35)
            await insert(session, 1)
    assert await stored(other) == set()


async def test_limit_that_the_block_sets(session_maker: Maker) -> None:
    """A deadline does not lengthen a `statement_timeout` that a block has given the connection."""
    db_context = create_db_context(session_maker)
    show = text("SHOW statement_timeout")
    with deadline(60):
        async with db_context() as session:
            assert await session.scalar(show) != "0"
    async with db_context() as session, driver_connection(session) as connection:
        await connection.execute("SET statement_timeout = '7s'")
    with deadline(60):
        async with db_context() as session:
            assert await session.scalar(show) == "7s"


async def test_session_must_not_end_it(session_maker: Maker, other: Any) -> None:
    """A commit of the session in the block is refused, and a rollback is reported at its end."""
    with pytest.raises(TransactionStateError, match="a block of driver_connection is open"):
        async with create_db_context(session_maker)() as session:
            async with driver_connection(session) as connection:
                await connection.execute("INSERT INTO item VALUES (1, '')")
                await session.commit()
    async with create_db_context(session_maker)() as session:
        with pytest.raises(TransactionStateError, match="The session has ended"):
            async with driver_connection(session):
                await session.rollback()
    async with create_db_context(session_maker)() as session:
        async with driver_connection(session):
            with pytest.raises(TransactionStateError, match="driver_connection is open"):
                async with release_connection(session):
                    raise AssertionError("the block has begun")
    assert await stored(other) == set()


async def test_nested(session_maker: Maker, other: Any) -> None:
    """Two blocks in one give the same connection, and both are seen to their end."""
    async with create_db_context(session_maker)() as session:
        async with driver_connection(session) as outer:
            async with driver_connection(session) as inner:
                assert inner is outer
            with pytest.raises(TransactionStateError, match="is open"):
                async with release_connection(session):
                    raise AssertionError("the block has begun")
        async with release_connection(session):
            pass


async def test_joined(engine: AsyncEngine, other: Any) -> None:
    """A session that is joined to a connection gives that connection, and ends nothing."""
    async with engine.connect() as outer, outer.begin() as transaction:
        async with AsyncSession(outer, join_transaction_mode="create_savepoint") as session:
            async with get_transaction(session), driver_connection(session) as connection:
                await copy(connection)
        await transaction.rollback()
    assert await stored(other) == set()


async def test_autocommit(engine: AsyncEngine) -> None:
    """AUTOCOMMIT has no transaction."""
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            async with driver_connection(session):
                raise AssertionError("the block has begun")


@pytest.mark.skipif(DRIVER != "psycopg", reason="asyncpg has no such attributes")
async def test_attributes_are_put_back(session_maker: Maker) -> None:
    """What the block sets on psycopg's connection is as it was after it."""
    from psycopg.rows import dict_row

    async with create_db_context(session_maker)() as session:
        async with driver_connection(session) as connection:
            connection.row_factory = dict_row
            assert await (await connection.execute("SELECT 1 AS a")).fetchone() == {"a": 1}
        assert await session.scalar(text("SELECT 1")) == 1
        async with driver_connection(session) as connection:
            assert connection.row_factory is not dict_row


async def test_lost_connection(session_maker: Maker, other: Any) -> None:
    """A connection that is lost in the block is no transaction that the block has ended."""
    with pytest.raises(Exception) as caught:  # of either driver
        async with create_db_context(session_maker)() as session:
            async with driver_connection(session) as connection:
                pid = await value(connection, "SELECT pg_backend_pid()")
                await other.fetch("SELECT pg_terminate_backend($1)", pid)
                while True:
                    await value(connection, "SELECT 1")
    assert not isinstance(caught.value, TransactionStateError)


async def test_cancelled_everywhere(engine: AsyncEngine, session_maker: Maker, other: Any) -> None:
    """A cancellation at each suspension stores nothing, and leaves the pool whole."""

    async def work(n: int) -> None:
        async with create_db_context(session_maker)() as session:
            async with driver_connection(session) as connection:
                await copy(connection, [(n, "")])
                await asyncio.sleep(0)
            await session.rollback()

    async def check(n: int) -> None:
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        async with session_maker() as session:
            await session.execute(text("SELECT 1"))  # the next one has a connection in the pool
        assert await stored(other) == set()

    await check(0)
    assert await interrupt_everywhere(work, check) > 3


async def test_a_connection_that_has_left_its_pool(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A connection that was detached is lent as any other, and closed where a block ends its
    transaction."""
    async with engine.connect() as connection:
        pooled: Any = await connection.get_raw_connection()
        raw = pooled.driver_connection
        pooled.detach()
        async with AsyncSession(connection) as session, get_transaction(session):
            async with driver_connection(session) as lent:
                assert lent is raw
                await lent.execute("INSERT INTO item VALUES (1, '')")
        assert await stored(other) == {1}
        async with AsyncSession(connection) as session:
            with pytest.raises(TransactionStateError, match="has ended the transaction"):
                async with get_transaction(session), driver_connection(session) as lent:
                    await lent.execute("ROLLBACK")
        assert raw.is_closed() if DRIVER == "asyncpg" else raw.closed
