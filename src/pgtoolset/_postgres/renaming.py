"""Databases that are renamed only while they are the ones that were seen, and in limited time.

A name may belong to another database by the time that a statement uses it. ALTER DATABASE locks the
database and runs in a transaction, so a rename comes first, the look at the comment second, and a
rollback undoes the rename of another database before any session could notice. No lock is held
between two transactions, so this works behind a pooler, and no other session can keep it.
https://www.postgresql.org/docs/current/sql-alterdatabase.html
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pgtoolset._postgres.databases import comment_of, rename_statement
from pgtoolset._postgres.locks import ACTIVITY
from pgtoolset.values import Blocker

#: Seconds to wait for a lock on a database, or on its name.
LOCK_TIMEOUT = 5.0

_HOLDERS = ACTIVITY.format(
    # A prepared transaction has no pid.
    pids="""SELECT coalesce(l.pid, 0) AS pid
            FROM pg_catalog.pg_locks AS l
            JOIN pg_catalog.pg_database AS d ON d.oid OPERATOR(pg_catalog.=) l.objid
            WHERE l.locktype OPERATOR(pg_catalog.=) 'object' AND l.granted
              AND l.classid OPERATOR(pg_catalog.=)
                  CAST('pg_catalog.pg_database' AS pg_catalog.regclass)
              AND d.datname OPERATOR(pg_catalog.=) $1
              AND (l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()) IS NOT TRUE"""
)

#: Ends the sessions of the database `$1`.
END_SESSIONS = """
SELECT pg_catalog.pg_terminate_backend(s.pid, 5000)
FROM pg_catalog.pg_stat_activity AS s
JOIN pg_catalog.pg_database AS d ON d.oid OPERATOR(pg_catalog.=) s.datid
WHERE d.datname OPERATOR(pg_catalog.=) $1
  AND (s.backend_type OPERATOR(pg_catalog.=) 'autovacuum worker') IS NOT TRUE
"""

_WITH_THE_COMMENT = (
    "AND pg_catalog.shobj_description(d.oid, 'pg_database') OPERATOR(pg_catalog.=) $2"
)


@asynccontextmanager
async def _transaction(connection: Any) -> AsyncIterator[None]:
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {round(1000 * LOCK_TIMEOUT)}")
        yield


async def rename(connection: Any, name: str, new_name: str) -> None:
    """Rename a database."""
    async with _transaction(connection):
        await connection.execute(rename_statement(name, new_name))


async def rename_if_marked(connection: Any, name: str, new_name: str, comment: str | None) -> bool:
    """Rename a database and return `True`, where its comment is this one.

    PostgreSQL waits 5 seconds for the sessions of the database to end.
    """
    try:
        async with _transaction(connection):
            await connection.execute(rename_statement(name, new_name))
            if await comment_of(connection, new_name) != (True, comment):
                raise _AnotherDatabase
    except _AnotherDatabase:
        return False
    return True


class _AnotherDatabase(Exception):
    pass


async def end_sessions(connection: Any, name: str, comment: str) -> None:
    """End the sessions of the database that has this name and this comment."""
    await connection.execute(END_SESSIONS + _WITH_THE_COMMENT, name, comment)


async def holders_of(connection: Any, name: str) -> list[Blocker]:
    """Return the sessions that hold a lock on a database."""
    return [Blocker(*row) for row in await connection.fetch(_HOLDERS, name)]
