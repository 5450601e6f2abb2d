"""`TransactionEnded`: one for each transaction, with its true outcome."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    CommitUnknownError,
    DeadlineExceededError,
    TransactionAbortedError,
    TransactionLostError,
    TransactionStateError,
    create_db_context,
    deadline,
    driver_connection,
    get_transaction,
    on_commit,
    release_connection,
)
from pgtoolset._postgres.connections import is_closed
from pgtoolset.observe import TransactionEnded, subscribe
from pgtoolset.protocols import DatabaseContext
from pgtoolset.testing import EmbeddedServer
from tests.observe.conftest import Events
from tests.proxy import How, Proxy
from tests.support import (
    DRIVERNAME,
    Item,
    Part,
    insert,
    pid_of,
    raw_of,
    sqlalchemy_url,
    stored,
    swallow_error,
    until,
)

Maker = async_sessionmaker[AsyncSession]
Context = DatabaseContext[AsyncSession]

SELECT = text("SELECT 1")


async def test_each_end(db_context: Context, events: Events) -> None:
    """The transactions of a unit, ended by `commit()`, `rollback()` and its end, are one each."""
    async with db_context() as session:
        await session.execute(SELECT)
        await session.execute(SELECT)
        assert events.ends() == []
        await session.commit()
        assert events.ends() == [("committed", None)]
        await session.execute(SELECT)
        await session.rollback()
        assert events.ends() == [("rolled_back", None)]
        await session.execute(SELECT)
        async with get_transaction(session):
            await session.execute(SELECT)
        assert events.ends() == []
    assert events.ends() == [("committed", None)]


async def test_no_statement(db_context: Context, events: Events) -> None:
    """A unit that executes no statement has no transaction, also where it takes a connection."""
    async with db_context():
        pass
    async with db_context() as session:
        await session.connection()
    async with get_transaction(session, isolation_level="SERIALIZABLE"):
        pass
    assert events.ends() == []


async def test_a_statement_that_was_not_sent(db_context: Context, events: Events) -> None:
    """A first statement that a deadline has kept from being sent begins no transaction."""
    with pytest.raises(DeadlineExceededError, match="was not sent"):
        async with db_context() as session:
            await session.connection()
            with deadline(0.001):
                await asyncio.sleep(0.01)
                await session.execute(SELECT)
    assert events.ends() == []


async def test_errors(db_context: Context, events: Events) -> None:
    """An error of the application rolls back without a SQLSTATE, one of PostgreSQL with it."""
    with pytest.raises(KeyError):
        async with db_context() as session:
            await session.execute(SELECT)
            raise KeyError
    with pytest.raises(DBAPIError):
        async with db_context() as session:
            await session.execute(text("SELECT 1 / 0"))
    assert events.ends() == [("rolled_back", None), ("rolled_back", "22012")]


async def test_swallowed(db_context: Context, events: Events) -> None:
    """A commit of a transaction that a swallowed error has aborted is `aborted`; one that a
    savepoint has repaired is committed."""
    with pytest.raises(TransactionAbortedError):
        async with db_context() as session:
            await swallow_error(session)
    assert events.ends() == [("aborted", "22012")]
    async with db_context() as session:
        with pytest.raises(DBAPIError):
            async with get_transaction(session):
                await session.execute(text("SELECT 1 / 0"))
    assert events.ends() == [("committed", None)]


async def test_swallowed_behind_sqlalchemy(db_context: Context, events: Events) -> None:
    """A COMMIT that became a ROLLBACK is `aborted`, where SQLAlchemy has seen no error either."""
    with pytest.raises(TransactionAbortedError):
        async with db_context() as session:
            raw = await raw_of(session)
            await session.execute(SELECT)
            with pytest.raises(Exception, match="division by zero"):
                await raw.execute("SELECT 1 / 0")
    assert events.ends() == [("aborted", None)]


async def test_failed_commit(db_context: Context, events: Events) -> None:
    """A COMMIT that PostgreSQL refuses with an error has rolled back, with its SQLSTATE."""
    with pytest.raises(DBAPIError):
        async with db_context() as session:
            session.add(Part(id=1, item_id=99))
    assert events.ends() == [("rolled_back", "23503")]


async def test_failed_flush(db_context: Context, events: Events) -> None:
    """A flush that fails rolls back, once."""
    with pytest.raises(TransactionAbortedError):
        async with db_context() as session:
            await insert(session, 1)
            session.add(Item(id=1))
            with pytest.raises(DBAPIError):
                await session.flush()
    assert events.ends() == [("rolled_back", "23505")]


async def test_refused_before_the_commit(db_context: Context, events: Events) -> None:
    """A commit that is not sent leaves the transaction open: the rollback is its only end."""
    with pytest.raises(TransactionStateError):
        async with db_context() as session, driver_connection(session):
            with pytest.raises(TransactionStateError, match="driver_connection is open"):
                await session.commit()
            assert events.ends() == []
            raise TransactionStateError
    assert events.ends() == [("rolled_back", None)]


async def test_cancelled(db_context: Context, events: Events) -> None:
    """A transaction whose task is cancelled is reported: in a statement its connection is closed,
    between two statements it rolls back."""
    is_waiting = asyncio.Event()

    async def wait(statement: str) -> None:
        async with db_context() as session:
            await session.execute(text(statement))
            is_waiting.set()
            await session.execute(text("SELECT pg_sleep(60)"))

    async def idle() -> None:
        async with db_context() as session:
            await session.execute(SELECT)
            is_waiting.set()
            await asyncio.Event().wait()

    for work, outcome in ((wait("SELECT 1"), "lost"), (idle(), "rolled_back")):
        is_waiting.clear()
        task = asyncio.create_task(work)
        await is_waiting.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert events.ends() == [(outcome, None)]


async def test_killed(db_context: Context, events: Events, other: asyncpg.Connection) -> None:
    """A transaction whose backend is ended is `lost`, in a statement and before its COMMIT."""
    # SQLAlchemy 2.0 passes on what asyncpg raises of its own.
    with pytest.raises((DBAPIError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
        async with db_context() as session:
            await session.execute(SELECT)
            await other.execute("SELECT pg_terminate_backend($1)", pid_of(await raw_of(session)))
            await session.execute(SELECT)
    [(outcome, sqlstate)] = events.ends()
    assert outcome == "lost"
    assert sqlstate in ("57P01", "08003", None)  # the driver may have lost it before the statement
    with pytest.raises((DBAPIError, TransactionAbortedError, TransactionLostError)):
        async with db_context() as session:
            await session.execute(SELECT)
            raw = await raw_of(session)
            await other.execute("SELECT pg_terminate_backend($1)", pid_of(raw))
            await until(lambda: is_closed(raw))
    assert [outcome for outcome, _ in events.ends()] == ["lost"]


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    async with Proxy.to(database_url) as proxy:
        yield proxy


@pytest.fixture
async def distant(proxy: Proxy) -> AsyncIterator[AsyncEngine]:
    """An engine behind the proxy."""
    engine = create_async_engine(sqlalchemy_url(proxy.url))
    yield engine
    await engine.dispose()


@pytest.mark.parametrize("how", ["RST", "half"])
async def test_unknown(distant: AsyncEngine, proxy: Proxy, how: How) -> None:
    """A COMMIT whose answer is lost is `unknown`, once."""
    events = Events()
    subscribe(distant, events.append)
    with pytest.raises(CommitUnknownError):
        async with create_db_context(async_sessionmaker(distant))() as session:
            await session.execute(text("SELECT pg_current_xact_id()"))
            proxy.cut_at_commit(how)
    assert [outcome for outcome, _ in events.ends()] == ["unknown"]


async def test_closed_engines(db_context: Context, engine: AsyncEngine, events: Events) -> None:
    """The observers outlive `dispose()`, and see what engines with other options do."""
    await engine.dispose()
    async with db_context() as session:
        await session.execute(SELECT)
    other = engine.execution_options(isolation_level="REPEATABLE READ")
    async with create_db_context(async_sessionmaker(other))() as session:
        await session.execute(SELECT)
    ended = events.of(TransactionEnded)
    assert [(each.outcome, each.isolation_level) for each in ended] == [
        ("committed", None),
        ("committed", "REPEATABLE READ"),
    ]


async def test_modes(session_maker: Maker, events: Events) -> None:
    """The event has the isolation level and READ ONLY that an option has set."""
    async with session_maker() as session:
        async with get_transaction(session, isolation_level="SERIALIZABLE", read_only=True):
            await session.execute(SELECT)
        async with get_transaction(session):
            await session.execute(SELECT)
    first, second = events.of(TransactionEnded)
    assert (first.isolation_level, first.read_only) == ("SERIALIZABLE", True)
    assert second.read_only is False


async def test_seconds(session_maker: Maker, events: Events) -> None:
    """The seconds begin with the first statement, and not with the block or its connection."""
    loop = asyncio.get_running_loop()
    async with session_maker() as session:
        began_at = loop.time()
        async with get_transaction(session):
            await session.connection()
            await asyncio.sleep(0.05)
            before = loop.time()
            await session.execute(text("SELECT pg_sleep(0.01)"))
        ended_at = loop.time()
    [ended] = events.of(TransactionEnded)
    assert 0.01 <= ended.seconds <= ended_at - before
    assert ended.seconds < ended_at - began_at - 0.04


async def test_callbacks(engine: AsyncEngine, events: Events) -> None:
    """The event comes before the callbacks of `on_commit`, of joined sessions too, and their time
    is not a part of it."""
    seen: list[list[tuple[str, str | None]]] = []
    async with engine.connect() as connection:
        async with AsyncSession(connection) as outer, get_transaction(outer):
            await outer.execute(SELECT)
            on_commit(outer, lambda: seen.append(events.ends()))
            async with AsyncSession(connection) as inner, get_transaction(inner):
                await inner.execute(SELECT)
                on_commit(inner, lambda: seen.append(events.ends()))
        assert [each for each in seen if each] == [[("committed", None)]]
        assert seen[0]


async def test_joined(engine: AsyncEngine, events: Events) -> None:
    """Sessions that are joined to one connection share its transaction: one event."""
    async with engine.connect() as connection:
        await connection.begin()
        for _ in range(3):
            async with AsyncSession(connection) as session, get_transaction(session):
                await session.execute(SELECT)
        assert events.ends() == []
        await connection.commit()
        assert events.ends() == [("committed", None)]


async def test_released(db_context: Context, events: Events) -> None:
    """`release_connection` ends a transaction, and the next statement begins another one."""
    async with db_context() as session:
        await session.execute(SELECT)
        async with release_connection(session):
            assert events.ends() == [("committed", None)]
        await session.execute(SELECT)
    assert events.ends() == [("committed", None)]


async def test_others(engine: AsyncEngine, session_maker: Maker, events: Events) -> None:
    """Transactions in which no unit or block takes part are not reported."""
    async with session_maker() as session:
        await session.execute(SELECT)
        await session.commit()
    async with engine.begin() as connection:
        await connection.execute(SELECT)
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(SELECT)
    assert events.ends() == []


async def test_several_engines(engine: AsyncEngine, database_url: str, events: Events) -> None:
    """A session of two engines has a transaction on each, and so has each engine its event."""
    second = create_async_engine(database_url)
    others = Events()
    subscribe(second, others.append)
    session = AsyncSession(binds={Item: engine, Part: second})
    async with session, get_transaction(session):
        await session.get(Item, 1)
        await session.get(Part, 1)
    assert events.ends() == others.ends() == [("committed", None)]
    await second.dispose()


@pytest.fixture
def two_phase_url() -> Iterator[str]:
    with EmbeddedServer(settings={"max_prepared_transactions": "5"}) as server:
        yield server.url(driver=DRIVERNAME)


async def test_two_phases(two_phase_url: str) -> None:
    """A two-phase transaction is one, with its outcome, rolled back after it was prepared too."""
    engine, events = create_async_engine(two_phase_url), Events()
    subscribe(engine, events.append)
    session = AsyncSession(engine, twophase=True)
    async with session, get_transaction(session):
        await session.execute(SELECT)
    assert events.ends() == [("committed", None)]
    with pytest.raises(KeyError):
        async with session, get_transaction(session):
            await session.execute(SELECT)
            raise KeyError
    assert events.ends() == [("rolled_back", None)]
    with pytest.raises(KeyError):
        async with session, get_transaction(session):
            await session.execute(SELECT)
            await session.run_sync(lambda sync: sync.prepare())
            raise KeyError
    assert events.ends() == [("rolled_back", None)]
    await engine.dispose()


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
async def test_forgotten(engine: AsyncEngine, session_maker: Maker, events: Events) -> None:
    """A session that is forgotten in a transaction is collected, and its transaction is lost."""

    async def forget() -> None:
        session = session_maker()
        await get_transaction(session).__aenter__()
        await session.execute(SELECT)

    await forget()
    found: list[tuple[str, str | None]] = []

    def is_reported() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
        found.extend(events.ends())
        return bool(found) and engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    await until(is_reported)
    assert found == [("lost", None)]
    await asyncio.sleep(0)


@pytest.mark.parametrize("has_begun", [False, True])
async def test_detached(
    engine: AsyncEngine, events: Events, other: asyncpg.Connection, *, has_begun: bool
) -> None:
    """Nothing is told of a transaction whose connection has left the pool: it is not lost, and may
    be stored."""
    async with engine.connect() as connection:
        pooled: Any = await connection.get_raw_connection()
        raw = pooled.driver_connection
        async with AsyncSession(connection) as session, get_transaction(session):
            if has_begun:
                await insert(session, 1)
            pooled.detach()
            await insert(session, 2)
    await raw.close()  # SQLAlchemy leaves one of psycopg to its destructor
    assert 2 in await stored(other)
    assert events.ends() == []
