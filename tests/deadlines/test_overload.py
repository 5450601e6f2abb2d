"""More requests than the database can serve: each ends at its deadline, and the pool is whole."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from pgtoolset import DeadlineExceededError, create_db_context, holders
from tests.deadlines.lengths import in_time
from tests.support import plain_url, sqlalchemy_url

REQUESTS = 500
POOL = 3
WORK = 0.05


class Weather:
    """How late this machine is meanwhile: its event loop, and its server over a connection of its
    own.

    Attributes:
        late: the worst delay that was seen, in seconds.
    """

    def __init__(self) -> None:
        self.late = 0.0
        self.is_over = False

    async def watch(self, url: str) -> None:
        connection = await asyncpg.connect(plain_url(url))
        try:
            while not self.is_over:
                began = time.monotonic()
                await connection.execute(f"SELECT pg_sleep({WORK})")
                self.late = max(self.late, time.monotonic() - began - WORK)
        finally:
            await connection.close()


@in_time(1.0, 1.0, 1.0)
async def test_overload(seconds: float, database_url: str) -> None:
    """500 requests for 3 connections, each with a second: all of them have ended after 1.2 s, but
    for what the machine itself is late; the pool is whole and serves the next one."""
    engine = create_async_engine(
        sqlalchemy_url(database_url), pool_size=POOL, max_overflow=0, pool_timeout=30
    )
    db_context = create_db_context(async_sessionmaker(engine), deadline=seconds)
    pool: Any = engine.pool
    weather = Weather()
    outcomes: Counter[str] = Counter()
    slowest = 0.0

    async def request() -> None:
        nonlocal slowest
        began = time.monotonic()
        try:
            async with db_context() as session:
                await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": WORK})
            outcomes["done"] += 1
        except DeadlineExceededError as error:
            outcomes[error.spent_on] += 1
        slowest = max(slowest, time.monotonic() - began)

    try:
        watching = asyncio.create_task(weather.watch(database_url))
        await asyncio.gather(*(request() for _ in range(REQUESTS)))
        weather.is_over = True
        await watching
        assert outcomes.total() == REQUESTS
        assert set(outcomes) <= {"done", "pool", "statement"}
        assert outcomes["pool"] > REQUESTS / 2
        assert slowest <= 1.2 + 3 * weather.late
        assert pool.checkedout() == 0 and holders(engine) == []
        assert pool.checkedin() <= POOL
        await asyncio.gather(*(request() for _ in range(POOL)))
    finally:
        await engine.dispose()
