"""`advisory_lock`: held until the block or the transaction ends, and never carried into the
pool."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import LockTimeoutError, TransactionAbortedError, advisory_lock, get_transaction
from tests.locks.locking import nothing_left, settings_of
from tests.support import insert, stored, swallow_error

Maker = async_sessionmaker[AsyncSession]


async def is_free(other: asyncpg.Connection, key: int = 42) -> bool:
    """Whether another session could have the lock now."""
    if await other.fetchval("SELECT pg_try_advisory_lock($1)", key):
        await other.execute(f"SELECT pg_advisory_unlock({key})")
        return True
    return False


@pytest.mark.parametrize("nested", [False, True])
async def test_until_the_block_ends(
    session_maker: Maker, other: asyncpg.Connection, nested: bool
) -> None:
    """Outermost and nested, it is held during the block and free after it; nested the transaction
    goes on."""
    async with session_maker() as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        async with advisory_lock(session, 42) as held:
            assert held is True
            assert not await is_free(other)
            await insert(session, 2)
        assert await is_free(other)
        assert await stored(other) == (set() if nested else {2})
        assert session.in_transaction() == nested
        await session.commit()
    assert await stored(other) == ({1, 2} if nested else {2})
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_until_the_transaction_ends(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection, nested: bool, end: str
) -> None:
    """A commit, a rollback or a close inside the block releases it, before the connection is in the
    pool again."""
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
                        assert not (await connection.scalars(text(
                            "SELECT 1 FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'"
                        ))).all()  # fmt: skip
        except InvalidRequestError:
            assert end == "close"
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("swallowed", [False, True])
async def test_aborted_transaction(
    session_maker: Maker, other: asyncpg.Connection, nested: bool, swallowed: bool
) -> None:
    """PostgreSQL refuses to unlock in an aborted transaction; the lock is free after the block all
    the same."""
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
    """With its connection the lock is gone, and the pool goes on."""
    async with AsyncSession(engine) as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        with pytest.raises(DBAPIError):
            async with advisory_lock(session, 42):
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                await other.execute("SELECT pg_terminate_backend($1, 5000)", pid)
                await session.execute(text("SELECT 1"))
    assert await is_free(other)
    async with AsyncSession(engine) as session, advisory_lock(session, 42) as held:
        assert held


@pytest.mark.parametrize("nested", [False, True])
async def test_nowait(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """With `nowait` the block is told `False` where somebody else has it, and takes nothing of
    theirs with it."""
    await other.execute("SELECT pg_advisory_lock(42)")
    async with session_maker() as session:
        if nested:
            await session.begin()
        async with advisory_lock(session, 42, nowait=True) as held:
            assert held is False
        async with advisory_lock(session, 43, nowait=True) as held:
            assert held is True
    await other.execute("SELECT pg_advisory_unlock(42)")
    async with session_maker() as session, advisory_lock(session, 42, nowait=True) as held:
        assert held is True
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
async def test_shared(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """Several hold it together, and nobody alone meanwhile."""
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
        assert await is_free(other)


@pytest.mark.parametrize(
    ("key", "classid", "objid", "objsubid"),
    [
        (42, 0, 42, 1),
        (-1, 2**32 - 1, 2**32 - 1, 1),
        (2**63 - 1, 2**31 - 1, 2**32 - 1, 1),
        ((7, -8), 7, 2**32 - 8, 2),
        ("nightly report", 0xCD1FAB31, 0xFFFFFFFF, 1),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
async def test_keys(
    session_maker: Maker,
    other: asyncpg.Connection,
    key: Any,
    classid: int,
    objid: int,
    objsubid: int,
    nested: bool,
) -> None:
    """The lock in pg_locks is the key's: all of a bigint, both int4, the first 64 bits of a
    string's SHA-256."""
    if isinstance(key, str):
        digest = hashlib.sha256(key.encode()).digest()
        classid, objid = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    async with session_maker() as session:
        if nested:
            await session.begin()
        async with advisory_lock(session, key):
            rows = await other.fetch(
                "SELECT classid, objid, objsubid FROM pg_locks WHERE locktype = 'advisory'"
            )
            assert [tuple(row) for row in rows] == [(classid, objid, objsubid)]
    await nothing_left(other)


def test_string_keys_are_stable() -> None:
    """A string is the same lock for ever: another process, another version, another Python."""
    from pgtoolset.locks.advisory import key_numbers

    assert key_numbers("") == (
        int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "big", signed=True),
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"key": None}, TypeError),
        ({"key": True}, TypeError),
        ({"key": 1.5}, TypeError),
        ({"key": b"x"}, TypeError),
        ({"key": (1, 2, 3)}, TypeError),
        ({"key": (1, "2")}, TypeError),
        ({"key": 2**63}, ValueError),
        ({"key": (2**31, 0)}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"shared": "yes"}, TypeError),
        ({"nowait": None}, TypeError),
        ({"session": None}, TypeError),
    ],
)
async def test_bad_arguments(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """What cannot be meant is refused by the call itself: no SQL, no transaction."""
    async with session_maker() as session:
        with pytest.raises(error):
            advisory_lock(**({"session": session, "key": 1} | arguments))
        assert not session.in_transaction()


@pytest.mark.parametrize("nested", [False, True])
async def test_timeout(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """A timeout is a `LockTimeoutError` that names the holder; `lock_timeout` is as it was, the
    transaction usable."""
    await other.execute("SELECT pg_advisory_lock(42)")
    try:
        async with session_maker() as session:
            if nested:
                await session.begin()
                await insert(session, 1)
                await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
            with pytest.raises(LockTimeoutError, match="advisory lock 42") as caught:
                async with advisory_lock(session, 42, timeout="200ms"):
                    pass
            assert [blocker.pid for blocker in caught.value.blockers] == [other.get_server_pid()]
            assert (caught.value.tables, caught.value.mode, caught.value.timeout) == (
                (),
                "EXCLUSIVE",
                0.2,
            )
            assert await settings_of(session) == ("1234ms" if nested else "0")
            async with advisory_lock(session, 43, timeout="200ms"):
                assert await settings_of(session) == ("1234ms" if nested else "0")
            await session.commit()
        assert await stored(other) == ({1} if nested else set())
    finally:
        await other.execute("SELECT pg_advisory_unlock(42)")
    await nothing_left(other)


async def test_same_key_twice(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A block inside a block of the same key does not wait for itself, and leaves the outer one its
    lock."""
    async with session_maker() as session, get_transaction(session):
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


async def test_session_bound_to_a_connection(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """On a connection of the caller's own, in a transaction that goes on, it is released with the
    block."""
    async with engine.connect() as connection, connection.begin():
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            async with advisory_lock(session, 42):
                assert not await is_free(other)
            assert await is_free(other)
    async with engine.connect() as connection:
        async with AsyncSession(connection) as session:
            async with advisory_lock(session, 42):
                await session.commit()
                assert await is_free(other)


async def test_only_one_at_a_time(session_maker: Maker, other: asyncpg.Connection) -> None:
    """What it is for: a read-modify-write by many, each waiting for the one before."""
    async with session_maker() as session, session.begin():
        await insert(session, 1)

    async def increment() -> None:
        async with session_maker() as session, advisory_lock(session, "counter"):
            number = int(
                await session.scalar(text("SELECT '0' || name FROM item WHERE id = 1")) or 0
            )
            await session.execute(
                text("UPDATE item SET name = :name WHERE id = 1"), {"name": str(number + 1)}
            )

    await asyncio.gather(*(increment() for _ in range(20)))
    assert await other.fetchval("SELECT name FROM item WHERE id = 1") == "20"
