"""The look-out for blockers: one connection for each engine, and its failures are nobody else's."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from weakref import ref

import asyncpg
import pytest
from sqlalchemy import NullPool, StaticPool, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import LockTimeoutError, advisory_lock, lock_rows, lock_tables
from pgtoolset._postgres import lookout
from pgtoolset._postgres.outside import Onlooker
from tests.locks.locking import holding, nothing_left, waiting
from tests.support import Account, Item

WAITERS = 20


@pytest.fixture
async def counted(database_url: str) -> AsyncIterator[_Counted]:
    """An engine for many waiters, and the number of its connections, now and at most."""
    engine = create_async_engine(database_url, pool_size=WAITERS + 1)
    counted = _Counted(engine)
    yield counted
    await engine.dispose()


class _Counted:
    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.open = self.most = 0
        event.listen(engine.sync_engine, "connect", self._connected)
        event.listen(engine.sync_engine, "close", self._closed)

    def _connected(self, *_: Any) -> None:
        self.open += 1
        self.most = max(self.most, self.open)

    def _closed(self, *_: Any) -> None:
        self.open -= 1


async def fill(engine: AsyncEngine) -> list[AsyncSession]:
    """Return a session for each waiter, each on a connection of the pool."""
    sessions = [AsyncSession(engine) for _ in range(WAITERS)]
    for session in sessions:
        await session.connection()
    return sessions


@pytest.mark.usefixtures("unhurried")
async def test_one_connection_for_all(counted: _Counted, other: asyncpg.Connection) -> None:
    """Many waiters take one connection beside the pool; each error names its blocker; it closes."""
    sessions = await fill(counted.engine)
    before = counted.open

    async def wait(number: int, session: AsyncSession) -> LockTimeoutError:
        with pytest.raises(LockTimeoutError) as caught:
            if number % 3 == 0:
                async with lock_tables(session, [Item], timeout=2):
                    pass
            elif number % 3 == 1:
                async with advisory_lock(session, 42, timeout=2):
                    pass
            else:
                await lock_rows(session, Account, [1], timeout=2)
        return caught.value

    await other.execute("INSERT INTO account (id, balance) VALUES (1, 0)")
    both = "LOCK TABLE item; SELECT pg_advisory_xact_lock(42); SELECT FROM account FOR UPDATE"
    async with holding(other, both) as pid:
        waits = (wait(number, session) for number, session in enumerate(sessions))
        errors = await asyncio.gather(*waits)
    for number, error in enumerate(errors):
        # In the queue for a row, the sessions before are in the way.
        named = {blocker.pid for blocker in error.blockers}
        assert named if number % 3 == 2 else pid in named, str(error)
    assert counted.most == before + 1
    assert counted.open == before
    for session in sessions:
        await session.close()
    await counted.engine.dispose()


@pytest.mark.usefixtures("unhurried")
async def test_waiters_leave_one_by_one(counted: _Counted, other: asyncpg.Connection) -> None:
    """Cancelled, timed out or granted, a waiter takes no connection from those that still wait."""
    sessions = await fill(counted.engine)
    before = counted.open

    async def wait(session: AsyncSession, timeout: float) -> None:
        async with lock_tables(session, [Item], timeout=timeout):
            pass

    async with holding(other, "LOCK TABLE item") as pid:
        tasks = [
            asyncio.create_task(wait(session, 1 + number / 10))
            for number, session in enumerate(sessions)
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[5:10]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for number, result in enumerate(results):
        if 5 <= number < 10 and isinstance(result, asyncio.CancelledError):
            continue
        assert isinstance(result, LockTimeoutError), result
        assert pid in {blocker.pid for blocker in result.blockers}, str(result)
    assert counted.most <= before + 1
    for session in sessions:
        await session.close()
    await counted.engine.dispose()
    assert counted.open == 0
    await nothing_left(other)


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("pool", [NullPool, StaticPool])
async def test_any_pool(database_url: str, other: asyncpg.Connection, pool: Any) -> None:
    """The pool may keep nothing, or one connection for all."""
    engine = create_async_engine(database_url, poolclass=pool)
    async with holding(other, "LOCK TABLE item") as pid:
        async with AsyncSession(engine) as session:
            with pytest.raises(LockTimeoutError) as caught:
                async with lock_tables(session, [Item], timeout=0.3):
                    pass
    assert [blocker.pid for blocker in caught.value.blockers] == [pid]
    await engine.dispose()


@pytest.mark.usefixtures("unhurried")
async def test_failing_connection(
    engine: AsyncEngine, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a connection to ask over, a lock is granted as ever, and its error says why."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError("too many clients")

    monkeypatch.setattr("pgtoolset._postgres.outside.outside_connection", refuse)
    async with AsyncSession(engine) as session:
        await other.execute("BEGIN; LOCK TABLE item")
        with pytest.raises(LockTimeoutError, match="too many clients") as caught:
            async with lock_tables(session, [Item], timeout=0.3):
                pass
        assert not caught.value.blockers
        monkeypatch.setattr(lookout, "_OPEN_BEFORE", 60.0)
        task = asyncio.create_task(lock_tables(session, [Item], timeout="60s").__aenter__())
        await waiting(other)
        await other.execute("ROLLBACK")
        await task


async def test_lost_connection(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A connection that is lost is an error of the question; the next question has another."""
    async with Onlooker.joined(engine.sync_engine) as onlooker:
        pids = []
        for _ in range(2):
            pid = await onlooker.ask(lambda c: c.scalar(text("SELECT pg_backend_pid()")))
            pids.append(pid)
            await other.execute("SELECT pg_terminate_backend($1, 5000)", pid)
            with pytest.raises((SQLAlchemyError, asyncpg.PostgresError, OSError)):
                await onlooker.blocking(1)
        assert pids[0] != pids[1]


async def test_one_question_fails_alone(engine: AsyncEngine) -> None:
    """An error of one question leaves the others, and the connection, as they are."""
    async with Onlooker.joined(engine.sync_engine) as onlooker:
        bad, good, none = await asyncio.gather(
            onlooker.ask(lambda c: c.scalar(text("SELECT 1 / 0"))),
            onlooker.ask(lambda c: c.scalar(text("SELECT 7"))),
            onlooker.blocking(1),
            return_exceptions=True,
        )
    assert isinstance(bad, Exception)
    assert (good, none) == (7, [])


async def test_swallowed_cancellation(database_url: str) -> None:
    """Leaving ends the task although the driver has made an error of its cancellation."""
    connecting = asyncio.Event()

    async def connect() -> None:
        connecting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError("the network ended at the same moment") from None

    engine = create_async_engine(database_url, async_creator=connect)

    async def ask_and_leave() -> None:
        async with Onlooker.joined(engine.sync_engine) as onlooker:
            asking = asyncio.create_task(onlooker.blocking(1))
            await connecting.wait()
            asking.cancel()

    leaving = asyncio.create_task(ask_and_leave())
    done, _ = await asyncio.wait([leaving], timeout=10)
    assert done
    await engine.dispose()


async def test_cancellation_swallowed_by_an_answer(engine: AsyncEngine) -> None:
    """Leaving ends the task although an answer has arrived in place of its cancellation."""
    asked = asyncio.Event()

    async def answer(_: object) -> None:
        asked.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async def ask_and_leave() -> None:
        async with Onlooker.joined(engine.sync_engine) as onlooker:
            asking = asyncio.create_task(onlooker.ask(answer))
            await asked.wait()
            asking.cancel()

    leaving = asyncio.create_task(ask_and_leave())
    done, _ = await asyncio.wait([leaving], timeout=10)
    assert done


async def test_nothing_is_kept(database_url: str) -> None:
    """After the last user nothing refers to the engine any more."""
    engine = create_async_engine(database_url)
    async with Onlooker.joined(engine.sync_engine) as onlooker:
        assert await onlooker.blocking(1) == []
        async with Onlooker.joined(engine.sync_engine) as same:
            assert same is onlooker
    await engine.dispose()
    seen = ref(engine.sync_engine)
    del engine, onlooker, same
    gc.collect()
    assert seen() is None


async def test_nobody_in_the_way(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal without any blocker says what was seen, and when."""

    async def none(*_: Any, **__: Any) -> list[Any]:
        return []

    monkeypatch.setattr("pgtoolset.locks.tables.sessions_holding", none)
    async with AsyncSession(engine) as holder, lock_tables(holder, [Item]):
        async with AsyncSession(engine) as session:
            with pytest.raises(LockTimeoutError, match="named no session in the way"):
                async with lock_tables(session, [Item], nowait=True):
                    pass


async def test_limit_of_the_connection(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A wait that the connection's own `lock_timeout` ended says that a timeout names more."""
    async with holding(other, "SELECT pg_advisory_xact_lock(42)"), AsyncSession(engine) as session:
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        with pytest.raises(LockTimeoutError, match="Pass a timeout"):
            async with advisory_lock(session, 42):
                pass
