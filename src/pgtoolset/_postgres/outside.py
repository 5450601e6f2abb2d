"""A connection outside of the pool, for a look at the server while the session's own connection
waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


@asynccontextmanager
async def outside_connection(engine: Engine) -> AsyncIterator[AsyncConnection]:
    """Connect as `engine` does, but past its pool, which may be exhausted; every statement is
    committed at once.

    `Pool.recreate()` gives an empty pool that makes its connections in the same way: with the same
    arguments, and the same listeners, such as one that fetches a password.
    """
    own = AsyncEngine(Engine(engine.pool.recreate(), engine.dialect, engine.url))
    try:
        async with own.connect() as connection:
            yield await connection.execution_options(isolation_level="AUTOCOMMIT")
    finally:
        await own.dispose()
