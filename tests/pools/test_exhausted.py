"""`PoolTimeoutError`: a pool that is exhausted says who holds its connections."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import make_transient_to_detached
from sqlalchemy.pool import QueuePool

from pgtoolset import (
    PgToolsetError,
    PoolTimeoutError,
    WaitTimeoutError,
    create_db_context,
    holders,
    lock_tables,
    m2m_add,
    run_transaction,
    wait_for_row_change,
)
from pgtoolset.watch._polls import is_lost
from tests.m2m.models import Post
from tests.support import Item

Maker = async_sessionmaker[AsyncSession]

#: Seconds that a caller waits for a connection in these tests.
PATIENCE = 0.05


@pytest.fixture
def hasty(engine: AsyncEngine) -> AsyncEngine:
    """The engine, whose pool has callers wait only for a moment."""
    pool: Any = engine.pool
    pool._timeout = PATIENCE
    return engine


@asynccontextmanager
async def exhausted(maker: Maker, count: int = 5) -> AsyncIterator[None]:
    """Hold connections of the pool, in a task each, while the block runs."""
    done = asyncio.Event()

    async def hold(number: int, taken: asyncio.Event) -> None:
        async with create_db_context(maker)() as session:
            await session.execute(text(f"SELECT {number}"))
            taken.set()
            await done.wait()

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            taken = asyncio.Event()
            group.create_task(hold(number, taken), name=f"holder {number}")
            await taken.wait()
        try:
            yield
        finally:
            done.set()


async def test_a_thousand_waiters(hasty: AsyncEngine, session_maker: Maker) -> None:
    """Of a thousand callers of a pool of five, each one receives the five that hold it."""
    async with exhausted(session_maker):
        db_context = create_db_context(session_maker)

        async def wait() -> PoolTimeoutError:
            with pytest.raises(PoolTimeoutError) as caught:
                async with db_context() as session:
                    await session.execute(text("SELECT 1"))
            return caught.value

        errors = await asyncio.gather(*(wait() for _ in range(1000)))
        for error in errors:
            assert [each.task for each in error.holders] == [f"holder {n}" for n in range(5)]
            assert {each.where.function for each in error.holders if each.where} == {"hold"}
            assert [each.statement for each in error.holders] == [f"SELECT {n}" for n in range(5)]
    assert holders(hasty) == []


async def test_the_message(hasty: AsyncEngine, session_maker: Maker) -> None:
    """The message says how long, how many, who for the longest time, and what to do."""
    async with exhausted(session_maker):
        with pytest.raises(PoolTimeoutError) as caught:
            async with session_maker() as session:
                await session.execute(text("SELECT 1"))
        message = str(caught.value)
        assert "no connection of the pool became free in " in message
        assert "5 in use (pool_size 5, overflow 0); the longest is held by task 'holder 0' for" in (
            message
        )
        assert "taken at tests/pools/test_exhausted.py:" in message
        assert "in hold, last statement: SELECT 0. End each transaction before you wait" in message
        assert message.isprintable()


async def test_it_is_the_error_of_sqlalchemy(hasty: AsyncEngine) -> None:
    """It is SQLAlchemy's error and Python's, with SQLAlchemy's code and its page."""
    holders(hasty)
    pool: Any = hasty.pool
    connections = [await hasty.connect().__aenter__() for _ in range(5)]
    with pytest.raises(PoolTimeoutError) as caught:
        await hasty.connect().__aenter__()
    for each in connections:
        await each.close()
    error = caught.value
    for kind in (PgToolsetError, exc.TimeoutError, exc.SQLAlchemyError, TimeoutError):
        assert isinstance(error, kind)
    assert error.code == "3o7r"
    assert str(error).endswith("/3o7r)")
    assert isinstance(error.__cause__, exc.TimeoutError)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(twin), twin.holders) == (str(error), error.holders)
        assert type(twin) is PoolTimeoutError
    assert pool.checkedout() == 0


async def test_connections_from_before_are_counted(hasty: AsyncEngine) -> None:
    """Connections that were taken before the library has seen the engine are a number."""
    early = [await hasty.connect().__aenter__() for _ in range(2)]
    holders(hasty)
    late = [await hasty.connect().__aenter__() for _ in range(3)]
    with pytest.raises(PoolTimeoutError, match="2 of them since before") as caught:
        await hasty.connect().__aenter__()
    assert len(caught.value.holders) == 3
    for each in early + late:
        await each.close()


async def test_nothing_is_known(hasty: AsyncEngine) -> None:
    """Where none of the holders is known, the message says how many there are."""
    early = [await hasty.connect().__aenter__() for _ in range(5)]
    assert holders(hasty) == []
    with pytest.raises(PoolTimeoutError, match="5 of them since before") as caught:
        await hasty.connect().__aenter__()
    assert caught.value.holders == ()
    for each in early:
        await each.close()


# Whose error it is


async def in_a_block(maker: Maker) -> None:
    async with create_db_context(maker)() as session:
        await session.execute(text("SELECT 1"))


async def in_a_lock(maker: Maker) -> None:
    async with maker() as session, lock_tables(session, [Item]):
        pass


async def in_an_association(maker: Maker) -> None:
    async with maker() as session:
        post = Post(id=1)
        make_transient_to_detached(post)
        await m2m_add(session, post, Post.tags, pks=[1])


@pytest.mark.parametrize("use", [in_a_block, in_a_lock, in_an_association])
async def test_every_function(
    hasty: AsyncEngine, session_maker: Maker, use: Callable[[Maker], Awaitable[None]]
) -> None:
    """A function that finds the pool exhausted raises the error with its holders."""
    async with exhausted(session_maker):
        with pytest.raises(PoolTimeoutError) as caught:
            await use(session_maker)
        assert len(caught.value.holders) == 5


async def test_it_is_not_tried_again(hasty: AsyncEngine, session_maker: Maker) -> None:
    """An exhausted pool is no server that went away, not even after one: no further attempt."""
    runs = 0

    async def work(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise asyncpg.ConnectionDoesNotExistError
        await session.execute(text("SELECT 1"))

    async with exhausted(session_maker):
        with pytest.raises(PoolTimeoutError):
            await run_transaction(session_maker, work)
    assert runs == 2


def test_it_is_no_lost_connection() -> None:
    """Polls take it for what SQLAlchemy's own error was: the connection is not lost."""
    assert not is_lost(PoolTimeoutError("exhausted"))
    assert is_lost(TimeoutError("the server does not answer"))


async def test_a_waiter_outlasts_it(hasty: AsyncEngine, session_maker: Maker) -> None:
    """A wait for a row that holds no connection goes on after a poll without one."""
    async with exhausted(session_maker):
        async with session_maker() as session:
            with pytest.raises(WaitTimeoutError, match="PoolTimeoutError"):
                await wait_for_row_change(session, Item, 1, timeout=0.01, interval=0.01)


async def test_a_waiter_that_is_a_holder(hasty: AsyncEngine, session_maker: Maker) -> None:
    """A wait for a row, of a session that holds a connection of the exhausted pool, is in vain."""
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
        async with exhausted(session_maker, 4):
            with pytest.raises(PoolTimeoutError) as caught:
                await wait_for_row_change(session, Item, 1, timeout=60)
    assert [each.statement for each in caught.value.holders][:2] == ["SELECT 1", "SELECT 0"]
    assert len(caught.value.holders) == 5


async def test_a_pool_of_another_kind(database_url: str) -> None:
    """A pool of one's own that is exhausted in its own words is given the holders, too."""

    class Full(QueuePool):
        _is_asyncio = True

        def _do_get(self) -> Any:
            raise exc.TimeoutError("full")

    engine = create_async_engine(database_url, poolclass=Full)
    holders(engine)
    with pytest.raises(PoolTimeoutError):
        await engine.connect().__aenter__()
    await engine.dispose()
