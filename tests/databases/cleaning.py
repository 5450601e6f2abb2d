"""A database of its own for a test of `cleanup_tables`, and tools to look at it."""

from __future__ import annotations

from typing import Any

import asyncpg
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    event,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.support import until


def tables(*names: str, schema: str | None = None) -> MetaData:
    """Return metadata that knows these tables by their names and an id alone."""
    metadata = MetaData(schema=schema)
    for name in names:
        Table(name, metadata, Column("id", Integer, primary_key=True))
    return metadata


async def counts(sql: asyncpg.Connection, *names: str) -> list[int]:
    return [await sql.fetchval(f"SELECT count(*) FROM {name}") for name in names]


async def files(sql: asyncpg.Connection) -> dict[str, tuple[Any, ...]]:
    """Return what changes when a table or sequence is truncated, altered or written."""
    rows = await sql.fetch(
        """SELECT c.oid::regclass::text AS name, c.relfilenode, c.xmin::text,
                  pg_stat_get_tuples_deleted(c.oid)
           FROM pg_class c
           WHERE c.relkind IN ('r', 'p', 'S') AND c.relnamespace = 'public'::regnamespace"""
    )
    return {row["name"]: tuple(row) for row in rows}


async def waiting(sql: asyncpg.Connection) -> None:
    """Wait until a session of the database waits for a lock."""

    async def waits() -> bool:
        # In a transaction the view stays as it was at the first query, until this call.
        await sql.execute("SELECT pg_stat_clear_snapshot()")
        query = """SELECT EXISTS (SELECT FROM pg_stat_activity
                   WHERE wait_event_type = 'Lock' AND datname = current_database())"""
        return bool(await sql.fetchval(query))

    await until(waits)


def statements(engine: AsyncEngine) -> list[str]:
    """Return a list of the statements that the engine sends from now on."""
    sent: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    return sent
