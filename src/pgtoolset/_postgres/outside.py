"""A connection outside of the pool, to ask the server while the session's own connection waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


@asynccontextmanager
async def outside_connection(engine: Engine) -> AsyncIterator[AsyncConnection]:
    """Yield a connection in AUTOCOMMIT that is made as `engine` makes its own, outside of the pool.

    The pool may be exhausted. `Pool.recreate()` returns an empty pool that connects in the same
    way: with the same arguments and the same listeners, such as one that fetches a password.
    """
    own = AsyncEngine(Engine(engine.pool.recreate(), engine.dialect, engine.url))
    try:
        async with own.connect() as connection:
            yield await connection.execution_options(isolation_level="AUTOCOMMIT")
    finally:
        await own.dispose()
