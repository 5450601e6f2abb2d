"""`PoolWaited`, `LockWaited`, `Retried` and `CommitResolved`."""

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
    create_async_engine,
)

from pgtoolset import (
    CommitUnknownError,
    DeadlineExceededError,
    LockTimeoutError,
    PoolTimeoutError,
    TransactionLostError,
    advisory_lock,
    cleanup_tables,
    create_db_context,
    deadline,
    get_transaction,
    lock_rows,
    lock_tables,
    run_transaction,
)
from pgtoolset.observe import CommitResolved, LockWaited, PoolWaited, Retried, subscribe
from pgtoolset.protocols import DatabaseContext
from tests.observe.conftest import Events
from tests.proxy import Direction, Proxy
from tests.support import Account, Base, Item, Part, sqlalchemy_url, until

Maker = async_sessionmaker[AsyncSession]
Context = DatabaseContext[AsyncSession]

SELECT = text("SELECT 1")


# The pool


@pytest.fixture
async def small(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with one connection, for which callers wait only a moment."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    yield engine
    await engine.dispose()


async def test_pool(small: AsyncEngine) -> None:
    """Each request of a connection is one event: acquired, timed out, or cut by a deadline."""
    events = Events()
    subscribe(small, events.append)
    db_context = create_db_context(async_sessionmaker(small))
    async with db_context() as session:
        await session.execute(SELECT)
        await session.execute(SELECT)
        [first] = events.of(PoolWaited)
        assert first.outcome == "acquired"
        assert first.seconds > 0
        with pytest.raises(PoolTimeoutError):
            async with db_context() as other:
                await other.execute(SELECT)
        with pytest.raises(DeadlineExceededError):
            with deadline(0.01):
                async with db_context() as other:
                    await other.execute(SELECT)
        timed_out, cut = events.of(PoolWaited)
        assert (timed_out.outcome, cut.outcome) == ("timed_out", "deadline")
        assert timed_out.seconds >= 0.05 > 0.01
        assert cut.seconds >= 0.009
    async with db_context() as session:
        await session.execute(SELECT)
    assert [each.outcome for each in events.of(PoolWaited)] == ["acquired"]


async def test_pool_cancelled(engine: AsyncEngine, db_context: Context, events: Events) -> None:
    """A wait for a connection that is cancelled is reported."""
    connections = [await engine.connect() for _ in range(5)]
    events.clear()

    async def wait() -> None:
        async with db_context() as session:
            await session.execute(SELECT)

    task = asyncio.create_task(wait())
    pool: Any = engine.pool
    await until(lambda: bool(pool._pool._queue._getters))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [each.outcome for each in events.of(PoolWaited)] == ["cancelled"]
    for connection in connections:
        await connection.close()


async def test_pool_without_a_server() -> None:
    """A connection that cannot be made has failed."""
    engine = create_async_engine(sqlalchemy_url("postgresql://user@127.0.0.1:9/nowhere"))
    events = Events()
    subscribe(engine, events.append)
    with pytest.raises((OSError, DBAPIError)):
        async with create_db_context(async_sessionmaker(engine))() as session:
            await session.execute(SELECT)
    assert [each.outcome for each in events.of(PoolWaited)] == ["failed"]
    assert events == []


# Locks


async def test_locks(session_maker: Maker, events: Events, other: asyncpg.Connection) -> None:
    """Each function of locks reports its locks, their mode, and that they were acquired."""
    await other.execute("INSERT INTO account (id, balance) VALUES (1, 0)")
    async with session_maker() as session:
        async with lock_tables(session, [Item, Account], mode="EXCLUSIVE"):
            pass
        async with advisory_lock(session, 7, shared=True) as is_mine:
            assert is_mine
        async with get_transaction(session):
            await lock_rows(session, Account, [1], timeout=1)
    tables, key, rows = events.of(LockWaited)
    assert (tables.kind, tables.mode, tables.acquired) == ("tables", "EXCLUSIVE", True)
    assert tables.names == ("public.account", "public.item") or tables.names == ("account", "item")
    assert (key.kind, key.names, key.mode, key.acquired) == ("advisory", ("7",), "SHARE", True)
    assert (rows.kind, len(rows.names), rows.mode) == ("rows", 1, "UPDATE")
    assert rows.names[0].endswith("account")
    assert rows.acquired
    assert all(0 < each.seconds < 60 for each in (tables, key, rows))


async def test_locks_in_the_way(
    session_maker: Maker, events: Events, other: asyncpg.Connection
) -> None:
    """A lock that another session keeps is reported as not acquired, with the time of the wait."""
    await other.execute("INSERT INTO account (id, balance) VALUES (1, 0)")
    async with other.transaction():
        await other.execute("SELECT pg_advisory_xact_lock(7)")
        await other.execute("SELECT 1 FROM account FOR UPDATE")
        async with session_maker() as session:
            with pytest.raises(LockTimeoutError):
                async with lock_tables(session, [Account], mode="EXCLUSIVE", timeout=0.05):
                    pass
            async with advisory_lock(session, 7, nowait=True) as is_mine:
                assert not is_mine
            with pytest.raises(LockTimeoutError):
                await lock_rows(session, Account, [1], nowait=True)
            async with advisory_lock(session, 8, nowait=True):
                pass
            await session.rollback()
    waits = events.of(LockWaited)
    assert [(each.kind, each.acquired) for each in waits] == [
        ("tables", False),
        ("advisory", False),
        ("rows", False),
        ("advisory", True),
    ]
    assert waits[0].seconds >= 0.05


async def test_locks_of_other_functions(session_maker: Maker, events: Events) -> None:
    """Only the functions of locks report locks; the search for blockers reports no connection."""
    async with session_maker() as session:
        await cleanup_tables(session, Base)
        assert events.of(LockWaited) == []
        events.clear()
        async with lock_tables(session, [Part], mode="EXCLUSIVE"), session_maker() as second:
            with pytest.raises(LockTimeoutError) as caught:
                async with lock_tables(second, [Part], mode="EXCLUSIVE", timeout=0.2):
                    pass
    assert len(caught.value.blockers) == 1
    assert len(events.of(PoolWaited)) == 2


# Retries


async def test_retries(session_maker: Maker, events: Events) -> None:
    """An attempt that is followed by another one is reported, with the SQLSTATE of a cause."""
    numbers: list[int] = []

    async def work(session: AsyncSession) -> None:
        numbers.append(len(numbers) + 1)
        await session.execute(SELECT)
        if len(numbers) < 3:
            try:
                await session.execute(
                    text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")  # serialization_failure
                )
            except DBAPIError as error:
                raise KeyError("secret") from error

    await run_transaction(session_maker, work)
    retried = events.of(Retried)
    assert [(each.number, each.error, each.sqlstate) for each in retried] == [
        (1, "KeyError", "40001"),
        (2, "KeyError", "40001"),
    ]
    assert all(0 <= each.pause <= 0.04 for each in retried)
    assert [outcome for outcome, _ in events.ends()] == ["rolled_back", "rolled_back", "committed"]


async def test_the_last_attempt(session_maker: Maker, events: Events) -> None:
    """The failure of the last attempt, one that must not run again, and one whose observer ends
    the retries, are no retries."""

    async def work(session: AsyncSession) -> None:
        await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$"))

    async def fail(session: AsyncSession) -> None:
        raise KeyError

    def refuse(_: object) -> None:
        raise ValueError

    with pytest.raises(DBAPIError):
        await run_transaction(session_maker, work, attempts=2)
    assert [(each.number, each.sqlstate) for each in events.of(Retried)] == [(1, "40P01")]
    with pytest.raises(KeyError):
        await run_transaction(session_maker, fail)
    with pytest.raises(ValueError):
        await run_transaction(session_maker, work, on_retry=refuse)
    assert events.of(Retried) == []


async def test_retries_of_several_engines(
    engine: AsyncEngine, database_url: str, events: Events
) -> None:
    """A session of several engines reports its retry to those that the attempt has used."""
    second, unused = create_async_engine(database_url), create_async_engine(database_url)
    others, nothing = Events(), Events()
    subscribe(second, others.append)
    subscribe(unused, nothing.append)
    maker = async_sessionmaker(binds={Item: engine, Part: second, Account: unused})
    attempts: list[int] = []

    async def work(session: AsyncSession) -> None:
        attempts.append(1)
        await session.get(Item, 1)
        await session.get(Part, 1)
        if len(attempts) == 1:
            raise KeyError

    await run_transaction(maker, work, retry_on=lambda error: isinstance(error, KeyError))
    assert len(events.of(Retried)) == len(others.of(Retried)) == 1
    assert nothing == []
    await second.dispose()
    await unused.dispose()


# Commits that are resolved


@pytest.mark.parametrize(
    ("direction", "resolved", "ended"),
    [("to client", "stored", "committed"), ("to server", "lost", "lost")],
)
async def test_resolved(database_url: str, direction: Direction, resolved: str, ended: str) -> None:
    """A commit whose answer was lost is reported as it was resolved, and then as it has ended."""
    events = Events()
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(sqlalchemy_url(proxy.url))
        subscribe(engine, events.append)
        with suppress(TransactionLostError):
            async with create_db_context(
                async_sessionmaker(engine), resolve_commit=60
            )() as session:
                await session.execute(text("SELECT pg_current_xact_id()"))
                proxy.cut_at_commit("RST", direction)
        kinds = [type(each).__name__ for each in events]
        [found] = events.of(CommitResolved)
        assert found.outcome == resolved
        assert kinds == ["PoolWaited", "CommitResolved", "TransactionEnded"]
        assert [outcome for outcome, _ in events.ends()] == [ended]
        await engine.dispose()


async def test_unresolved(database_url: str) -> None:
    """A commit that cannot be resolved in time is unknown, twice; its time includes the search."""
    events: list[Any] = []
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(sqlalchemy_url(proxy.url))
        subscribe(engine, events.append)

        async def refuse() -> None:
            proxy.refusing = True

        with pytest.raises(CommitUnknownError):
            async with create_db_context(
                async_sessionmaker(engine), resolve_commit=0.1
            )() as session:
                await session.execute(text("SELECT pg_current_xact_id()"))
                proxy.cut_at_commit("RST", meanwhile=refuse)
        _, resolved, ended = events
        assert resolved.outcome == ended.outcome == "unknown"
        assert 0 < resolved.seconds <= ended.seconds
        await engine.dispose()
