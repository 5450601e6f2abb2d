"""Locks of all kinds under cancellations, commits and errors anywhere leave nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    LockMode,
    LockTimeoutError,
    RowLockMode,
    advisory_lock,
    create_db_context,
    get_transaction,
    lock_rows,
    lock_tables,
)
from tests.locks.locking import closing, holding, nothing_left
from tests.support import Account, Item, Part, insert, interrupt_everywhere

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture(autouse=True)
async def accounts(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """Store three accounts and connect once: SQLAlchemy 2.0 loses a cancelled first connection."""
    await other.execute("INSERT INTO account (id, balance) SELECT generate_series(1, 3), 0")
    async with engine.connect():
        pass


def tables(session: AsyncSession) -> AbstractAsyncContextManager[object]:
    return lock_tables(session, [Item, Account], mode="SHARE ROW EXCLUSIVE", timeout=0.12)


def advisory(session: AsyncSession) -> AbstractAsyncContextManager[object]:
    return advisory_lock(session, 42, timeout=0.12)


@asynccontextmanager
async def rows(session: AsyncSession) -> AsyncIterator[None]:
    await lock_rows(session, Account, [1, 2], timeout=0.12)
    yield


#: How to take a lock, and the statement of another session that is in its way.
KINDS: dict[str, tuple[Callable[[AsyncSession], AbstractAsyncContextManager[object]], str]] = {
    "tables": (tables, "LOCK TABLE item IN SHARE MODE"),
    "advisory": (advisory, "SELECT pg_advisory_xact_lock(42)"),
    "rows": (rows, "SELECT FROM account FOR UPDATE"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocked", [False, True])
async def test_cancelled_everywhere(
    engine: AsyncEngine,
    session_maker: Maker,
    other: asyncpg.Connection,
    kind: str,
    nested: bool,
    blocked: bool,
) -> None:
    """Cancelled at any suspension, with the lock free or taken, a call leaves nothing behind."""
    pool: Any = engine.pool
    db_context = create_db_context(session_maker)
    lock, in_the_way = KINDS[kind]

    async def take(session: AsyncSession, n: int) -> None:
        try:
            async with lock(session):
                await insert(session, n)
        except LockTimeoutError:
            assert blocked

    async def work(n: int) -> None:
        if nested:
            async with db_context() as session:
                await take(session, n)
        else:
            async with closing(session_maker()) as session:
                await take(session, n)

    async def check(n: int) -> None:
        assert pool.checkedout() == 0
        if not blocked:
            await nothing_left(other)

    if blocked:
        async with holding(other, in_the_way):
            assert await interrupt_everywhere(work, check) > 3
    else:
        assert await interrupt_everywhere(work, check) > 3
    await nothing_left(other)


Act = Callable[[random.Random, AsyncSession], Awaitable[object]]


async def fail(chance: random.Random, session: AsyncSession) -> None:
    raise KeyError


async def commit(chance: random.Random, session: AsyncSession) -> None:
    await session.commit()


async def roll_back(chance: random.Random, session: AsyncSession) -> None:
    await session.rollback()


async def sleep(chance: random.Random, session: AsyncSession) -> None:
    await asyncio.sleep(chance.random() * 0.02)


async def abort(chance: random.Random, session: AsyncSession) -> None:
    await session.execute(text("SELECT 1 / 0"))


async def lock_some_rows(chance: random.Random, session: AsyncSession) -> None:
    mode = chance.choice(list(RowLockMode))
    await lock_rows(session, Account, chance.sample([1, 2, 3], 2), mode=mode, timeout=0.05)


async def nothing(chance: random.Random, session: AsyncSession) -> None:
    pass


ACTS: list[Act] = [fail, commit, roll_back, sleep, abort, lock_some_rows, nothing, nothing]


def random_lock(
    chance: random.Random, session: AsyncSession
) -> AbstractAsyncContextManager[object]:
    nowait = chance.random() < 0.3
    match chance.randrange(3):
        case 0:
            some = chance.sample([Item, Account, Part], chance.randint(1, 3))
            return lock_tables(
                session, some, mode=chance.choice(list(LockMode)), timeout=0.05, nowait=nowait
            )
        case 1:
            return advisory_lock(
                session,
                chance.randrange(3),
                shared=chance.random() < 0.3,
                nowait=nowait,
                timeout=0.05,
            )
        case _:
            return get_transaction(session)


async def unit(chance: random.Random, session: AsyncSession, depth: int = 0) -> None:
    async with random_lock(chance, session):
        if depth < 2 and chance.random() < 0.6:
            try:
                await unit(chance, session, depth + 1)
            except (LockTimeoutError, KeyError):
                pass
        await chance.choice(ACTS)(chance, session)


@pytest.mark.filterwarnings(
    "ignore:nested transaction already deassociated"
)  # SQLAlchemy 2.0, of a commit inside
@pytest.mark.parametrize("seed", range(12))
async def test_random_interleavings(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection, seed: int
) -> None:
    """After nested locks, commits, errors and cancellations in any order, no lock is held."""
    chance = random.Random(seed)

    async def run(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(8):
            try:
                async with session_maker() as session:
                    await unit(own, session)
            except (LockTimeoutError, KeyError, DBAPIError, InvalidRequestError):
                # A deadlock, since nested locks keep no common order, or SQLAlchemy's error for a
                # block after its commit.
                pass

    tasks = [asyncio.create_task(run(chance.getrandbits(30))) for _ in range(4)]
    for task in chance.sample(tasks, 2):
        await asyncio.sleep(chance.random() * 0.2)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [
        each
        for each in results
        if each is not None and not isinstance(each, asyncio.CancelledError)
    ]
    pool: Any = engine.pool
    assert pool.checkedout() == 0
    await nothing_left(other)


@pytest.mark.parametrize("lock", [tables, advisory])
async def test_dropped_block(engine: AsyncEngine, lock: Callable[..., Any]) -> None:
    """A block that is dropped in its middle does not roll back what the session does next."""
    async with AsyncSession(engine) as session:
        await lock(session).__aenter__()
        await session.execute(text("UPDATE account SET balance = 7 WHERE id = 1"))
        await asyncio.sleep(0.02)
        await session.commit()
        assert await session.scalar(text("SELECT balance FROM account WHERE id = 1")) == 7
