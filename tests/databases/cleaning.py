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


def tables(*names: str, schema: str | None = None) -> MetaData:
    """Metadata that knows these tables by their names alone; what they look like is the database's
    business."""
    metadata = MetaData(schema=schema)
    for name in names:
        Table(name, metadata, Column("id", Integer, primary_key=True))
    return metadata


async def counts(sql: asyncpg.Connection, *names: str) -> list[int]:
    return [await sql.fetchval(f"SELECT count(*) FROM {name}") for name in names]


async def files(sql: asyncpg.Connection) -> dict[str, tuple[Any, ...]]:
    """What changes when a table or sequence is truncated, altered or written: its file, its row in
    the catalog."""
    rows = await sql.fetch(
        """SELECT c.oid::regclass::text AS name, c.relfilenode, c.xmin::text, pg_stat_get_tuples_deleted(c.oid)
           FROM pg_class c WHERE c.relkind IN ('r', 'p', 'S') AND c.relnamespace = 'public'::regnamespace"""
    )
    return {row["name"]: tuple(row) for row in rows}


def statements(engine: AsyncEngine) -> list[str]:
    """What the engine sends from now on."""
    sent: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    return sent
