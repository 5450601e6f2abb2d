"""A holder is forgotten whichever way its connection leaves, and nothing is kept alive for it."""

from __future__ import annotations

import asyncio
import gc
import warnings
import weakref
from collections.abc import Awaitable, Callable
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
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool
from sqlalchemy.util import greenlet_spawn

from pgtoolset import (
    create_db_context,
    get_transaction,
    holders,
    run_transaction,
    warn_of_idle_transactions,
)
from pgtoolset._postgres.connections import terminate_driver
from tests.support import (
    insert,
    interrupt_everywhere,
    pid_of,
    raw_of,
    swallow_error,
    until,
)

Maker = async_sessionmaker[AsyncSession]
Leave = Callable[[AsyncEngine, Maker, asyncpg.Connection], Awaitable[None]]


async def by_commit(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    async with create_db_context(maker)() as session:
        await session.execute(text("SELECT 1"))
        await session.commit()
        assert holders(engine) == []
        await session.execute(text("SELECT 2"))
        assert len(holders(engine)) == 1


async def by_rollback(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    async with create_db_context(maker)() as session:
        await session.execute(text("SELECT 1"))
        await session.rollback()
        assert holders(engine) == []


async def by_an_error(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    with pytest.raises(DBAPIError):
        async with create_db_context(maker)() as session:
            await session.execute(text("SELECT 1 / 0"))


async def by_a_swallowed_error(
    engine: AsyncEngine, maker: Maker, other: asyncpg.Connection
) -> None:
    async with maker() as session:
        await swallow_error(session)
        assert len(holders(engine)) == 1


async def by_a_retry(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    seen = []

    async def work(session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))
        seen.append(len(holders(engine)))
        if len(seen) == 1:
            raise asyncpg.SerializationError

    await run_transaction(maker, work)
    assert seen == [1, 1]


async def by_a_cancellation(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    async def work() -> None:
        async with create_db_context(maker)() as session:
            await session.execute(text("SELECT pg_sleep(60)"))

    task = asyncio.create_task(work())
    await until(lambda: any(each.statement for each in holders(engine)))
    task.cancel()
    await asyncio.wait([task])


async def by_a_cancelled_wait(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    """The caller waits for a connection, and is cancelled in the pool."""
    taken = [await engine.connect().__aenter__() for _ in range(5)]
    async with create_db_context(maker)() as session:
        task = asyncio.create_task(session.connection())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    for each in taken:
        await each.close()


async def by_discard(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    """The block ends while a statement of another task runs on the connection."""
    tasks = []

    async def runs() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(59)'"
        return bool(await other.fetchval(query))

    with pytest.raises(ZeroDivisionError):
        async with create_db_context(maker)() as session:
            await session.execute(text("SELECT 1"))
            tasks.append(asyncio.ensure_future(session.execute(text("SELECT pg_sleep(59)"))))
            await until(runs)
            raise ZeroDivisionError
    await asyncio.wait(tasks)
    assert tasks[0].exception() is not None


async def by_invalidate(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    async with maker() as session:
        await (await session.connection()).invalidate()
        assert holders(engine) == []


async def by_soft_invalidate(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    async with engine.connect() as connection:
        pooled: Any = await connection.get_raw_connection()
        pooled.invalidate(soft=True)
        assert len(holders(engine)) == 1
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        [holder] = holders(engine)
        assert holder.statement == "SELECT 1"


async def by_terminate(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    """The socket is closed under the session."""
    with pytest.raises(DBAPIError):
        async with create_db_context(maker)() as session:
            terminate_driver(await raw_of(session))
            await session.execute(text("SELECT 1"))


async def by_the_server(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    # SQLAlchemy 2.0 does not wrap what asyncpg raises before it knows of the loss.
    with pytest.raises((DBAPIError, asyncpg.InternalClientError)):
        async with create_db_context(maker)() as session:
            await other.execute(f"SELECT pg_terminate_backend({pid_of(await raw_of(session))})")
            while True:
                await session.execute(text("SELECT 1"))


async def by_detach(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    async with engine.connect() as connection:
        pooled: Any = await connection.get_raw_connection()
        await connection.run_sync(lambda sync: sync.detach())
        assert holders(engine) == []
        raw = pooled.driver_connection or pooled.dbapi_connection
    terminate_driver(getattr(raw, "driver_connection", raw))


async def by_dispose(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    """What is out as the pool is replaced belongs to no pool of the engine."""
    old = engine.sync_engine.pool
    async with create_db_context(maker)() as session:
        await session.execute(text("SELECT 1"))
        await engine.dispose()
        assert holders(engine) == []
        await session.execute(text("SELECT 1"))
    await greenlet_spawn(old.dispose)
    assert holders(engine) == []
    async with create_db_context(maker)() as session:
        await session.execute(text("SELECT 2"))
        [holder] = holders(engine)
        assert holder.statement == "SELECT 2"


async def by_a_failed_connect(engine: AsyncEngine, maker: Maker, other: asyncpg.Connection) -> None:
    dialect = engine.dialect
    connect = dialect.connect

    def refused(*arguments: Any, **named: Any) -> Any:
        assert len(holders(engine)) == 1
        raise ConnectionRefusedError

    vars(dialect)["connect"] = refused
    await engine.dispose()
    with pytest.raises(ConnectionRefusedError):
        async with create_db_context(maker)() as session:
            await session.execute(text("SELECT 1"))
    vars(dialect)["connect"] = connect


async def by_garbage_collection(
    engine: AsyncEngine, maker: Maker, other: asyncpg.Connection
) -> None:
    async def forget() -> weakref.ref[AsyncSession]:
        session = maker()
        await get_transaction(session).__aenter__()
        await session.execute(text("SELECT 1"))
        assert len(holders(engine)) == 1
        return weakref.ref(session)

    forgotten = await forget()

    def is_collected() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
        return forgotten() is None and holders(engine) == []

    await until(is_collected)
    await asyncio.sleep(0)  # the loop closes the socket in its next iteration


WAYS: list[Leave] = [
    by_commit,
    by_rollback,
    by_an_error,
    by_a_swallowed_error,
    by_a_retry,
    by_a_cancellation,
    by_a_cancelled_wait,
    by_discard,
    by_invalidate,
    by_soft_invalidate,
    by_terminate,
    by_the_server,
    by_detach,
    by_dispose,
    by_a_failed_connect,
    by_garbage_collection,
]


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.parametrize("leave", WAYS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("poolclass", [AsyncAdaptedQueuePool, NullPool])
async def test_a_way_out(
    database_url: str, other: asyncpg.Connection, leave: Leave, poolclass: type[Pool]
) -> None:
    """The list is empty after each way out of a pool that keeps connections, or keeps none."""
    sizes = {"pool_size": 5, "max_overflow": 0} if poolclass is AsyncAdaptedQueuePool else {}
    engine = create_async_engine(database_url, poolclass=poolclass, **sizes)
    try:
        assert holders(engine) == []
        await leave(engine, async_sessionmaker(engine), other)
        assert holders(engine) == []
        assert poolclass is NullPool or engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


async def test_overflow(database_url: str) -> None:
    """A connection that the pool closes as it returns is forgotten, too."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=2)
    assert holders(engine) == []
    taken = [await engine.connect().__aenter__() for _ in range(3)]
    for number, each in enumerate(taken):
        assert len(holders(engine)) == 3 - number
        await each.close()
    assert holders(engine) == []
    await engine.dispose()


async def test_cancelled_everywhere(engine: AsyncEngine, session_maker: Maker) -> None:
    """Wherever a block is cancelled, the list has what the pool counts: nothing."""
    db_context = create_db_context(session_maker)

    async def work(_: int) -> None:
        async with db_context() as session:
            await insert(session, 1)
            async with get_transaction(session):
                await session.execute(text("SELECT 1"))
            await session.rollback()
            await session.execute(text("SELECT 1"))

    async def check(n: int) -> None:
        pool: Any = engine.pool
        assert holders(engine) == [], n
        assert pool.checkedout() == 0, n

    async with engine.connect():
        pass  # SQLAlchemy 2.0 does not close a connection whose making is cancelled
    assert await interrupt_everywhere(work, check) > 5


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
async def test_nothing_is_kept_alive(database_url: str) -> None:
    """Engine, pool, task and session are collected as they are without the library."""

    async def use() -> list[weakref.ref[Any]]:
        engine = create_async_engine(database_url)
        warn_of_idle_transactions(engine, 60)
        maker = async_sessionmaker(engine)
        found: list[weakref.ref[Any]] = []

        async def work() -> None:
            async with create_db_context(maker)() as session:
                await session.execute(text("SELECT 1"))
                task = asyncio.current_task()
                found.extend(map(weakref.ref, (task, session, engine.sync_engine, engine.pool)))
                found.extend(map(weakref.ref, (await session.connection(),)))

        await asyncio.create_task(work())
        await engine.dispose()
        return found

    found = await use()

    def are_collected() -> bool:
        gc.collect()
        return all(each() is None for each in found)

    await until(are_collected)
