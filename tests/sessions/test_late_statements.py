"""Statements that reach PostgreSQL after the request to cancel them, which it ignores then."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import create_db_context, holders
from tests.support import until

pytestmark = pytest.mark.skipif(
    "DATABASE_URL" in os.environ, reason="stops a process of the embedded server"
)

SLEEP = text("SELECT pg_sleep(:seconds) /* late */")


@pytest.fixture
async def single(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    yield engine
    await engine.dispose()


def has_request(pid: int) -> bool:
    """Whether a stopped backend has a SIGINT waiting, with which it is asked to cancel."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")]
    return bool(int(pending[0], 16) & 1 << (signal.SIGINT - 1))


async def is_over(other: asyncpg.Connection, pid: int) -> bool:
    """Whether no backend executes the statement."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND state <> 'idle'"
    return not await other.fetchval(query, pid)


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(
            "the block",
            marks=pytest.mark.asyncpg(reason="psycopg waits for the end of the statement"),
        ),
        "another task",
    ],
)
async def test_cancelled_before_it_arrives(
    single: AsyncEngine, other: asyncpg.Connection, of: str
) -> None:
    """released: a statement that PostgreSQL begins after it was asked to cancel it is cancelled all
    the same, and does not run to its end with the locks of its transaction."""
    started = asyncio.Event()
    pid = 0

    async def sleep(session: AsyncSession) -> None:
        started.set()
        await session.execute(SLEEP, {"seconds": 600})

    async def block() -> None:
        nonlocal pid
        async with create_db_context(async_sessionmaker(single))() as session:
            for _ in range(7):  # psycopg prepares a statement at its sixth execution
                await session.execute(SLEEP, {"seconds": 0})
            pid = await session.scalar(text("SELECT pg_backend_pid()")) or 0
            os.kill(pid, signal.SIGSTOP)
            if of == "the block":
                await sleep(session)
            task = asyncio.ensure_future(sleep(session))
            kept.append(task)
            await until(is_sent)
            raise KeyError

    def is_sent() -> bool:
        return started.is_set() and "late" in str(holders(single)[0].statement)

    kept: list[asyncio.Task[Any]] = []
    running = asyncio.ensure_future(block())
    kept.append(running)
    try:
        await until(is_sent)
        await asyncio.sleep(0.05)  # the loop writes what it has been given
        if of == "the block":
            running.cancel()
        await until(lambda: has_request(pid))
    finally:
        if pid:
            os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        await asyncio.gather(*kept, return_exceptions=True)
        await until(lambda: is_over(other, pid))
