"""The connection of a session behind PgBouncer in transaction mode."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    TransactionStateError,
    create_db_context,
    driver_connection,
    get_transaction,
    release_connection,
)
from tests.pgbouncer import WITHOUT_CACHES, pgbouncer
from tests.support import insert, stored


async def test_behind_pgbouncer(engine: AsyncEngine, database_url: str, other: Any) -> None:
    """Tasks that share few backends each have their own modes and settings after the block, their
    own locks are in the way and not those of others, and a block that ends its transaction is
    seen."""
    isolation = text("SELECT current_setting('transaction_isolation')")
    tenant = text("SELECT current_setting('app.tenant_id', true)")
    async with pgbouncer(database_url) as url:
        bouncing = create_async_engine(url, connect_args=WITHOUT_CACHES)
        maker = async_sessionmaker(bouncing)

        async def work(number: int) -> None:
            level: Any = "SERIALIZABLE" if number % 2 else "REPEATABLE READ"
            settings = {"app.tenant_id": number}
            async with (
                maker() as session,
                get_transaction(session, isolation_level=level, settings=settings),
            ):
                await session.execute(isolation)
                async with release_connection(session):
                    await asyncio.sleep(0)
                assert await session.scalar(isolation) == level.lower()
                assert await session.scalar(tenant) == str(number)
                if number % 3 == 0:
                    await session.execute(text(f"SELECT pg_advisory_xact_lock({number})"))
                    with pytest.raises(TransactionStateError, match="an advisory lock"):
                        async with release_connection(session):
                            raise AssertionError("the block has begun")

        await asyncio.gather(*map(work, range(12)))
        with pytest.raises(TransactionStateError, match="has ended"):
            async with create_db_context(maker)() as session:
                await insert(session, 1)
                async with driver_connection(session) as connection:
                    await connection.execute("ROLLBACK")
                    await end_of_another(maker)
        await bouncing.dispose()
    assert await stored(other) == set()


async def end_of_another(maker: async_sessionmaker[AsyncSession]) -> None:
    """Use the backend for another task."""
    async with maker() as session:
        await session.execute(text("SELECT 1"))
