"""`lock_tables`: modes, one order for all callers, and the transaction that holds the lock."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    LockMode,
    LockTimeoutError,
    RowLockMode,
    TransactionStateError,
    get_transaction,
    lock_tables,
)
from pgtoolset._postgres.locks import CONFLICTS
from tests.locks.locking import locks_of, nothing_left, pid_of
from tests.support import Account, Item, Part, insert, stored

Maker = async_sessionmaker[AsyncSession]


# Modes


@pytest.mark.parametrize("held", LockMode, ids=lambda mode: mode.name)
async def test_conflict_table(
    session_maker: Maker, other: asyncpg.Connection, held: LockMode
) -> None:
    """Every mode conflicts with every other as in PostgreSQL, and our table says the same."""
    async with session_maker() as one, lock_tables(one, [Item], mode=held):
        for wanted in LockMode:
            async with session_maker() as two:
                try:
                    async with lock_tables(two, [Item], mode=wanted, nowait=True):
                        conflict = False
                except LockTimeoutError:
                    conflict = True
            try:
                async with other.transaction():
                    await other.execute(f"LOCK TABLE item IN {wanted.value} MODE NOWAIT")
                    by_hand = False
            except asyncpg.LockNotAvailableError:
                by_hand = True
            assert conflict == by_hand == (wanted in CONFLICTS[held]), (held, wanted)


@pytest.mark.parametrize("mode", ["EXCLUSIVE", "exclusive", LockMode.EXCLUSIVE])
async def test_mode_spellings(session_maker: Maker, other: asyncpg.Connection, mode: Any) -> None:
    """A mode is a member, its value or its name, in any case; SHARE UPDATE EXCLUSIVE by default."""
    async with session_maker() as session:
        async with lock_tables(session=session, tables=[Item], mode=mode) as same:
            assert same is session
            assert ("item", "ExclusiveLock") in await locks_of(other, await pid_of(session))
        async with lock_tables(session, [Item], mode="access_Share"):
            assert ("item", "AccessShareLock") in await locks_of(other, await pid_of(session))
        async with lock_tables(session, [Item]):
            assert ("item", "ShareUpdateExclusiveLock") in await locks_of(
                other, await pid_of(session)
            )
    await nothing_left(other)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tables": []}, ValueError),
        ({"tables": Item}, TypeError),
        ({"tables": "item"}, TypeError),
        ({"tables": ["item"]}, TypeError),
        ({"tables": [Item()]}, TypeError),
        ({"tables": [int]}, TypeError),
        ({"tables": None}, TypeError),
        ({"mode": "EXCLUSIVE; DROP TABLE item"}, ValueError),
        ({"mode": RowLockMode.SHARE}, TypeError),
        ({"mode": 3}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"timeout": True}, TypeError),
        ({"timeout": b"5s"}, TypeError),
        ({"timeout": "5"}, ValueError),
        ({"timeout": "5 fortnights"}, ValueError),
        ({"timeout": "-5s"}, ValueError),
        ({"timeout": "0s"}, ValueError),
        ({"timeout": "5s'; DROP TABLE item"}, ValueError),
        ({"timeout": timedelta(0)}, ValueError),
        ({"nowait": 1}, TypeError),
    ],
)
async def test_bad_arguments(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad argument is refused by the call itself: no SQL, no transaction."""
    async with session_maker() as session:
        with pytest.raises(error):
            lock_tables(session, **({"tables": [Item]} | arguments))
        assert not session.in_transaction()


async def test_bad_session(session_maker: Maker) -> None:
    """A synchronous session and a factory are refused: a lock needs the session's connection."""
    async with session_maker() as session:
        for wrong in (session.sync_session, session_maker, None):
            with pytest.raises(TypeError):
                lock_tables(wrong, [Item])  # type: ignore[type-var]


async def test_autocommit_is_refused(engine: AsyncEngine) -> None:
    """In AUTOCOMMIT a lock would end with its own statement: an error, not an open block."""
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            async with lock_tables(session, [Item]):
                pass


# The transaction


async def test_outermost_ends_with_the_block(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Outermost, the block is a transaction: it commits at its end, and the lock is released."""
    async with session_maker() as session:
        async with lock_tables(session, [Item]):
            await insert(session, 1)
        assert not session.in_transaction()
        assert await stored(other) == {1}
        with pytest.raises(KeyError):
            async with lock_tables(session, [Item]):
                await insert(session, 2)
                raise KeyError
        assert await stored(other) == {1}
    await nothing_left(other)


async def test_nested_holds_until_the_outermost_ends(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Nested, the lock outlives its block until the outermost ends or its level rolls back."""
    async with session_maker() as session, get_transaction(session):
        pid = await pid_of(session)
        async with lock_tables(session, [Item], mode="SHARE"):
            pass
        with pytest.raises(KeyError):
            async with lock_tables(session, [Account], mode="SHARE"):
                raise KeyError
        assert await locks_of(other, pid) == {("item", "ShareLock")}
    await nothing_left(other)


# Order


async def test_opposite_orders_never_deadlock(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Two tasks that name the same tables in opposite orders never deadlock, in 200 rounds."""
    tables: list[Any] = [Item, Account, Part, Item.__table__]

    async def work(order: list[Any]) -> None:
        for _ in range(200):
            async with (
                session_maker() as session,
                lock_tables(session, order, mode="EXCLUSIVE", timeout="30s"),
            ):
                await session.execute(text("SELECT 1"))

    await asyncio.gather(work(tables), work(tables[::-1]))
    await nothing_left(other)
