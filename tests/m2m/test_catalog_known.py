"""`m2m._catalog`: what it knows of a table follows the table, and is kept no longer than that."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import (
    Boolean,
    Column,
    MetaData,
    Table,
    event,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import get_transaction, m2m_add, m2m_add_many, m2m_set
from pgtoolset.m2m import _catalog
from tests.m2m.shapes import created, shape


async def test_after_ddl(engine: AsyncEngine) -> None:
    """A migration between two calls of one process is noticed, in both directions."""
    made = shape(Column("is_main", Boolean, server_default="true"))
    async with created(engine, made) as session:
        (owner, *_), _ = await made.store(session)
        others = made.owner.others
        index = "shape_main ON shape_link (owner) WHERE is_main"
        for _ in range(2):
            await m2m_set(session, owner, others, pks=[1, 2])
            assert await m2m_add(session, owner, others, pks=[2], ignore_conflicts=True) == 0
            await m2m_set(session, owner, others, pks=[1])
            await session.execute(text(f"CREATE UNIQUE INDEX {index}"))
            for key in (2, 1):
                assert await m2m_set(session, owner, others, pks=[key]) == (1, 1)
                assert await m2m_set(session, owner, others, pks=[key], keep_existing=True) == (
                    0,
                    0,
                )
            await session.execute(text("DROP INDEX shape_main"))
        await session.execute(text("ALTER TABLE shape_link DROP CONSTRAINT shape_link_pkey"))
        assert await m2m_set(session, owner, others, pks=[1, 3]) == (1, 0)
        assert await m2m_add(session, owner, others, pks=[3], ignore_conflicts=True) == 0
        await session.execute(text("ALTER TABLE shape_link ADD PRIMARY KEY (owner, related)"))
        assert await m2m_set(session, owner, others, pks=[1, 2]) == (1, 1)
        await session.rollback()


async def test_a_constraint_that_is_gone(engine: AsyncEngine) -> None:
    """After an ON CONFLICT for which there is no constraint any more PostgreSQL is asked again."""
    made = shape()
    async with created(engine, made) as session:
        (owner, *_), _ = await made.store(session)
        others = made.owner.others
        assert await m2m_add(session, owner, others, pks=[1, 2], ignore_conflicts=True) == 2
        await session.execute(text("ALTER TABLE shape_link DROP CONSTRAINT shape_link_pkey"))
        with pytest.raises(DBAPIError):
            async with get_transaction(session):
                await m2m_add(session, owner, others, pks=[1, 3], ignore_conflicts=True)
        assert await m2m_add(session, owner, others, pks=[1, 3], ignore_conflicts=True) == 1
        await session.rollback()


async def test_one_question_for_each_table(engine: AsyncEngine) -> None:
    """PostgreSQL is asked once for a table, from whichever side, function and session."""
    made = shape()
    asked: list[str] = []

    def before(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "pg_depend" in statement:
            asked.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    async with created(engine, made) as first:
        (owner, *_), (one, *_) = await made.store(first)
        await first.close()
        for _ in range(2):
            async with AsyncSession(engine) as session:
                await m2m_add(session, owner, made.owner.others, pks=[2], ignore_conflicts=True)
                await m2m_set(session, one, made.related.owners, pks=[2])
                await m2m_set(session, owner, made.owner.others, pks=[2])
                await m2m_add_many(session, made.owner.others, [(1, 2)], ignore_conflicts=True)
    assert len(asked) == 1


async def test_nothing_is_kept_alive(engine: AsyncEngine) -> None:
    """What is known of a table goes with its mapping, and keeps no engine alive."""

    async def used() -> list[weakref.ref[Any]]:
        own = create_async_engine(engine.url)
        made = shape()
        async with created(own, made) as session:
            (owner, *_), _ = await made.store(session)
            await m2m_set(session, owner, made.owner.others, pks=[1])
        await own.dispose()
        return [weakref.ref(own.sync_engine), weakref.ref(own.dialect), weakref.ref(made.link)]

    own_engine, dialect, table = await used()
    gc.collect()
    assert own_engine() is None
    # SQLAlchemy's own caches keep some dialects, and 2.0 keeps a table after a flush.
    assert table() is None or sqlalchemy.__version__ < "2.1"
    if table() is None:
        left: Any = dialect()
        assert left is None or not _catalog._known.get(left)


async def test_reflected(engine: AsyncEngine) -> None:
    """A reflected table, whose metadata cannot say that its key is deferrable."""
    made = shape()
    key = "ALTER TABLE shape_link ADD PRIMARY KEY (owner, related) DEFERRABLE INITIALLY DEFERRED"
    drop = "ALTER TABLE shape_link DROP CONSTRAINT shape_link_pkey"
    async with created(engine, made, drop, key) as session:
        connection = await session.connection()
        table = await connection.run_sync(
            lambda sync: Table("shape_link", MetaData(), autoload_with=sync)
        )
        assert [each.name for each in table.primary_key] == ["owner", "related"]
        (owner, *_), _ = await made.store(session)
        assert await m2m_add(session, owner, made.owner.others, pks=[1, 2]) == 2
        assert await m2m_add(session, owner, made.owner.others, pks=[1], ignore_conflicts=True) == 0
        assert await m2m_set(session, owner, made.owner.others, pks=[2, 3]) == (1, 1)
        await session.rollback()
