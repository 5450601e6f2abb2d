"""`advisory_lock`: held until its transaction ends, and never carried into the pool."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    LockTimeoutError,
    TransactionAbortedError,
    TransactionStateError,
    advisory_lock,
    get_transaction,
)
from tests.locks.locking import TAKE, holding, is_free, nothing_left, settings_of, waiting
from tests.support import insert, stored, swallow_error

Maker = async_sessionmaker[AsyncSession]


# How long it is held


async def test_outermost_ends_with_the_block(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Outermost, the commit at the end of the block releases the lock."""
    async with session_maker() as session:
        async with advisory_lock(session, 42) as held:
            assert held is True
            assert not await is_free(other)
            await insert(session, 2)
        assert not session.in_transaction()
        assert await is_free(other)
        assert await stored(other) == {2}
    await nothing_left(other)


async def test_nested_holds_until_the_outermost_ends(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Nested, the lock outlives its block and ends with the outermost transaction."""
    async with session_maker() as session, get_transaction(session):
        await insert(session, 1)
        async with advisory_lock(session, 42) as held:
            assert held is True
            assert not await is_free(other)
            await insert(session, 2)
        assert not await is_free(other)
        assert await stored(other) == set()
    assert await is_free(other)
    assert await stored(other) == {1, 2}
    await nothing_left(other)


async def test_nested_ends_with_the_rollback_of_its_level(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """An exception in the block, or in a block around it, releases the lock with its savepoint."""
    async with session_maker() as session, get_transaction(session):
        with pytest.raises(KeyError):
            async with advisory_lock(session, 42):
                raise KeyError
        assert await is_free(other)
        with pytest.raises(KeyError):
            async with get_transaction(session):
                async with advisory_lock(session, 42):
                    pass
                assert not await is_free(other)
                raise KeyError
        assert await is_free(other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_until_the_transaction_ends(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection, nested: bool, end: str
) -> None:
    """A commit, rollback or close inside the block releases the lock before the pool has it."""
    held = text("SELECT 1 FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'")
    async with session_maker() as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        try:
            async with advisory_lock(session, 42):
                await getattr(session, end)()
                assert await is_free(other)
                for _ in range(5):
                    async with engine.connect() as connection:
                        assert not (await connection.scalars(held)).all()
        except InvalidRequestError:
            assert end == "close"
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("swallowed", [False, True])
async def test_aborted_transaction(
    session_maker: Maker, other: asyncpg.Connection, nested: bool, swallowed: bool
) -> None:
    """After an error in the block, raised or swallowed, the lock is free after the block."""
    async with session_maker() as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        with pytest.raises(TransactionAbortedError if swallowed else DBAPIError):
            async with advisory_lock(session, 42):
                if swallowed:
                    await swallow_error(session)
                else:
                    await session.execute(text("SELECT 1 / 0"))
        assert await is_free(other)
        if nested:
            await insert(session, 2)
        await session.commit()
    assert await stored(other) == ({1, 2} if nested else set())
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
async def test_lost_connection(
    engine: AsyncEngine, other: asyncpg.Connection, nested: bool
) -> None:
    """A lost connection takes its lock with it, and the pool goes on."""
    async with AsyncSession(engine) as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        # SQLAlchemy 2.0 does not wrap the error of an asyncpg that has lost its place.
        with pytest.raises((DBAPIError, asyncpg.InternalClientError)):
            async with advisory_lock(session, 42):
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                await other.execute("SELECT pg_terminate_backend($1, 5000)", pid)
                await session.execute(text("SELECT 1"))
    assert await is_free(other)
    async with AsyncSession(engine) as session, advisory_lock(session, 42) as held:
        assert held


async def test_same_key_twice(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A block inside a block of the same key does not wait for itself, whatever the modes are."""
    async with session_maker() as session:
        async with advisory_lock(session, 42):
            async with advisory_lock(session, 42), advisory_lock(session, 42, shared=True):
                pass
            assert not await is_free(other)
        assert await is_free(other)
        async with advisory_lock(session, 42, shared=True):
            async with advisory_lock(session, 42):
                pass
            assert not await is_free(other)
        assert await is_free(other)


async def test_same_key_twice_and_rolled_back(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """The rollback of the inner block leaves the outer one its lock."""
    async with session_maker() as session, advisory_lock(session, 42):
        with pytest.raises(KeyError):
            async with advisory_lock(session, 42):
                raise KeyError
        assert not await is_free(other)
    assert await is_free(other)


async def test_session_bound_to_a_connection(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """On a connection of the caller's own, the lock ends with that connection's transaction."""
    async with engine.connect() as connection:
        async with connection.begin():
            async with AsyncSession(
                connection, join_transaction_mode="create_savepoint"
            ) as session:
                async with advisory_lock(session, 42):
                    assert not await is_free(other)
                assert not await is_free(other)
        assert await is_free(other)
    async with engine.connect() as connection:
        async with AsyncSession(connection) as session:
            async with advisory_lock(session, 42):
                await session.commit()
                assert await is_free(other)


# Variants


@pytest.mark.parametrize("nested", [False, True])
async def test_nowait(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """With `nowait` the block yields `False` where another session has the lock, and goes on."""
    async with holding(other, TAKE), session_maker() as session:
        if nested:
            await session.begin()
        async with advisory_lock(session, 42, nowait=True) as held:
            assert held is False
            await insert(session, 1)
        async with advisory_lock(session, 43, nowait=True, timeout="60d") as held:
            assert held is True
        await session.commit()
    assert await stored(other) == {1}
    async with session_maker() as session, advisory_lock(session, 42, nowait=True) as held:
        assert held is True
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
async def test_shared(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """Several sessions share the lock, and none has it alone meanwhile."""
    async with session_maker() as one, session_maker() as two:
        if nested:
            await one.begin()
            await two.begin()
        async with (
            advisory_lock(one, 42, shared=True),
            advisory_lock(two, 42, shared=True, nowait=True) as held,
        ):
            assert held
            assert not await is_free(other)
        assert await is_free(other) == (not nested)
        await one.commit()
        await two.commit()
        assert await is_free(other)


async def test_autocommit_is_refused(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """In AUTOCOMMIT the lock would end with its own statement: an error, not an open block."""
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            async with advisory_lock(session, 42):
                raise AssertionError("the block runs without its lock")
    await nothing_left(other)


# Time


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("nested", [False, True])
async def test_timeout(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """A timeout names the holder; `lock_timeout` is as it was, and the transaction is usable."""
    async with holding(other, TAKE) as pid, session_maker() as session:
        if nested:
            await session.begin()
            await insert(session, 1)
            await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
        with pytest.raises(LockTimeoutError, match="advisory lock 42") as caught:
            async with advisory_lock(session, 42, timeout="200ms"):
                pass
        error = caught.value
        assert [blocker.pid for blocker in error.blockers] == [pid]
        assert (error.tables, error.mode, error.timeout) == ((), "EXCLUSIVE", 0.2)
        assert await settings_of(session) == ("1234ms" if nested else "0")
        async with advisory_lock(session, 43, timeout="200ms"):
            assert await settings_of(session) == ("1234ms" if nested else "0")
        await session.commit()
    assert await stored(other) == ({1} if nested else set())
    await nothing_left(other)


async def test_lock_timeout_of_the_connection(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Without a timeout the connection's own `lock_timeout` holds."""
    async with holding(other, TAKE), session_maker() as session, get_transaction(session):
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        with pytest.raises(LockTimeoutError):
            async with advisory_lock(session, 42):
                pass


@pytest.mark.parametrize("nested", [False, True])
async def test_sixty_days(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """A timeout longer than PostgreSQL's setting can hold waits, and the setting is restored."""
    async with session_maker() as session:
        if nested:
            await session.begin()
        async with holding(other, TAKE):
            task = asyncio.create_task(setting_inside(session))
            await waiting(other)
        assert await task == "0"


async def setting_inside(session: AsyncSession) -> str:
    """Return the `lock_timeout` inside a block that may be waited for for 60 days."""
    async with advisory_lock(session, 42, timeout="60d"):
        return await settings_of(session)
