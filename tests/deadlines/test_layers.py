"""What a deadline ends, and that each part of the library names itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    DeadlineExceededError,
    LockTimeoutError,
    PgToolsetError,
    PoolTimeoutError,
    RowWatcher,
    TransactionAbortedError,
    WaitTimeoutError,
    advisory_lock,
    create_db_context,
    deadline,
    get_transaction,
    lock_rows,
    lock_tables,
    run_transaction,
    wait_for_row_change,
)
from pgtoolset._postgres.sqlstates import sqlstate_of
from tests.deadlines.lengths import growing
from tests.proxy import Proxy
from tests.support import Item, insert, sqlalchemy_url, stored

Maker = async_sessionmaker[AsyncSession]

SLEEP = text("SELECT pg_sleep(60)")


@pytest.fixture
async def item(session_maker: Maker) -> None:
    async with session_maker.begin() as session:
        session.add(Item(id=1))


@pytest.fixture
async def locked(item: None, other: asyncpg.Connection) -> AsyncIterator[None]:
    """Another session has locked the row and the table, and the key 1."""
    async with other.transaction():
        await other.execute("SELECT FROM item WHERE id = 1 FOR UPDATE")
        await other.execute("SELECT pg_advisory_xact_lock(1)")
        yield


@growing
async def test_statement(seconds: float, session_maker: Maker, engine: AsyncEngine) -> None:
    """A statement ends at the deadline; the error is a `TimeoutError` and says so."""
    db_context = create_db_context(session_maker)
    with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
        async with db_context() as session:
            await session.execute(SLEEP)
    assert caught.value.spent_on == "statement"
    assert caught.value.seconds == seconds
    assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, PgToolsetError)
    assert sqlstate_of(caught.value.__cause__) == "57014" or "statement timeout" in str(
        caught.value.__cause__
    )
    assert f"{seconds:g} s" in str(caught.value)


@growing
async def test_nothing_is_sent_afterwards(
    seconds: float, session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A statement after the deadline is not sent, and takes no connection."""
    async with session_maker() as session, session.begin():
        with deadline(seconds):
            await insert(session, 1)
            await asyncio.sleep(seconds + 0.1)
            with pytest.raises(DeadlineExceededError) as caught:
                await insert(session, 2)
        assert caught.value.spent_on == "statement"
        assert caught.value.__cause__ is None
        await insert(session, 3)
    assert await stored(other) == {1, 3}


async def test_no_connection_afterwards(session_maker: Maker, engine: AsyncEngine) -> None:
    """A first statement after the deadline takes no connection."""
    db_context = create_db_context(session_maker)
    pool: Any = engine.pool
    with deadline(0.02):
        async with db_context() as session:
            await asyncio.sleep(0.05)
            with pytest.raises(DeadlineExceededError) as caught:
                await session.execute(SLEEP)
            assert pool.checkedout() == 0
    assert caught.value.spent_on == "statement"


@growing
async def test_pool(seconds: float, database_url: str) -> None:
    """The wait for a connection ends at the deadline, before the timeout of the pool."""
    engine = create_async_engine(
        sqlalchemy_url(database_url), pool_size=1, max_overflow=0, pool_timeout=60
    )
    db_context = create_db_context(async_sessionmaker(engine))
    pool: Any = engine.pool
    try:
        async with db_context() as holder:
            await holder.execute(text("SELECT 1"))
            began = time.monotonic()
            with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
                async with db_context() as session:
                    await session.execute(SLEEP)
            assert time.monotonic() - began < 30
            assert pool.checkedout() == 1
        assert caught.value.spent_on == "pool"
        assert not isinstance(caught.value, PoolTimeout)
        cause = caught.value.__cause__
        assert isinstance(cause, PoolTimeoutError)
        assert len(cause.holders) == 1
        assert "is held by task" in str(caught.value)
        async with db_context() as session:
            assert await session.scalar(text("SELECT 1")) == 1
        assert pool.checkedout() == 0
    finally:
        await engine.dispose()


async def test_shorter_timeout_of_the_pool(database_url: str) -> None:
    """Where the timeout of the pool is shorter, its error stays."""
    engine = create_async_engine(
        sqlalchemy_url(database_url), pool_size=1, max_overflow=0, pool_timeout=0.05
    )
    db_context = create_db_context(async_sessionmaker(engine))
    try:
        async with db_context() as holder:
            await holder.execute(text("SELECT 1"))
            with pytest.raises(PoolTimeout), deadline(60):
                async with db_context() as session:
                    await session.execute(SLEEP)
    finally:
        await engine.dispose()


@growing
async def test_server_that_does_not_answer_a_connection(seconds: float, database_url: str) -> None:
    """A connection that cannot be made in time counts as the pool's, and keeps no place in it."""
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(sqlalchemy_url(proxy.url), pool_size=1, max_overflow=0)
        db_context = create_db_context(async_sessionmaker(engine))
        pool: Any = engine.pool
        try:
            proxy.frozen = True
            with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
                async with db_context() as session:
                    await session.execute(SLEEP)
            assert caught.value.spent_on == "pool"
            assert pool.checkedout() == 0 and pool.overflow() <= 0
            proxy.frozen = False
            async with db_context() as session:
                assert await session.scalar(text("SELECT 1")) == 1
        finally:
            await engine.dispose()


@growing
async def test_server_that_does_not_answer_a_statement(seconds: float, database_url: str) -> None:
    """Where nothing answers, the connection is closed a little after the deadline."""
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(sqlalchemy_url(proxy.url), pool_size=1, max_overflow=0)
        db_context = create_db_context(async_sessionmaker(engine))
        pool: Any = engine.pool
        try:
            with deadline(60):
                async with db_context() as session:  # whose limit is known from now on
                    await session.execute(text("SELECT 1"))
            proxy.frozen = True
            with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
                async with db_context() as session:
                    await session.execute(text("SELECT 2"))
            proxy.frozen = False
            assert caught.value.spent_on == "statement"
            assert "not answered" in str(caught.value)
            assert pool.checkedout() == 0
            async with db_context() as session:
                assert await session.scalar(text("SELECT 1")) == 1
        finally:
            await engine.dispose()


@pytest.mark.parametrize("timeout", [None, "60s"])
@pytest.mark.parametrize("kind", ["tables", "rows", "key"])
@growing
async def test_lock(
    seconds: float, session_maker: Maker, locked: None, kind: str, timeout: str | None
) -> None:
    """A lock function names the sessions in the way, and itself as what the time was spent on."""

    async def take(session: AsyncSession) -> None:
        if kind == "tables":
            async with lock_tables(session, [Item], mode="EXCLUSIVE", timeout=timeout):
                pass
        elif kind == "rows":
            await lock_rows(session, Item, [1], timeout=timeout)
        else:
            async with advisory_lock(session, 1, timeout=timeout):
                pass

    with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
        async with create_db_context(session_maker)() as session:
            await take(session)
    assert caught.value.spent_on == "lock"
    cause = caught.value.__cause__
    assert isinstance(cause, LockTimeoutError)
    assert len(cause.blockers) == 1
    assert f"pid {cause.blockers[0].pid}" in str(caught.value) or str(cause.blockers[0].pid) in str(
        caught.value
    )


@pytest.mark.parametrize("kind", ["tables", "rows", "key"])
@growing
async def test_transaction_after_a_lock(
    seconds: float, session_maker: Maker, locked: None, other: asyncpg.Connection, kind: str
) -> None:
    """The transaction around a lock function is usable after the deadline's block."""
    async with create_db_context(session_maker)() as session:
        await insert(session, 2)
        with pytest.raises(DeadlineExceededError), deadline(seconds):
            if kind == "tables":
                async with lock_tables(session, [Item], mode="EXCLUSIVE", timeout=60):
                    pass
            elif kind == "rows":
                await lock_rows(session, Item, [1], timeout=60)
            else:
                async with advisory_lock(session, 1, timeout=60):
                    pass
        await insert(session, 3)
        assert await session.scalar(text("SHOW lock_timeout")) == "0"
        assert await session.scalar(text("SHOW statement_timeout")) == "0"
    assert {2, 3} <= await stored(other)


async def test_shorter_timeout_of_a_lock(session_maker: Maker, locked: None) -> None:
    """Where the timeout of a lock is shorter, its error stays."""
    with pytest.raises(LockTimeoutError), deadline(60):
        async with create_db_context(session_maker)() as session:
            await lock_rows(session, Item, [1], timeout=0.05)


@growing
async def test_lock_of_a_statement(seconds: float, session_maker: Maker, locked: None) -> None:
    """A lock that a statement of the caller waits for is that statement's."""
    with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
        async with create_db_context(session_maker)() as session:
            await session.execute(text("UPDATE item SET name = 'x' WHERE id = 1"))
    assert caught.value.spent_on == "statement"


async def test_retry(session_maker: Maker) -> None:
    """`run_transaction` does not wait past a deadline: the error of the attempt is the cause."""
    attempts = 0

    async def work(session: AsyncSession) -> None:
        nonlocal attempts
        attempts += 1
        await session.execute(
            text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
        )

    with pytest.raises(DeadlineExceededError) as caught, deadline(1.0):
        await run_transaction(session_maker, work, attempts=1_000_000)
    assert attempts > 1
    if caught.value.spent_on == "retry":
        assert sqlstate_of(caught.value.__cause__) == "40001"
    else:  # the time was over within an attempt
        assert caught.value.spent_on in ("pool", "statement")


async def test_retry_names_itself(session_maker: Maker) -> None:
    """An attempt that fails with no time left for another one is not tried again."""

    async def work(session: AsyncSession) -> None:
        try:
            await session.execute(
                text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
            )
        finally:
            await asyncio.sleep(max(0.0, ends - time.monotonic()))

    with pytest.raises(DeadlineExceededError) as caught, deadline(2.0):
        ends = time.monotonic() + 2.0
        await run_transaction(session_maker, work, attempts=1_000_000)
    assert caught.value.spent_on == "retry"
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert sqlstate_of(caught.value.__cause__) == "40001"


@growing
async def test_attempt_that_the_deadline_ends(seconds: float, session_maker: Maker) -> None:
    """An attempt that the deadline has ended is not tried again, whatever its connection."""
    attempts = 0

    async def work(session: AsyncSession) -> None:
        nonlocal attempts
        attempts += 1
        await session.execute(SLEEP)

    with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
        await run_transaction(session_maker, work)
    assert (attempts, caught.value.spent_on) == (1, "statement")


@pytest.mark.parametrize("timeout", [None, 60])
@growing
async def test_wait(
    seconds: float, session_maker: Maker, item: None, timeout: float | None
) -> None:
    """`wait_for_row_change` ends at the deadline."""
    with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
        async with create_db_context(session_maker)() as session:
            await wait_for_row_change(session, Item, 1, interval=0.05, timeout=timeout)
    assert caught.value.spent_on == "wait"
    assert isinstance(caught.value.__cause__, WaitTimeoutError)


async def test_shorter_timeout_of_a_wait(session_maker: Maker, item: None) -> None:
    """Where the timeout of the wait is shorter, its error stays."""
    with pytest.raises(WaitTimeoutError), deadline(60):
        async with create_db_context(session_maker)() as session:
            await wait_for_row_change(session, Item, 1, interval=0.05, timeout=0.1)


@pytest.mark.asyncpg(reason="RowWatcher")
@growing
async def test_watcher(seconds: float, engine: AsyncEngine, item: None) -> None:
    """`RowWatcher.wait` and `changes` end at the deadline, and the watcher goes on."""
    async with RowWatcher(engine, interval=0.05) as watcher:
        with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
            await watcher.wait(Item, 1)
        assert caught.value.spent_on == "wait"
        async with watcher.changes(Item, 1) as changes:
            with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
                await anext(changes)
            assert caught.value.spent_on == "wait"
            async with async_sessionmaker(engine).begin() as session:
                await session.execute(text("UPDATE item SET name = 'x'"))
            assert (await anext(changes)).kind == "update"


@growing
async def test_swallowed(seconds: float, session_maker: Maker) -> None:
    """honest: a block that swallows the error of a canceled statement has nothing stored."""
    with pytest.raises(TransactionAbortedError) as caught:
        async with create_db_context(session_maker)() as session:
            await insert(session, int(seconds * 10))
            with pytest.raises(DeadlineExceededError), deadline(seconds):
                await session.execute(SLEEP)
    assert caught.value.sqlstate == "57014"


@growing
async def test_swallowed_within(seconds: float, session_maker: Maker) -> None:
    """honest: so has one whose commit comes within the deadline that is over."""
    with pytest.raises(TransactionAbortedError), deadline(seconds):
        async with create_db_context(session_maker)() as session:
            await insert(session, int(seconds * 10))
            with pytest.raises(DeadlineExceededError):
                await session.execute(SLEEP)


@growing
async def test_savepoint(seconds: float, session_maker: Maker, other: asyncpg.Connection) -> None:
    """A nested block is rolled back after the deadline, and the one around it commits."""
    with deadline(seconds):
        async with create_db_context(session_maker)() as session:
            await insert(session, 1)
            with pytest.raises(DeadlineExceededError):
                async with get_transaction(session):
                    await insert(session, 2)
                    await session.execute(SLEEP)
    assert await stored(other) == {1}
