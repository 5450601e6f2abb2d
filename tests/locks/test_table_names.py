"""`lock_tables`: names of tables, quoted and translated, and a table that is missing."""

from __future__ import annotations

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import LockTimeoutError, lock_tables
from tests.locks.locking import SCHEMA, Animal, Dog, Order, holding, locks_of, pid_of
from tests.support import Item

Maker = async_sessionmaker[AsyncSession]


@pytest.mark.usefixtures("odd_tables")
async def test_names(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Reserved words, mixed case and schemas are quoted; a class locks every table that it maps."""
    async with session_maker() as session:
        async with lock_tables(session, [Order, Dog, Animal.__table__], mode="SHARE") as locked:
            held = {
                name
                for name, mode in await locks_of(other, await pid_of(locked))
                if mode == "ShareLock"
            }
            assert held == {"order", "Animal", Dog.__tablename__}
        async with lock_tables(session, [Animal], mode="SHARE"):
            held = {
                name
                for name, mode in await locks_of(other, await pid_of(session))
                if mode == "ShareLock"
            }
            assert held == {"Animal"}
        async with holding(other, f'LOCK TABLE "{SCHEMA}"."order"'):
            with pytest.raises(LockTimeoutError) as caught:
                async with lock_tables(session, [Order, Animal], nowait=True):
                    pass
        assert caught.value.tables == (f'"{SCHEMA}"."order"', '"Animal"')


@pytest.mark.usefixtures("odd_tables")
@pytest.mark.parametrize("where", ["engine", "transaction"])
async def test_schema_translate_map(
    engine: AsyncEngine, other: asyncpg.Connection, where: str
) -> None:
    """Schemas are translated as they are for the session's own statements."""
    await other.execute(f'CREATE TABLE "{SCHEMA}".item (LIKE item); CREATE TABLE "order" (id int)')
    try:
        translation = {None: SCHEMA, SCHEMA: None}
        translated = (
            engine.execution_options(schema_translate_map=translation)
            if where == "engine"
            else engine
        )
        async with AsyncSession(translated) as session, session.begin():
            if where == "transaction":
                await session.connection(execution_options={"schema_translate_map": translation})
            async with lock_tables(session, [Item, Order], mode="SHARE"):
                oids = await other.fetch(
                    """SELECT relation::regclass::text AS name FROM pg_locks
                       WHERE mode = 'ShareLock' AND pid = $1""",
                    await pid_of(session),
                )
                assert {row["name"] for row in oids} == {f'"{SCHEMA}".item', '"order"'}
    finally:
        await other.execute('DROP TABLE "order"')


async def test_missing_table(session_maker: Maker) -> None:
    """A missing table is PostgreSQL's own error, and the outer transaction survives it."""
    async with session_maker() as session, session.begin():
        with pytest.raises(DBAPIError) as caught:
            async with lock_tables(session, [Order]):
                pass
        assert not isinstance(caught.value, LockTimeoutError)
        assert await session.scalar(text("SELECT 1")) == 1
