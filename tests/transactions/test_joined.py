"""Section 2 of the contract: any number of sessions joined to one connection keep honesty and
callbacks each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    TransactionAbortedError,
    TransactionStateError,
    create_db_context,
    get_transaction,
    on_commit,
)
from tests.support import DRIVER_ERROR, Item, insert, stored, swallow_error

Maker = async_sessionmaker[AsyncSession]

MODES: list[Any] = ["conditional_savepoint", "rollback_only", "create_savepoint", "control_fully"]

#: The end of a session is not the end of the transaction that it has joined.
INSIDE: list[Any] = ["conditional_savepoint", "rollback_only", "create_savepoint"]


@pytest.fixture
async def connection(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        yield connection


def joined(connection: AsyncConnection, mode: Any) -> Maker:
    return async_sessionmaker(connection, join_transaction_mode=mode, expire_on_commit=False)


async def write(session: AsyncSession, id_: int, log: list[int]) -> None:
    await insert(session, id_)
    on_commit(session, lambda: log.append(id_))


async def raw_error(session: AsyncSession) -> None:
    """An error on the connection that SQLAlchemy does not see."""
    raw: Any = await (await session.connection()).get_raw_connection()
    with pytest.raises(DRIVER_ERROR):
        await raw.driver_connection.execute("SELECT 1 / 0")


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", INSIDE)
async def test_honest_nested(connection: AsyncConnection, first: Any, second: Any) -> None:
    """The end of a second session does not end the honesty of the first: both of them open, an
    error that the first one swallowed afterwards is still reported."""
    await connection.begin()
    with pytest.raises(TransactionAbortedError) as caught:
        async with create_db_context(joined(connection, first))() as outer:
            await insert(outer, 1)
            if second == "control_fully":
                # It would commit the transaction of both; it has a savepoint to control.
                await connection.begin_nested()
            async with create_db_context(joined(connection, second))() as inner:
                await insert(inner, 2)
            swallowed = await swallow_error(outer)
    assert caught.value.__cause__ is swallowed


@pytest.mark.parametrize("second", INSIDE)
@pytest.mark.parametrize("first", INSIDE)
async def test_honest_for_both(connection: AsyncConnection, first: Any, second: Any) -> None:
    """An error that one session swallowed aborts the work of all: each of them reports it, unless
    a savepoint has repaired it."""
    await connection.begin()
    outcomes: list[type[BaseException] | None] = [None, None]
    try:
        async with create_db_context(joined(connection, first))() as outer:
            await insert(outer, 1)
            try:
                async with create_db_context(joined(connection, second))() as inner:
                    await insert(inner, 2)
                    await swallow_error(inner)
            except TransactionAbortedError as error:
                outcomes[1] = type(error)
    except TransactionAbortedError as error:
        outcomes[0] = type(error)
    has_savepoint = second == "create_savepoint" or (
        second == "conditional_savepoint" and first == "create_savepoint"
    )
    assert outcomes == [None if has_savepoint else TransactionAbortedError, TransactionAbortedError]


@pytest.mark.parametrize("mode", INSIDE)
async def test_honest_in_turn(connection: AsyncConnection, mode: Any) -> None:
    """Sessions that join one after the other are honest each."""
    await connection.begin()
    db_context = create_db_context(joined(connection, mode))
    async with db_context() as session:
        await insert(session, 1)
    savepoint = await connection.begin_nested()
    with pytest.raises(TransactionAbortedError):
        async with db_context() as session:
            await insert(session, 2)
            await swallow_error(session)
    if savepoint.is_active:
        await savepoint.rollback()
    async with db_context() as session:
        await insert(session, 3)
    await connection.commit()
    async with connection.begin():
        rows = await connection.execute(text("SELECT id FROM item ORDER BY id"))
        assert rows.scalars().all() in ([1, 3], [3])


@pytest.mark.parametrize("mode", INSIDE)
async def test_callbacks_after_the_outer_commit(
    connection: AsyncConnection, mode: Any, other: asyncpg.Connection
) -> None:
    """on_commit: after the outermost commit. What a joined session calls a commit is none yet."""
    log: list[int] = []
    await connection.begin()
    db_context = create_db_context(joined(connection, mode))
    async with db_context() as first:
        await write(first, 1, log)
        async with db_context() as second:
            await write(second, 2, log)
        await write(first, 3, log)
    async with db_context() as third:
        await write(third, 4, log)
        await third.commit()
        await write(third, 5, log)
    assert log == []
    await connection.commit()
    assert sorted(log) == [1, 2, 3, 4, 5]
    assert await stored(other) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("mode", INSIDE)
async def test_callbacks_without_a_statement(connection: AsyncConnection, mode: Any) -> None:
    """A joined session that has run no statement waits for the outer commit as well."""
    log: list[int] = []
    db_context = create_db_context(joined(connection, mode))
    for id_, end in ((1, connection.rollback), (2, connection.commit)):
        await connection.begin()
        async with db_context() as session:
            on_commit(session, lambda id_=id_: log.append(id_))
        assert log == []
        await end()
    assert log == [2]


@pytest.mark.parametrize("end", ["rollback", "close", "invalidate"])
@pytest.mark.parametrize("mode", INSIDE)
async def test_callbacks_of_an_outer_rollback(
    engine: AsyncEngine, mode: Any, end: str, other: asyncpg.Connection
) -> None:
    """Where the outer transaction is rolled back, no callback runs, then or later."""
    log: list[int] = []
    async with engine.connect() as connection:
        await connection.begin()
        async with create_db_context(joined(connection, mode))() as session:
            await write(session, 1, log)
        if end == "rollback":
            await connection.rollback()
        elif end == "invalidate":
            await connection.invalidate()
        if end != "close":
            if end == "invalidate":
                await connection.rollback()
            async with connection.begin():
                await connection.execute(text("SELECT 1"))
    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1"))
    assert log == []
    assert await stored(other) == set()


@pytest.mark.parametrize("mode", INSIDE)
async def test_callbacks_of_an_outer_savepoint(
    connection: AsyncConnection, mode: Any, other: asyncpg.Connection
) -> None:
    """Forgotten when the level rolls back that the session had joined, kept when it does not."""
    log: list[int] = []
    db_context = create_db_context(joined(connection, mode))
    await connection.begin()
    async with db_context() as session:
        await write(session, 1, log)
    for id_, is_kept in ((2, False), (3, True), (4, False)):
        savepoint = await connection.begin_nested()
        inner = await connection.begin_nested()
        async with db_context() as session:
            await write(session, id_, log)
        await inner.commit()
        await (savepoint.commit() if is_kept else savepoint.rollback())
    async with db_context() as session:
        await write(session, 5, log)
    await connection.commit()
    assert log == [1, 3, 5]
    assert await stored(other) == {1, 3, 5}


async def test_session_that_controls_fully(
    connection: AsyncConnection, other: asyncpg.Connection
) -> None:
    """control_fully: the session's commit is the connection's, and callbacks of both run."""
    log: list[int] = []
    await connection.begin()
    async with create_db_context(joined(connection, "rollback_only"))() as first:
        await write(first, 1, log)
    async with create_db_context(joined(connection, "control_fully"))() as second:
        await write(second, 2, log)
        assert log == []
    assert log == [1, 2]
    assert await stored(other) == {1, 2}


async def test_session_that_began(connection: AsyncConnection, other: asyncpg.Connection) -> None:
    """A session on an idle connection begins the transaction, and a second one joins it: the
    commit of the first stores both, and the second goes on without an error."""
    log: list[int] = []
    maker = joined(connection, "conditional_savepoint")
    async with create_db_context(maker)() as second, create_db_context(maker)() as first:
        await write(first, 1, log)
        await write(second, 2, log)
        await first.commit()
        assert log == [1]
        assert await stored(other) == {1, 2}
    assert log == [1, 2]


@pytest.mark.parametrize(
    ("mode", "level"),
    [
        ("conditional_savepoint", "transaction"),
        ("rollback_only", "transaction"),
        ("rollback_only", "savepoint"),
    ],
)
@pytest.mark.filterwarnings("ignore:nested transaction already deassociated")
async def test_rolled_back_under_it(
    connection: AsyncConnection, mode: Any, level: str, other: asyncpg.Connection
) -> None:
    """A session whose outer level was rolled back while it was open does not report success."""
    log: list[int] = []
    transaction: Any = await connection.begin()
    if level == "savepoint":
        transaction = await connection.begin_nested()
    with pytest.raises(TransactionAbortedError, match="rolled back outside"):
        async with create_db_context(joined(connection, mode))() as session:
            await write(session, 1, log)
            await transaction.rollback()
    await connection.commit()
    assert log == []
    assert await stored(other) == set()


async def test_released_under_it(connection: AsyncConnection, other: asyncpg.Connection) -> None:
    """A session whose outer savepoint was released while it was open has lost nothing."""
    log: list[int] = []
    await connection.begin()
    savepoint = await connection.begin_nested()
    async with create_db_context(joined(connection, "rollback_only"))() as session:
        await write(session, 1, log)
        await savepoint.commit()
    await connection.commit()
    assert log == [1]
    assert await stored(other) == {1}


@pytest.mark.parametrize("mode", INSIDE)
async def test_outer_commit_is_honest(connection: AsyncConnection, mode: Any) -> None:
    """An error that no session saw, after one has reported success: the outer COMMIT that
    PostgreSQL answers with ROLLBACK is an error, and no callback runs."""
    log: list[int] = []
    await connection.begin()
    async with create_db_context(joined(connection, mode))() as session:
        await write(session, 1, log)
    raw: Any = await connection.get_raw_connection()
    with pytest.raises(DRIVER_ERROR):
        await raw.driver_connection.execute("SELECT 1 / 0")
    with pytest.raises(TransactionAbortedError):
        await connection.commit()
    assert log == []


async def test_connection_alone_is_left_as_it_was(connection: AsyncConnection) -> None:
    """After the outer transaction, the connection's commits are SQLAlchemy's own again."""
    await connection.begin()
    async with create_db_context(joined(connection, "rollback_only"))() as session:
        await insert(session, 1)
    await connection.rollback()
    await connection.begin()
    with pytest.raises(DBAPIError):
        await connection.execute(text("SELECT 1 / 0"))
    await connection.commit()  # SQLAlchemy's own silence


@pytest.mark.parametrize("mode", INSIDE)
async def test_blocks_in_joined_sessions(
    connection: AsyncConnection, mode: Any, other: asyncpg.Connection
) -> None:
    """Blocks of two joined sessions nest: an error undoes exactly its own level."""
    log: list[int] = []
    await connection.begin()
    maker = joined(connection, mode)
    async with maker() as first, get_transaction(first):
        await write(first, 1, log)
        async with maker() as second, get_transaction(second):
            await write(second, 2, log)
            with pytest.raises(DBAPIError):
                async with get_transaction(second):
                    await write(second, 3, log)
                    await second.execute(text("SELECT 1 / 0"))
            await write(second, 4, log)
        with pytest.raises(TransactionAbortedError):
            async with get_transaction(first):
                await write(first, 5, log)
                await swallow_error(first)
    await connection.commit()
    assert sorted(log) == [1, 2, 4]
    assert await stored(other) == {1, 2, 4}


async def test_sync_commit_outside_with_callbacks(connection: AsyncConnection) -> None:
    """Callbacks that wait for the outer commit are refused where they could not run, before it."""
    log: list[int] = []
    await connection.begin()
    async with create_db_context(joined(connection, "rollback_only"))() as session:
        await session.connection()
        on_commit(session, lambda: log.append(1))
    sync = connection.sync_connection
    assert sync is not None
    with pytest.raises(TransactionStateError, match="on_commit"):
        sync.commit()
    assert log == []


async def test_one_connection_for_a_flush(connection: AsyncConnection) -> None:
    """A flush that fails in one joined session is reported there, and its savepoint repairs the
    transaction for the other."""
    await connection.begin()
    maker = joined(connection, "create_savepoint")
    async with create_db_context(maker)() as first:
        await insert(first, 1)
        with pytest.raises(TransactionAbortedError):
            async with create_db_context(maker)() as second:
                second.add(Item(id=1))
                with pytest.raises(DBAPIError):
                    await second.flush()
        await insert(first, 2)
