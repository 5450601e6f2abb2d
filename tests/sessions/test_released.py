"""Section 1 of the contract, "released", where several tasks use one session.

A session is not made for that, and SQLAlchemy refuses it. What it has taken comes back all the
same: no connection stays checked out, and none is pooled in a transaction or in a statement.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from pgtoolset import (
    create_db_context,
    create_db_dependency,
    get_transaction,
    on_commit,
    run_transaction,
)
from tests.support import Part, insert, set_aside_what_lives, stored, until

Maker = async_sessionmaker[AsyncSession]
Open = Callable[[Maker], AbstractAsyncContextManager[AsyncSession]]
Use = Callable[["Stage"], Awaitable[None]]


class Failed(Exception):
    """Another service has failed."""


class Stage:
    """A session in a block, and the tasks that use it beside the block."""

    def __init__(self, session: AsyncSession, other: asyncpg.Connection) -> None:
        self.session = session
        self.tasks: list[asyncio.Task[Any]] = []
        self._other = other

    def start(self, *work: Any) -> None:
        self.tasks += [asyncio.ensure_future(each) for each in work]

    def sleep(self, seconds: float = 60) -> Any:
        return self.session.execute(text("SELECT pg_sleep(:s) /* blocked */"), {"s": seconds})

    async def until_it_runs(self) -> None:
        """Wait until PostgreSQL executes the statement of `sleep`."""

        async def runs() -> bool:
            query = """SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%blocked */'
                       AND state = 'active' AND pid <> pg_backend_pid()"""
            return bool(await self._other.fetchval(query))

        await until(runs)


async def fails_at_once() -> None:
    raise Failed


async def three_first_statements(stage: Stage) -> None:
    """The classic: three statements at once, before the session has a connection."""
    work = [stage.session.execute(text("SELECT 1")) for _ in range(3)]
    stage.start(*work)
    await asyncio.gather(*stage.tasks)


async def failure_beside_the_first_statement(stage: Stage) -> None:
    stage.start(insert(stage.session, 1))
    await asyncio.gather(fails_at_once(), *stage.tasks)


async def failure_beside_the_first_flush(stage: Stage) -> None:
    stage.start(stage.session.commit(), stage.sleep())
    await asyncio.gather(fails_at_once(), *stage.tasks)


async def failure_beside_a_statement(stage: Stage) -> None:
    await insert(stage.session, 1)
    stage.start(stage.sleep())
    await stage.until_it_runs()
    raise Failed


async def failure_beside_a_short_statement(stage: Stage) -> None:
    """A caller of the connection waits for the end of the statement before it rolls back."""
    await insert(stage.session, 1)
    stage.start(stage.sleep(3))
    await stage.until_it_runs()
    raise Failed


async def failure_beside_many_statements(stage: Stage) -> None:
    await insert(stage.session, 1)
    stage.start(*(stage.sleep() for _ in range(4)))
    await stage.until_it_runs()
    raise Failed


async def failure_beside_a_savepoint(stage: Stage) -> None:
    async def nested() -> None:
        async with get_transaction(stage.session):
            await stage.sleep()

    await insert(stage.session, 1)
    stage.start(nested())
    await stage.until_it_runs()
    raise Failed


async def timeout_of_a_shielded_statement(stage: Stage) -> None:
    await insert(stage.session, 1)
    stage.start(stage.sleep())
    await stage.until_it_runs()
    await asyncio.wait_for(asyncio.shield(stage.tasks[0]), 0)


async def an_end_beside_a_statement(stage: Stage) -> None:
    await insert(stage.session, 1)
    stage.start(stage.sleep())
    await stage.until_it_runs()


async def an_end_beside_a_begin(stage: Stage) -> None:
    """The block ends normally while the first statement of another task begins."""
    connection = await stage.session.connection()
    assert not (await connection.get_raw_connection()).driver_connection.is_in_transaction()  # type: ignore[union-attr]
    stage.start(insert(stage.session, 1))
    await asyncio.sleep(0)


async def failure_beside_a_begin(stage: Stage) -> None:
    await an_end_beside_a_begin(stage)
    raise Failed


async def cancellation_beside_a_statement(stage: Stage) -> None:
    await failure_beside_a_statement_that(stage, asyncio.CancelledError())


async def failure_beside_a_statement_that(stage: Stage, error: BaseException) -> None:
    await insert(stage.session, 1)
    stage.start(stage.sleep())
    await stage.until_it_runs()
    raise error


async def rollback_beside_a_statement(stage: Stage) -> None:
    await insert(stage.session, 1)
    stage.start(stage.sleep())
    await stage.until_it_runs()
    await stage.session.rollback()


async def close_beside_a_statement(stage: Stage) -> None:
    await insert(stage.session, 1)
    stage.start(stage.sleep())
    await stage.until_it_runs()
    await stage.session.close()


async def failure_inside_a_savepoint(stage: Stage) -> None:
    await insert(stage.session, 1)
    async with get_transaction(stage.session):
        stage.start(stage.sleep(0.1))
        await stage.until_it_runs()
        raise Failed


USES = [
    three_first_statements,
    failure_beside_the_first_statement,
    failure_beside_the_first_flush,
    failure_beside_a_statement,
    failure_beside_many_statements,
    failure_beside_a_savepoint,
    timeout_of_a_shielded_statement,
    an_end_beside_a_statement,
    an_end_beside_a_begin,
    failure_beside_a_begin,
    cancellation_beside_a_statement,
    rollback_beside_a_statement,
    close_beside_a_statement,
    failure_inside_a_savepoint,
]


def by_context(session_maker: Maker) -> AbstractAsyncContextManager[AsyncSession]:
    return create_db_context(session_maker)()


def by_dependency(session_maker: Maker) -> AbstractAsyncContextManager[AsyncSession]:
    return asynccontextmanager(create_db_dependency(session_maker))()


@asynccontextmanager
async def by_transaction(session_maker: Maker) -> AsyncIterator[AsyncSession]:
    session = session_maker()
    async with get_transaction(session):
        yield session


blocks = pytest.mark.parametrize("block", [by_context, by_dependency, by_transaction])


@pytest.fixture
async def small(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with two connections, for which a request waits only as long as it must."""
    engine = create_async_engine(database_url, pool_size=2, max_overflow=0, pool_timeout=60)
    try:
        yield engine
        async with engine.begin() as connection:
            await connection.execute(text("DELETE FROM part"))
            await connection.execute(text("DELETE FROM item"))
    finally:
        await engine.dispose()


async def run(block: Open, maker: Maker, use: Use, other: asyncpg.Connection) -> Stage:
    """Use a session in a block, and return when its end and all tasks are through."""
    stage = None
    try:
        async with block(maker) as session:
            stage = Stage(session, other)
            await use(stage)
    except (Exception, asyncio.CancelledError):
        pass
    assert stage is not None
    await asyncio.wait_for(asyncio.gather(*stage.tasks, return_exceptions=True), 30)
    return stage


async def nothing_is_open(other: asyncpg.Connection) -> bool:
    """Whether no session has locks on the table any more: a statement that runs on keeps them."""
    return not await other.fetchval(
        "SELECT count(*) FROM pg_locks WHERE relation = 'item'::regclass"
    )


@blocks
@pytest.mark.parametrize("use", USES)
async def test_released_beside_other_tasks(
    small: AsyncEngine, other: asyncpg.Connection, use: Use, block: Any
) -> None:
    """Five blocks whose session other tasks use leave a pool of two empty and sound: without the
    garbage collector, with no statement on a connection and none in a transaction."""
    pool: Any = small.pool
    maker = async_sessionmaker(small)
    gc.disable()
    try:
        kept = [await run(block, maker, use, other) for _ in range(5)]
        await until(lambda: pool.checkedout() == 0)
    finally:
        gc.enable()
    assert await stored(other) == set()
    await until(lambda: nothing_is_open(other))
    for _ in range(2):
        async with block(maker) as one, block(maker) as two:
            for session in (one, two):
                await session.execute(text("SELECT 1"))
    assert len(kept) == 5
    assert pool.checkedout() == 0


@pytest.mark.parametrize("block", [by_context, by_transaction])
async def test_a_commit_beside_a_failure(
    small: AsyncEngine, other: asyncpg.Connection, block: Any
) -> None:
    """A COMMIT that another task has sent is not cut, and its connection comes back after it."""
    pool: Any = small.pool
    maker = async_sessionmaker(small)
    await other.execute("INSERT INTO item (id, name) VALUES (1, '')")
    transaction = other.transaction()
    await transaction.start()
    await other.execute("SELECT 1 FROM item FOR UPDATE")

    async def is_blocked() -> bool:
        return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    with pytest.raises(Failed):
        async with block(maker) as session:
            session.add(Part(id=1, item_id=1))
            # The foreign key is checked at the COMMIT, and waits for the lock on the row.
            task = asyncio.ensure_future(session.commit())
            await until(is_blocked)
            raise Failed
    await transaction.rollback()
    await task
    assert await other.fetchval("SELECT count(*) FROM part") == 1
    await until(lambda: pool.checkedout() == 0)


@blocks
async def test_the_next_request_is_served(
    small: AsyncEngine, other: asyncpg.Connection, block: Any
) -> None:
    """The other connections of the pool stay: one bad block costs one connection."""
    maker = async_sessionmaker(small)
    pids: set[int] = set()

    async def pid(session: AsyncSession) -> int:
        return int(await session.scalar(text("SELECT pg_backend_pid()")))

    async with block(maker) as one, block(maker) as two:
        pids |= {await pid(one), await pid(two)}
    await run(block, maker, failure_beside_a_statement, other)
    async with block(maker) as one, block(maker) as two:
        assert len(pids & {await pid(one), await pid(two)}) == 1


@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only", "control_fully"])
@pytest.mark.parametrize(
    "use", [failure_beside_the_first_statement, failure_beside_a_short_statement]
)
async def test_the_connection_of_the_caller(
    small: AsyncEngine,
    other: asyncpg.Connection,
    use: Use,
    mode: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session that is bound to a connection leaves it to its caller: what the block has written
    is never stored, and the pool gets the connection when the caller closes it."""
    monkeypatch.setattr("pgtoolset._lifecycle.ROLLBACK_TIMEOUT", 1.0)
    pool: Any = small.pool
    async with small.connect() as connection:
        try:
            async with connection.begin():
                maker = async_sessionmaker(connection, join_transaction_mode=mode)
                await run(by_context, maker, use, other)
                assert pool.checkedout() == 1
        except Exception:
            pass  # the connection may be lost
    assert pool.checkedout() == 0
    assert await stored(other) == set()


async def test_a_sound_connection_of_the_caller(
    small: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A block that fails takes nothing from a caller whose connection can roll back."""
    async with small.connect() as connection, connection.begin():
        maker = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(Failed):
            async with create_db_context(maker)() as session:
                await insert(session, 1)
                raise Failed
        await connection.execute(text("INSERT INTO item (id, name) VALUES (2, '')"))
        assert await connection.scalar(text("SELECT pg_backend_pid()")) == pid
    assert await stored(other) == {2}


# Growth

#: Sessions that are forgotten one after the other must not wait for each other's rows.
IDS = itertools.count(100)


async def forgotten(maker: Maker) -> None:
    await create_db_context(maker)().__aenter__()


async def forgotten_after_a_statement(maker: Maker) -> None:
    session = await create_db_context(maker)().__aenter__()
    await insert(session, next(IDS))


async def forgotten_dependency(maker: Maker) -> None:
    generator = create_db_dependency(maker)()  # once it is dropped, the event loop closes it
    session = await anext(generator)
    await insert(session, next(IDS))


async def forgotten_transaction(maker: Maker) -> None:
    session = maker()
    await get_transaction(session).__aenter__()
    await insert(session, next(IDS))


async def forgotten_after_a_transaction(maker: Maker) -> None:
    session = maker()
    async with get_transaction(session):
        await session.execute(text("SELECT 1"))
    await session.execute(text("SELECT 1"))


async def forgotten_savepoint(maker: Maker) -> None:
    session = maker()
    await session.begin()
    await get_transaction(session).__aenter__()
    await insert(session, next(IDS))


async def forgotten_after_a_commit(maker: Maker) -> None:
    session = await create_db_context(maker)().__aenter__()
    on_commit(session, lambda: session)
    await session.commit()
    await session.execute(text("SELECT 1"))
    on_commit(session, lambda: session)


async def cancelled(maker: Maker) -> None:
    started = asyncio.Event()

    async def unit() -> None:
        async with create_db_context(maker)() as session:
            await insert(session, next(IDS))
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(unit())
    await started.wait()
    task.cancel()
    await asyncio.wait([task])


async def cancelled_run(maker: Maker) -> None:
    async def work(session: AsyncSession) -> None:
        await insert(session, next(IDS))
        raise asyncio.CancelledError

    try:
        await run_transaction(maker, work)
    except asyncio.CancelledError:
        pass


async def gathered(maker: Maker) -> None:
    try:
        async with create_db_context(maker)() as session:
            await asyncio.gather(*(session.execute(text("SELECT 1")) for _ in range(3)))
    except Exception:
        pass


async def gathered_beside_a_failure(maker: Maker) -> None:
    try:
        async with create_db_context(maker)() as session:
            task = asyncio.ensure_future(insert(session, next(IDS)))
            await asyncio.gather(fails_at_once(), task)
    except Failed:
        pass
    await asyncio.wait([task])


async def gathered_in_a_transaction(maker: Maker) -> None:
    session = maker()
    try:
        async with get_transaction(session):
            await asyncio.gather(*(session.execute(text("SELECT 1")) for _ in range(3)))
    except Exception:
        pass


WAYS = [
    forgotten,
    forgotten_after_a_statement,
    forgotten_dependency,
    forgotten_transaction,
    forgotten_after_a_transaction,
    forgotten_savepoint,
    forgotten_after_a_commit,
    cancelled,
    cancelled_run,
    gathered,
    gathered_beside_a_failure,
    gathered_in_a_transaction,
]


def alive() -> dict[str, int]:
    """How many objects there are of each class that a forgotten session could keep."""
    names = ("Session", "AsyncSession", "SessionTransaction", "Record", "Checkout")
    counts = dict.fromkeys((*names, "Connection"), 0)
    for each in gc.get_objects():
        kind = type(each)
        if kind.__name__ in names:
            counts[kind.__name__] += 1
        elif isinstance(each, Connection):
            counts["Connection"] += 1
    return counts


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("way", WAYS)
async def test_no_growth(
    database_url: str, other: asyncpg.Connection, caplog: pytest.LogCaptureFixture, way: Any
) -> None:
    """Sessions that are forgotten, cancelled or gathered leave an empty pool, no object, and no
    transaction: as often as there are connections, and then as often again."""
    engine = create_async_engine(database_url, pool_size=3, max_overflow=0, pool_timeout=60)
    pool: Any = engine.pool
    maker = async_sessionmaker(engine)
    caplog.set_level(logging.CRITICAL, logger="pgtoolset")  # pytest would keep the tracebacks
    set_aside_what_lives()
    before = alive()

    def is_as_before() -> bool:
        gc.collect()
        return pool.checkedout() == 0 and alive() == before

    try:
        for _ in range(3):
            for _ in range(3):
                await way(maker)
            await until(is_as_before)
            await asyncio.sleep(0)  # the loop closes the sockets in its next iteration
        async with create_db_context(maker)() as session:
            await insert(session, 2)
        assert await stored(other) == {2}

        await until(lambda: nothing_is_open(other))
        await other.execute("DELETE FROM item")
    finally:
        await engine.dispose()


async def unit_between_two_transactions(maker: Maker) -> AsyncSession:
    session = await create_db_context(maker)().__aenter__()
    await session.commit()
    return session


async def after_a_unit(maker: Maker) -> AsyncSession:
    async with create_db_context(maker)() as session:
        await session.execute(text("SELECT 1"))
    return session


async def after_a_block(maker: Maker) -> AsyncSession:
    session = maker()
    async with get_transaction(session):
        async with get_transaction(session):
            on_commit(session, lambda: None)
            await session.execute(text("SELECT 1"))
    return session


async def after_sqlalchemy_alone(maker: Maker) -> AsyncSession:
    async with maker.begin() as session:
        await session.execute(text("SELECT 1"))
    return session


@pytest.mark.parametrize(
    "make",
    [
        after_sqlalchemy_alone,
        unit_between_two_transactions,
        after_a_unit,
        after_a_block,
    ],
)
async def test_no_cycle(session_maker: Maker, make: Any) -> None:
    """A session that is in no transaction is freed with its last reference, as SQLAlchemy's is."""
    gc.disable()
    try:
        session = await make(session_maker)
        references: list[weakref.ref[AsyncSession] | weakref.ref[Session]] = [
            weakref.ref(session),
            weakref.ref(session.sync_session),
        ]
        del session
        await asyncio.sleep(0)
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
