"""Section 1 of the contract: every row of its table of guarantees, on `create_db_context` and the
bare dependency."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, sessionmaker

from pgtoolset import (
    PgToolsetError,
    TransactionAbortedError,
    create_db_context,
    create_db_dependency,
    get_transaction,
)
from tests.support import DRIVER_ERROR, Item, Part, insert, stored, swallow_error

Open = Callable[[], AbstractAsyncContextManager[AsyncSession]]


def by_context(session_maker: Any) -> Open:
    return create_db_context(session_maker=session_maker)


def by_dependency(session_maker: Any) -> Open:
    return asynccontextmanager(create_db_dependency(session_maker=session_maker))


@pytest.fixture(params=[by_context, by_dependency])
def opened(request: pytest.FixtureRequest, session_maker: async_sessionmaker[AsyncSession]) -> Open:
    """A way to open a session: each test holds for both."""
    return request.param(session_maker)


@pytest.fixture
def checkouts(engine: AsyncEngine) -> list[str]:
    """One entry for each checkout from the pool."""
    log: list[str] = []
    event.listen(engine.pool, "checkout", lambda *_: log.append("checkout"))
    return log


@pytest.fixture
def statements(engine: AsyncEngine) -> list[str]:
    """Each statement that SQLAlchemy sends."""
    log: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: log.append(args[2]))
    return log


async def test_one_unit_commits(opened: Open, other: asyncpg.Connection) -> None:
    """one unit: success commits the whole block."""
    async with opened() as session:
        await insert(session, 1)
        session.add(Item(id=2))
    assert await stored(other) == {1, 2}


async def test_one_unit_in_transaction_when_yielded(opened: Open) -> None:
    """one unit: the session is already in a transaction when it is yielded."""
    async with opened() as session:
        assert session.in_transaction()
        assert not session.in_nested_transaction()


@pytest.mark.parametrize(
    "error", [KeyError("k"), asyncio.CancelledError("stop"), GeneratorExit(), SystemExit(3)]
)
async def test_one_unit_rolls_back(
    opened: Open, other: asyncpg.Connection, error: BaseException
) -> None:
    """one unit: any exception rolls everything back and propagates unchanged."""
    with pytest.raises(type(error)) as caught:
        async with opened() as session:
            await insert(session, 1)
            raise error
    assert caught.value is error
    assert await stored(other) == set()


async def test_one_unit_database_error_propagates_unchanged(
    opened: Open, other: asyncpg.Connection
) -> None:
    """one unit: a database error that leaves the block reaches the caller as it is."""
    with pytest.raises(DBAPIError) as caught:
        async with opened() as session:
            await insert(session, 1)
            await session.execute(text("SELECT 1 / 0"))
    assert not isinstance(caught.value, PgToolsetError)
    assert await stored(other) == set()


async def test_lazy(opened: Open, checkouts: list[str], engine: AsyncEngine) -> None:
    """lazy: no connection is checked out before the first statement."""
    async with opened() as session:
        session.add(Item(id=1))
        session.expunge_all()
        assert checkouts == []
    assert checkouts == []
    async with opened() as session:
        assert checkouts == []
        await session.execute(text("SELECT 1"))
        assert checkouts == ["checkout"]


async def test_lazy_nested(opened: Open, checkouts: list[str]) -> None:
    """lazy: a nested transaction without a statement takes no connection either."""
    async with opened() as session:
        async with get_transaction(session):
            pass
    assert checkouts == []


async def by_statement(session: AsyncSession) -> BaseException:
    return await swallow_error(session)


async def by_flush(session: AsyncSession) -> BaseException:
    session.add_all([Item(id=7), Item(id=8)])
    await session.flush()
    session.expunge_all()
    session.add(Item(id=8))
    try:
        await session.flush()
    except IntegrityError as error:
        return error
    raise AssertionError("the flush did not fail")


async def by_statement_then_more(session: AsyncSession) -> BaseException:
    first = await swallow_error(session)
    try:
        await session.execute(text("SELECT 1"))
    except DBAPIError:
        pass  # 25P02: everything is refused now
    return first


async def by_harmless_error_first(session: AsyncSession) -> BaseException:
    try:
        await session.execute(text("SELECT CAST(:n AS int)"), {"n": object()})
    except DBAPIError:
        pass  # refused by the driver, before PostgreSQL saw it
    return await swallow_error(session)


async def by_cancelled_statement(session: AsyncSession) -> BaseException:
    try:
        async with asyncio.timeout(0.05):
            await session.execute(text("SELECT pg_sleep(30)"))
    except TimeoutError as error:
        assert error.__cause__ is not None
        return error.__cause__
    raise AssertionError("the statement was not cancelled")


async def by_lost_connection(session: AsyncSession) -> BaseException:
    try:
        await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    except DBAPIError as error:
        return error
    raise AssertionError("the connection was not lost")


SWALLOW = [
    by_statement,
    by_flush,
    by_statement_then_more,
    by_harmless_error_first,
    by_cancelled_statement,
    by_lost_connection,
]


@pytest.mark.parametrize("swallow", SWALLOW)
async def test_honest(opened: Open, other: asyncpg.Connection, swallow: Any) -> None:
    """honest: a block that swallowed an error which aborted the transaction raises."""
    with pytest.raises(TransactionAbortedError) as caught:
        async with opened() as session:
            await insert(session, 1)
            swallowed = await swallow(session)
    assert caught.value.__cause__ is swallowed
    assert isinstance(caught.value, RuntimeError)
    assert await stored(other) == set()


@pytest.mark.parametrize("swallow", SWALLOW)
@pytest.mark.parametrize("how", ["session", "sync session", "transaction"])
async def test_honest_explicit_commit(
    opened: Open, other: asyncpg.Connection, swallow: Any, how: str
) -> None:
    """honest: an explicit commit() raises likewise; after a rollback the block can go on."""
    expected = TransactionAbortedError
    if how == "transaction" and swallow is by_flush:
        # The transaction object of SQLAlchemy refuses before any event.
        expected = PendingRollbackError
    async with opened() as session:
        await insert(session, 1)
        swallowed = await swallow(session)
        with pytest.raises(expected) as caught:
            match how:
                case "session":
                    await session.commit()
                case "sync session":
                    await session.run_sync(lambda sync: sync.commit())
                case _:
                    transaction = session.get_transaction()
                    assert transaction is not None
                    await transaction.commit()
        if expected is TransactionAbortedError:
            assert caught.value.__cause__ is swallowed
        await session.rollback()
        await insert(session, 2)
    assert await stored(other) == {2}


async def test_honest_error_outside_sqlalchemy(opened: Open, other: asyncpg.Connection) -> None:
    """honest: an error on the connection of the driver, which SQLAlchemy does not see, raises."""
    with pytest.raises(TransactionAbortedError, match="SQLAlchemy did not see") as caught:
        async with opened() as session:
            await insert(session, 1)
            raw = await (await session.connection()).get_raw_connection()
            driver = raw.driver_connection
            assert driver is not None
            with pytest.raises(DRIVER_ERROR):
                await driver.execute("SELECT 1 / 0")
    assert caught.value.__cause__ is None
    assert await stored(other) == set()


async def test_honest_message_names_the_error(opened: Open) -> None:
    """honest: the message and the fields say what happened and what to do."""
    with pytest.raises(
        TransactionAbortedError, match=r"division by zero.*nested get_transaction"
    ) as caught:
        async with opened() as session:
            await swallow_error(session)
    assert caught.value.sqlstate == "22012"


async def test_honest_about_harmless_errors(opened: Open, other: asyncpg.Connection) -> None:
    """honest: an error of the driver that leaves the transaction intact loses no work."""
    async with opened() as session:
        await insert(session, 1)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT CAST(:n AS int)"), {"n": object()})
    assert await stored(other) == {1}


async def test_honest_after_savepoint(opened: Open, other: asyncpg.Connection) -> None:
    """honest: an error that a savepoint has undone does not prevent the commit."""
    async with opened() as session:
        await insert(session, 1)
        with pytest.raises(DBAPIError):
            async with session.begin_nested():
                await session.execute(text("SELECT 1 / 0"))
    assert await stored(other) == {1}


@pytest.mark.asyncpg(reason="the log of asyncpg's own statements")
async def test_honest_clean_block_pays_nothing(
    opened: Open, engine: AsyncEngine, other: asyncpg.Connection, statements: list[str]
) -> None:
    """honest: a clean block sends only BEGIN, its statements and COMMIT."""
    sent: list[str] = []

    def listen(dbapi_connection: Any, *_: object) -> None:
        dbapi_connection.driver_connection.add_query_logger(lambda query: sent.append(query.query))

    event.listen(engine.sync_engine, "connect", listen)
    async with opened() as session:
        await session.execute(text("SELECT 1"))
    await asyncio.sleep(0)  # asyncpg calls its loggers in the next iteration
    assert statements == ["SELECT 1"]
    assert [query for query in sent if not query.startswith("SELECT")] == ["BEGIN;", "COMMIT;"]


async def test_commit_that_fails(
    opened: Open, other: asyncpg.Connection, engine: AsyncEngine
) -> None:
    """honest: an error of the COMMIT itself, of a deferred foreign key, propagates unchanged."""
    with pytest.raises(IntegrityError):
        async with opened() as session:
            await insert(session, 1)
            session.add(Part(id=1, item_id=99))
    assert await stored(other) == set()


@pytest.mark.parametrize("end", [None, KeyError("k"), asyncio.CancelledError()])
async def test_released(opened: Open, engine: AsyncEngine, end: BaseException | None) -> None:
    """released: after any end the session is closed and its connection is in the pool."""
    pool: Any = engine.pool
    with pytest.raises(type(end)) if end is not None else nullcontext():
        async with opened() as session:
            session.add(Item(id=1))
            await session.execute(text("SELECT 1"))
            assert pool.checkedout() == 1
            if end is not None:
                raise end
    assert pool.checkedout() == 0
    assert not session.in_transaction()
    assert list(session.identity_map.values()) == []


async def test_released_when_the_connection_is_lost(
    opened: Open, engine: AsyncEngine, other: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """released: a connection that died is discarded, and the pool serves the next session."""
    pool: Any = engine.pool
    # SQLAlchemy before 2.1 passes asyncpg's InternalClientError through.
    with pytest.raises((DBAPIError, asyncpg.InternalClientError)), caplog.at_level(logging.ERROR):
        async with opened() as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            await other.execute("SELECT pg_terminate_backend($1, 5000)", pid)
            await insert(session, 1)
    assert pool.checkedout() == 0
    async with opened() as session:
        await insert(session, 2)
    assert await stored(other) == {2}


async def test_free_to_commit_commit(opened: Open, other: asyncpg.Connection) -> None:
    """free to commit: the block may commit and go on; its end commits the rest."""
    async with opened() as session:
        await insert(session, 1)
        await session.commit()
        assert await stored(other) == {1}
        await insert(session, 2)
    assert await stored(other) == {1, 2}


async def test_free_to_commit_rollback(opened: Open, other: asyncpg.Connection) -> None:
    """free to commit: the block may roll back and go on."""
    async with opened() as session:
        await insert(session, 1)
        await session.rollback()
        await insert(session, 2)
    assert await stored(other) == {2}


async def test_free_to_commit_exception_after_commit(
    opened: Open, other: asyncpg.Connection
) -> None:
    """free to commit: an exception rolls back only the work after the last commit."""
    with pytest.raises(KeyError):
        async with opened() as session:
            await insert(session, 1)
            await session.commit()
            await insert(session, 2)
            raise KeyError
    assert await stored(other) == {1}


async def test_free_to_commit_close(opened: Open, other: asyncpg.Connection) -> None:
    """free to commit: a block that has closed its session ends without an error."""
    async with opened() as session:
        await insert(session, 1)
        await session.close()
    assert await stored(other) == set()


async def test_without_autobegin(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A session maker without autobegin works: the block's transaction is begun for it."""
    db_context = create_db_context(async_sessionmaker(engine, autobegin=False))
    async with db_context() as session:
        await insert(session, 1)
    assert await stored(other) == {1}


async def test_subclass_is_yielded(engine: AsyncEngine) -> None:
    """The session is the caller's own type."""

    class MySession(AsyncSession):
        pass

    async with create_db_context(async_sessionmaker(engine, class_=MySession))() as session:
        assert type(session) is MySession


async def test_dependency_as_async_for(
    session_maker: async_sessionmaker[AsyncSession], other: asyncpg.Connection
) -> None:
    """`async for session in get_db()` is one unit of work."""
    get_db = create_db_dependency(session_maker)
    async for session in get_db():
        await insert(session, 1)
    assert await stored(other) == {1}
    with pytest.raises(TransactionAbortedError):
        async for session in get_db():
            await insert(session, 2)
            await swallow_error(session)
    assert await stored(other) == {1}


async def test_dependency_left_early(
    session_maker: async_sessionmaker[AsyncSession], other: asyncpg.Connection
) -> None:
    """A generator that is closed before its end rolls back and gives its connection back."""
    generator = create_db_dependency(session_maker)()
    async for session in generator:
        await insert(session, 1)
        break
    await generator.aclose()
    assert await stored(other) == set()


def sync_maker() -> object:
    return sessionmaker()


async def coroutine_maker() -> object:
    return object()


@pytest.mark.parametrize("create", [create_db_context, create_db_dependency])
@pytest.mark.parametrize(
    "session_maker",
    [None, 3, "postgresql://u:secret@host/db", coroutine_maker, AsyncSession(), object()],
)
def test_bad_session_maker(create: Any, session_maker: Any) -> None:
    """A session maker that is not one is refused at once, by the name of the argument."""
    with pytest.raises(TypeError, match=r"^session_maker must") as caught:
        create(session_maker=session_maker)
    assert "secret" not in str(caught.value)


async def test_factory_of_scoped_sessions(session_maker: async_sessionmaker[AsyncSession]) -> None:
    """A factory that makes an `async_scoped_session` is refused, with what to pass instead."""
    scoped: Any = async_scoped_session(session_maker, scopefunc=lambda: 1)
    for opened in (by_context(lambda: scoped), by_dependency(lambda: scoped)):
        with pytest.raises(TypeError, match=r"^session_maker must make .*: scoped\(\)$"):
            async with opened():
                raise AssertionError("must not be reached")


@pytest.mark.parametrize(
    "session_maker", [sync_maker(), Session, lambda: None, lambda: "session", dict]
)
async def test_bad_session(session_maker: Any) -> None:
    """A factory that makes something else than an async session is refused, before any SQL."""
    with pytest.raises(TypeError, match="session_maker"):
        async with create_db_context(session_maker=session_maker)():
            raise AssertionError("must not be reached")
