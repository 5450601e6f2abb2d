"""`lock_tables`: one budget, what is restored after a timeout, and who is named."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import LockTimeoutError, get_transaction, lock_tables
from tests.locks.locking import (
    COUNTED_ONCE,
    holding,
    locks_of,
    pid_of,
    settings_of,
    two_holders,
    waiting,
)
from tests.support import Account, Item, Part, at_best, insert, stored

Maker = async_sessionmaker[AsyncSession]


@pytest.mark.parametrize(
    ("timeout", "milliseconds"),
    [
        (5, 5000), (0.25, 250), (timedelta(minutes=1), 60000), ("500ms", 500), ("5s", 5000),
        (" 1.5 min ", 90000), ("2h", 7200000), ("1d", 86400000), ("500us", 1), ("0.0001s", 1),
        (0.001, 1),
        ("60d", 2**31 - 1), (timedelta.max, 2**31 - 1), (10**400, 2**31 - 1),
    ],
)  # fmt: skip
def test_timeout_spellings(timeout: Any, milliseconds: int) -> None:
    """A timeout is seconds, a timedelta or a number with a unit, rounded up to milliseconds."""
    from pgtoolset._arguments import milliseconds as to_milliseconds
    from pgtoolset._arguments import seconds

    assert to_milliseconds(seconds("timeout", timeout)) == milliseconds


async def test_after_a_timeout_the_outer_transaction_is_usable(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """After a timeout the earlier and later writes of the outer transaction are committed."""
    async with holding(other, "LOCK TABLE account"):
        async with session_maker() as session, get_transaction(session):
            await insert(session, 1)
            with pytest.raises(LockTimeoutError):
                async with lock_tables(session, [Part, Account], timeout=0.1):
                    raise AssertionError("the block runs without its lock")
            assert not await locks_of(other, await pid_of(session)) & {
                ("part", "ShareUpdateExclusiveLock")
            }
            await insert(session, 2)
    assert await stored(other) == {1, 2}


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("setting", ["default", "session", "local"])
@pytest.mark.parametrize("timeout", ["5s", None, "nowait"])
async def test_lock_timeout_is_restored(
    session_maker: Maker,
    other: asyncpg.Connection,
    isolation_level: Any,
    setting: str,
    timeout: Any,
) -> None:
    """`lock_timeout` is as it was in the block, after a failure and after the commit."""
    arguments: dict[str, Any] = {"nowait": True} if timeout == "nowait" else {"timeout": timeout}
    async with session_maker() as session:
        connection = await session.connection()
        expected = "0" if setting == "default" else "1234ms"
        if setting == "session":
            await session.execute(text("SET lock_timeout = '1234ms'"))
            await session.commit()
            connection = await session.connection()
        await session.rollback()
        async with get_transaction(session, isolation_level=isolation_level):
            if setting == "local":
                await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
            async with lock_tables(session, [Item, Account], mode="SHARE", **arguments):
                assert await settings_of(session) == expected
            assert await settings_of(session) == expected
            if timeout is not None:
                async with holding(other, "LOCK TABLE part"):
                    with pytest.raises(LockTimeoutError):
                        async with lock_tables(
                            session, [Item, Part], nowait="nowait" in arguments, timeout=0.05
                        ):
                            pass
                assert await settings_of(session) == expected
        after = "1234ms" if setting == "session" else "0"
        assert await settings_of(session) == after
        await session.execute(text("RESET lock_timeout"))
        await session.commit()
        assert connection is not None


@pytest.mark.parametrize("timeout", [1.0, "1000ms", timedelta(seconds=1)])
@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_timeout_is_one_budget(
    session_maker: Maker, database_url: str, timeout: Any, isolation_level: Any
) -> None:
    """One budget holds for all the tables, though they are taken one after the other."""

    async def attempt() -> bool:
        async with two_holders(database_url, "LOCK TABLE account", "LOCK TABLE item"):
            async with (
                session_maker() as session,
                get_transaction(session, isolation_level=isolation_level),
            ):
                await session.connection()
                start = time.monotonic()
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [Item, Account], timeout=timeout):
                        pass
                took = time.monotonic() - start
            assert caught.value.timeout == 1.0
            assert took >= 0.99
            return took <= COUNTED_ONCE

    await at_best(attempt)


async def test_timeouts_under_load(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Five waiters that exhaust the pool fail in time, and each error names the holder."""
    async with holding(other, "LOCK TABLE item") as pid:

        async def wait(timeout: float) -> bool:
            async with session_maker() as session, session.begin():
                await session.connection()
                start = time.monotonic()
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [Item], timeout=timeout):
                        pass
                # Half as long again on a quiet machine.
                is_in_time = time.monotonic() - start < 3 * timeout
                return is_in_time and pid in {each.pid for each in caught.value.blockers}

        async def attempt() -> bool:
            return all(await asyncio.gather(*(wait(each) for each in (0.6, 0.7, 0.8, 0.9, 1.0))))

        await at_best(attempt)


async def test_no_timeout_waits(session_maker: Maker, other: asyncpg.Connection) -> None:
    """`None` waits for ever, whatever `lock_timeout` the connection has."""
    async with holding(other, "LOCK TABLE item"):

        async def work() -> bool:
            async with session_maker() as session, get_transaction(session):
                await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
                async with lock_tables(session, [Item], timeout=None):
                    return True

        task = asyncio.create_task(work())
        await waiting(other)
        await asyncio.sleep(0.2)  # four times the setting
        assert not task.done()
    assert await task


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_sixty_days(
    session_maker: Maker, other: asyncpg.Connection, isolation_level: Any
) -> None:
    """A timeout longer than PostgreSQL's setting can hold waits, and the setting is restored."""

    async def work() -> str:
        async with (
            session_maker() as session,
            get_transaction(session, isolation_level=isolation_level),
        ):
            async with lock_tables(session, [Account, Item], timeout=timedelta(days=60)):
                return await settings_of(session)

    async with holding(other, "LOCK TABLE item"):
        task = asyncio.create_task(work())
        await waiting(other)
    assert await task == "0"
