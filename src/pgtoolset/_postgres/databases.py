"""The SQL of whole databases: create and drop them, and find the sessions in one.

https://www.postgresql.org/docs/current/sql-createdatabase.html and
https://www.postgresql.org/docs/current/sql-dropdatabase.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import URL

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.catalog import EQ, NE
from pgtoolset._postgres.locks import ACTIVITY
from pgtoolset._postgres.quoting import literal, quoted
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset.values import Blocker

logger = logging.getLogger("pgtoolset")

#: Seconds in which a statement that was cancelled has to end.
_CANCEL_TIMEOUT = 30.0

_USERS = ACTIVITY.format(
    # A prepared transaction has no pid. PostgreSQL itself ends an autovacuum worker in the way.
    pids=f"""SELECT s.pid FROM pg_catalog.pg_stat_activity AS s
            WHERE s.datname {EQ} $1 AND s.pid {NE} pg_catalog.pg_backend_pid()
              AND (s.backend_type {EQ} 'autovacuum worker') IS NOT TRUE
            UNION ALL SELECT 0 FROM pg_catalog.pg_prepared_xacts AS x WHERE x.database {EQ} $1"""
)

#: What uses a database and is no session, with the slots that are active and their processes.
_OBSTACLES = f"""
SELECT 'prepared' AS kind, x.gid AS name, NULL AS pid FROM pg_catalog.pg_prepared_xacts AS x
WHERE x.database {EQ} $1
UNION ALL
SELECT 'slot', s.slot_name, s.active_pid FROM pg_catalog.pg_replication_slots AS s
WHERE s.database {EQ} $1 AND s.active
UNION ALL
SELECT 'subscription', u.subname, NULL FROM pg_catalog.pg_subscription AS u
JOIN pg_catalog.pg_database AS d ON d.oid {EQ} u.subdbid WHERE d.datname {EQ} $1
"""

_COMMENTS = (
    "SELECT d.datname AS name, pg_catalog.shobj_description(d.oid, 'pg_database') AS comment"
    " FROM pg_catalog.pg_database AS d"
)


def create_statement(name: str, template: str | None) -> str:
    return f"CREATE DATABASE {quoted(name)}" + (
        f" TEMPLATE {quoted(template)}" if template is not None else ""
    )


def drop_statement(name: str, *, force: bool) -> str:
    return f"DROP DATABASE {quoted(name)}" + (" WITH (FORCE)" if force else "")


async def users_of(connection: Any, name: str) -> list[Blocker]:
    """Return the other sessions, and the prepared transactions, that use a database."""
    return [Blocker(*row) for row in await connection.fetch(_USERS, name)]


async def obstacles_of(connection: Any, name: str) -> list[tuple[str, str, int | None]]:
    """Return what else uses a database: the kind, the name and the process of each.

    See https://www.postgresql.org/docs/current/sql-dropdatabase.html
    """
    return [tuple(row) for row in await connection.fetch(_OBSTACLES, name)]


async def execute_or_undo(
    connection: Any, url: URL, statement: str, undo: Callable[[], Awaitable[object]]
) -> None:
    """Run a statement; if the caller is cancelled meanwhile, cancel the statement or undo it.

    The driver's own way to cancel a statement does not report whether it succeeded nevertheless.
    Here another connection asks PostgreSQL to cancel it, and PostgreSQL's answer to the statement
    itself is awaited.
    """
    task = asyncio.ensure_future(connection.execute(statement))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await uninterrupted(_take_back(connection, url, task, undo))
        raise


async def _take_back(
    connection: Any, url: URL, task: asyncio.Future[Any], undo: Callable[[], Awaitable[object]]
) -> None:
    try:
        if not task.done():
            async with maintenance_connection(url, never="") as other:
                await other.execute(
                    f"SELECT pg_catalog.pg_cancel_backend({connection.get_server_pid()})"
                )
    except Exception:
        logger.debug("a statement could not be cancelled, and is awaited", exc_info=True)
    if not (await asyncio.wait([task], timeout=_CANCEL_TIMEOUT))[0]:
        # Behind a pooler the process id is not that of the backend, and the driver's way is left.
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_TIMEOUT)
    if not task.done():
        connection.terminate()
        await asyncio.wait([task])
    if not task.cancelled() and task.exception() is None:
        try:
            await undo()
        except Exception:
            # The caller must receive the cancellation.
            logger.warning("a cancelled call has created a database that remains", exc_info=True)


async def comment_of(connection: Any, name: str) -> tuple[bool, str | None]:
    """Return whether a database exists, and the comment on it."""
    row = await connection.fetchrow(f"{_COMMENTS} WHERE d.datname {EQ} $1", name)
    return row is not None, None if row is None else row["comment"]


async def comments(connection: Any) -> list[tuple[str, str | None]]:
    """Return the names of all databases, and the comments on them."""
    return [(row["name"], row["comment"]) for row in await connection.fetch(_COMMENTS)]


def comment_statement(name: str, comment: str) -> str:
    return f"COMMENT ON DATABASE {quoted(name)} IS {literal(comment)}"


def rename_statement(name: str, new_name: str) -> str:
    return f"ALTER DATABASE {quoted(name)} RENAME TO {quoted(new_name)}"
