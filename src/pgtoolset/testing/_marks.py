"""Marks on the tables and types of create_db_session, by which the next run knows what to drop.

The mark is a comment on the type: each table has a row type of its name, whose comment no tool
reads, and which is dropped with the table. https://www.postgresql.org/docs/current/sql-comment.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.quoting import do_block, literal
from pgtoolset._postgres.sending import send
from pgtoolset.testing._owners import Owner, owner_in

logger = logging.getLogger("pgtoolset")

_KIND = "pgtoolset session table"

#: Row types of tables, enumerations and domains of this database: its oid, kind, name and mark.
_TYPES = text("""
SELECT t.oid, t.typtype::pg_catalog.text AS kind,
       pg_catalog.format('%I.%I', n.nspname, t.typname) AS name,
       pg_catalog.obj_description(t.oid, 'pg_type') AS mark,
       (t.xmin OPERATOR(pg_catalog.=) pg_catalog.pg_current_xact_id()::pg_catalog.xid) AS is_new
FROM pg_catalog.pg_type AS t
JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) t.typnamespace
LEFT JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) t.typrelid
WHERE (t.typtype OPERATOR(pg_catalog.=) 'e' OR t.typtype OPERATOR(pg_catalog.=) 'd'
       OR c.relkind OPERATOR(pg_catalog.=) 'r' OR c.relkind OPERATOR(pg_catalog.=) 'p')
  AND n.nspname OPERATOR(pg_catalog.<>) 'information_schema'
  AND NOT pg_catalog.starts_with(CAST(n.nspname AS pg_catalog.text), 'pg_')
""")

#: What drops a type of each kind. Tables come first: their columns have the other types.
_DROPS = {"c": "TABLE", "d": "DOMAIN", "e": "TYPE"}


async def types(connection: AsyncConnection) -> set[int]:
    """Return the oids of the types that are in the database."""
    return {row.oid for row in await connection.execute(_TYPES)}


async def mark(connection: AsyncConnection, owner: Owner, before: set[int]) -> None:
    """Mark the types that this transaction has made.

    Args:
        connection: in the transaction.
        owner: the block that they belong to.
        before: the types that were there when the transaction began.
    """
    rows = (await connection.execute(_TYPES)).all()
    made = [row.name for row in rows if row.is_new and row.oid not in before]
    comment = literal(owner.mark(_KIND))
    statements = (f"COMMENT ON TYPE {name} IS {comment};" for name in made)
    if made:
        await _execute(connection, do_block(f"BEGIN {' '.join(statements)} END"))


async def sweep(connection: AsyncConnection, is_over: Callable[[Owner], bool]) -> None:
    """Drop the tables and types of blocks that are over, where no other object depends on them."""
    rows = (await connection.execute(_TYPES)).all()
    marks = {row.mark: owner_in(row.mark, _KIND) for row in rows if row.mark}
    over = {
        comment
        for comment, owner in marks.items()
        if owner is not None and await asyncio.to_thread(is_over, owner)
    }
    names: dict[str, list[str]] = {kind: [] for kind in _DROPS}
    for row in rows:
        if row.mark in over:
            names[row.kind].append(row.name)
    if not any(names.values()):
        return
    try:
        async with connection.begin_nested():
            for kind, drop in _DROPS.items():
                if names[kind]:
                    await _execute(connection, f"DROP {drop} {', '.join(names[kind])}")
    except Exception:
        if connection.invalidated:
            raise
        logger.warning("tables that an earlier run has left could not be dropped", exc_info=True)


async def _execute(connection: AsyncConnection, statement: str) -> Any:
    return await connection.run_sync(send, statement)
