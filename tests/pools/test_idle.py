"""`warn_of_idle_transactions`: the log names each transaction that waits for something else."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.util import greenlet_spawn

from pgtoolset import create_db_context, holders, warn_of_idle_transactions
from pgtoolset._postgres.holders import holders_of
from tests.support import send_past, until

Maker = async_sessionmaker[AsyncSession]

#: Seconds after which a transaction is reported in these tests.
LIMIT = 0.05


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "pgtoolset")
    return caplog


@pytest.fixture
async def looks(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Waits until the pool of the engine was looked at once more, from the beginning of a limit."""
    found = holders_of(engine.pool)
    assert found is not None
    looked = asyncio.Event()
    look = type(found).look

    def noted(self: Any, *arguments: Any) -> None:
        look(self, *arguments)
        looked.set()

    monkeypatch.setattr(type(found), "look", noted)

    async def once() -> None:
        looked.clear()
        await asyncio.wait_for(looked.wait(), 60)

    yield once


async def test_an_idle_transaction(
    session_maker: Maker, engine: AsyncEngine, logged: pytest.LogCaptureFixture
) -> None:
    """The line has the age, the task, the line of the application and the last statement."""
    warn_of_idle_transactions(engine, LIMIT)

    async def place_order() -> None:
        async with create_db_context(session_maker)() as session:
            await session.execute(text("SELECT 42"))
            await until(lambda: bool(logged.records))

    await asyncio.create_task(place_order(), name="order 7")
    [record] = logged.records
    assert (record.name, record.levelname) == ("pgtoolset", "WARNING")
    message = record.getMessage()
    assert re.match(r"a transaction has been idle for \d+\.\d s: ", message)
    assert re.search(r"task 'order 7' for \d+\.\d s, ", message)
    assert "taken at tests/pools/test_idle.py:" in message
    assert message.endswith("in place_order, last statement: SELECT 42")


async def test_once_for_each_transaction(
    session_maker: Maker, engine: AsyncEngine, looks: Any, logged: pytest.LogCaptureFixture
) -> None:
    """One transaction is reported once, however often it is idle; the next one again."""
    warn_of_idle_transactions(engine, LIMIT)
    async with engine.connect() as connection:
        for number in (1, 2):
            for _ in range(2):
                await connection.execute(text("SELECT 1"))
                await until(lambda number=number: len(logged.records) >= number)  # type: ignore[misc]
                await looks()
                await looks()
            assert len(logged.records) == number
            await connection.rollback()


async def test_off_by_default(
    session_maker: Maker, engine: AsyncEngine, logged: pytest.LogCaptureFixture
) -> None:
    """Without the call there is neither a warning nor a timer; after `stop()` neither."""
    stop = warn_of_idle_transactions(engine, "1ms")
    stop()
    stop()
    found: Any = holders_of(engine.pool)
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
        assert found._timer is None
        await asyncio.sleep(0.05)
    assert logged.records == []


async def test_an_earlier_stop(
    session_maker: Maker, engine: AsyncEngine, logged: pytest.LogCaptureFixture
) -> None:
    """A later call sets the limit anew, at once; the `stop` of an earlier one ends nothing."""
    stop = warn_of_idle_transactions(engine, "1h")
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
        stop_later = warn_of_idle_transactions(engine, LIMIT)
        stop()
        await until(lambda: bool(logged.records))
    stop_later()


async def test_a_statement_that_runs_is_not_idle(
    session_maker: Maker, engine: AsyncEngine, looks: Any, logged: pytest.LogCaptureFixture
) -> None:
    """While PostgreSQL works on a statement, its transaction is not idle."""
    warn_of_idle_transactions(engine, LIMIT)
    async with create_db_context(session_maker)() as session:
        running = asyncio.ensure_future(session.execute(text("SELECT pg_sleep(60)")))
        for _ in range(3):
            await looks()
        assert logged.records == []
        running.cancel()
        await asyncio.wait([running])
        await session.rollback()


async def test_a_connection_without_a_transaction(
    engine: AsyncEngine, looks: Any, logged: pytest.LogCaptureFixture
) -> None:
    """A connection that is in no transaction holds no lock and no row: it is not reported."""
    warn_of_idle_transactions(engine, LIMIT)
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("SELECT 1"))
        for _ in range(3):
            await looks()
        assert logged.records == []
        await send_past(connection, "BEGIN")
        await until(lambda: bool(logged.records))
        await send_past(connection, "ROLLBACK")


async def test_it_outlives_a_pool(
    session_maker: Maker, engine: AsyncEngine, logged: pytest.LogCaptureFixture
) -> None:
    """It holds for the next pool of the engine after `dispose()`, and for what is still out."""
    stop = warn_of_idle_transactions(engine, LIMIT)
    old = engine.sync_engine.pool
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 'old'"))
        await engine.dispose()
        await until(lambda: len(logged.records) == 1)
    await greenlet_spawn(old.dispose)
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 'new'"))
        await until(lambda: len(logged.records) == 2)
        stop()
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
        await asyncio.sleep(2 * LIMIT)
    statements = [each.getMessage().rpartition(": ")[2] for each in logged.records]
    assert statements == ["SELECT 'old'", "SELECT 'new'"]


async def test_it_ends_with_the_engine(database_url: str) -> None:
    """Neither the timer nor the function that stops it keeps the engine alive."""

    async def use() -> tuple[Any, weakref.ref[Any]]:
        engine = create_async_engine(database_url)
        stop = warn_of_idle_transactions(engine, 3600)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        assert holders(engine) == []
        await engine.dispose()
        return stop, weakref.ref(engine.sync_engine)

    stop, engine = await use()

    def is_collected() -> bool:
        gc.collect()
        return engine() is None

    await until(is_collected)
    stop()


def test_two_event_loops(database_url: str, logged: pytest.LogCaptureFixture) -> None:
    """An engine that is used in one event loop after the other is looked at in each."""
    engine = create_async_engine(database_url)
    warn_of_idle_transactions(engine, LIMIT)

    async def work(number: int) -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            await until(lambda: len(logged.records) == number)
        await engine.dispose()

    asyncio.run(work(1))
    asyncio.run(work(2))
