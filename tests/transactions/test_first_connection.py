"""The first connection of an engine, over which SQLAlchemy looks at the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn

from pgtoolset import RowWatcher, create_db_context
from pgtoolset.errors import PgToolsetError
from tests.proxy import Proxy
from tests.support import DRIVER_ERROR


async def run_block(engine: AsyncEngine, *, cut: Proxy | None = None) -> bool:
    """Return whether SQLAlchemy knows the server when the first statement has run.

    Args:
        engine: the engine.
        cut: a network that is not cut any more when the block begins.
    """
    async with create_db_context(async_sessionmaker(engine))() as session:
        await session.connection()
        if cut is not None:
            cut.cut = None
        await session.execute(text("SELECT 1"))
        return getattr(engine.dialect, "default_isolation_level", None) is not None


class Held:
    """Holds SQLAlchemy while it looks at the server of an engine for the first time."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.entered, self.released = asyncio.Event(), asyncio.Event()
        self._initialize: Callable[[Connection], None] = engine.dialect.initialize
        vars(engine.dialect)["initialize"] = self._held

    def _held(self, connection: Connection) -> None:
        self.entered.set()
        await_only(self.released.wait())
        self._initialize(connection)


async def test_is_lost_at_any_moment(database_url: str) -> None:
    """Where the network drops it, the error is the driver's, and the next block has another one."""
    losses = 0
    async with Proxy.to(database_url) as proxy:
        while True:
            engine = create_async_engine(proxy.url)
            proxy.cut_at_chunk("to client", losses + 1, "RST")
            try:
                await run_block(engine, cut=proxy)
            except (DBAPIError, DRIVER_ERROR, OSError) as error:
                losses += 1
                assert proxy.cut is None
                assert not isinstance(error, PgToolsetError)
                assert await run_block(engine)
            else:
                break
            finally:
                await engine.dispose()
    assert losses > 5  # to connect, and each question of SQLAlchemy


async def test_of_another_pool(engine: AsyncEngine) -> None:
    """A block that begins while SQLAlchemy looks over another pool's connection leaves that one
    alone."""
    held = Held(engine)
    pool = engine.sync_engine.pool.recreate()
    connecting = asyncio.create_task(greenlet_spawn(pool.connect))
    await held.entered.wait()
    await run_block(engine)
    held.released.set()
    connection = await connecting
    assert await run_block(engine)
    await greenlet_spawn(connection.close)
    await greenlet_spawn(pool.dispose)


@pytest.mark.asyncpg(reason="RowWatcher needs asyncpg")
async def test_of_a_watcher(engine: AsyncEngine) -> None:
    """A watcher that opens first lets the blocks wait until SQLAlchemy knows the server, and takes
    no place of the pool."""
    held = Held(engine)
    watcher = RowWatcher(engine)
    opening = asyncio.create_task(watcher.__aenter__())
    await held.entered.wait()
    blocks = [asyncio.create_task(run_block(engine)) for _ in range(3)]
    await asyncio.wait(blocks, timeout=0.1)  # they would have ended on most machines
    held.released.set()
    assert all(await asyncio.gather(*blocks))
    await opening
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await watcher.close()
