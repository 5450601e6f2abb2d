"""`create_database` and `drop_database`: whole databases, by any name that PostgreSQL can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import URL

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.databases import (
    check_name,
    create_statement,
    drop_statement,
    execute_or_undo,
    users_of,
)
from pgtoolset._postgres.quoting import quoted
from pgtoolset._postgres.servers import maintenance_connection, server_of
from pgtoolset._postgres.sqlstates import (
    DUPLICATE_DATABASE,
    INVALID_CATALOG_NAME,
    OBJECT_IN_USE,
    UNIQUE_VIOLATION,
    sqlstate_of,
)
from pgtoolset.errors import DatabaseExistsError, DatabaseInUseError, DatabaseNotFoundError
from pgtoolset.values import Blocker

__all__ = ["create_database", "drop_database", "seal_database"]

#: How often a CREATE DATABASE is tried while its template is in use. Each time the server waits for
#: 5 seconds, and lets no new session into the template meanwhile: CREATE DATABASE holds a lock that
#: sessions need to enter it.
TRIES = 3


async def create_database(
    db_name: str, *, server_url: str | URL, template: str | None = None, exist_ok: bool = False
) -> None:
    """Create a database.

    A call that is cancelled has created nothing. While `template` is in use, PostgreSQL keeps new
    sessions out and waits for those that are in it, three times 5 seconds in all. A template of
    your own that nobody has to enter is best closed for good, with
    `pgtoolset.databases.seal_database`.

    Args:
        db_name: its name, as it is: it is quoted. 63 bytes at the most, in UTF-8.
        server_url: a URL for SQLAlchemy or libpq (`postgresql+asyncpg://...`, `postgresql://...`)
            of any database on the server. The connection is made to the database `postgres`, or,
            where that lets nobody in, to the one in the URL or to `template1`.
        template: the database that it becomes a copy of; the server's `template1` by default.
        exist_ok: a database of that name is no error; it stays as it is. Of two calls at a time,
            one creates it.

    Raises:
        DatabaseExistsError: there is a database of that name.
        DatabaseNotFoundError: there is no database of the template's name.
        DatabaseInUseError: the template is in use; it names the sessions.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

    Example:
        >>> await create_database("Shop, copy", server_url=url, template="template0", exist_ok=True)

    See https://www.postgresql.org/docs/current/sql-createdatabase.html
    """
    check_name("db_name", db_name)
    if template is not None:
        check_name("template", template)
    url = server_of("server_url", server_url)
    async with maintenance_connection(url, never=db_name, rather_not=template) as connection:
        try:
            await create(connection, url, db_name, template)
        except DatabaseExistsError:
            if not exist_ok:
                raise


async def create(
    connection: Any, url: URL, db_name: str, template: str | None, *, called: str | None = None
) -> None:
    """Create a database over a connection of asyncpg to another one. In errors it may be `called`
    something else."""
    called = called or db_name

    async def undo() -> None:
        await connection.execute(drop_statement(db_name, force=True))

    source = "template1" if template is None else template
    for left in reversed(range(TRIES)):
        try:
            return await execute_or_undo(connection, url, create_statement(db_name, template), undo)
        except Exception as error:
            state = sqlstate_of(error)
            # A database that somebody else creates at this very moment is found by the index of the
            # names.
            if state in (DUPLICATE_DATABASE, UNIQUE_VIOLATION):
                raise DatabaseExistsError(
                    f"there is a database {called!r} already: drop it, choose another name, or pass exist_ok=True"
                ) from error
            if state == INVALID_CATALOG_NAME:
                raise DatabaseNotFoundError(
                    f"there is no database {source!r} that {called!r} could become a copy of"
                ) from error
            if state != OBJECT_IN_USE:
                raise
            if not left:
                sessions = await users_of(connection, source)
                raise _in_use(
                    f"could not create {called!r} as a copy of {source!r}", source, sessions, error
                ) from error


async def drop_database(
    db_name: str, *, server_url: str | URL, missing_ok: bool = False, force: bool = False
) -> None:
    """Drop a database.

    Without `force` PostgreSQL waits 5 seconds for those who are in it. A DROP DATABASE that was
    sent runs to its end, and a cancellation is delivered after it: cut in half, it would leave a
    database that nobody can enter.

    Args:
        db_name: its name, as it is.
        server_url: a URL for SQLAlchemy or libpq of any database on the server.
        missing_ok: that there is no such database is no error.
        force: end the sessions that are in it. See the page below for what even that does not end.

    Raises:
        DatabaseNotFoundError: there is no database of that name.
        DatabaseInUseError: somebody is in it; the error names the sessions.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

    Example:
        >>> await drop_database("Shop, copy", server_url=url, missing_ok=True, force=True)

    See https://www.postgresql.org/docs/current/sql-dropdatabase.html
    """
    check_name("db_name", db_name)
    url = server_of("server_url", server_url)
    async with maintenance_connection(url, never=db_name) as connection:
        try:
            await drop(connection, db_name, force=force)
        except DatabaseNotFoundError:
            if not missing_ok:
                raise


async def drop(connection: Any, db_name: str, *, force: bool) -> None:
    """Drop a database over a connection of asyncpg to another one."""
    try:
        await uninterrupted(connection.execute(drop_statement(db_name, force=force)))
    except Exception as error:
        state = sqlstate_of(error)
        if state == INVALID_CATALOG_NAME:
            raise DatabaseNotFoundError(f"there is no database {db_name!r} to drop") from error
        if state != OBJECT_IN_USE:
            raise
        sessions = await users_of(connection, db_name)
        raise _in_use(f"could not drop {db_name!r}", db_name, sessions, error) from error


async def seal_database(db_name: str, *, server_url: str | URL) -> None:
    """Let nobody enter a database any more, and end the sessions that are in it: a template that is
    always ready.

    It can still be copied and dropped, and its copies are open. Only whoever owns a template knows
    that nobody needs to enter it, so nothing else here seals one; `ALTER DATABASE ...
    ALLOW_CONNECTIONS true` opens it again.

    Raises:
        DatabaseNotFoundError: there is no database of that name.
        ValueError, TypeError: an argument is not what it must be; before any SQL.
    """
    check_name("db_name", db_name)
    url = server_of("server_url", server_url)
    async with maintenance_connection(url, never=db_name) as connection:
        try:
            await connection.execute(
                f"ALTER DATABASE {quoted(db_name)} WITH ALLOW_CONNECTIONS false"
            )
        except Exception as error:
            if sqlstate_of(error) != INVALID_CATALOG_NAME:
                raise
            raise DatabaseNotFoundError(f"there is no database {db_name!r} to seal") from error
        await connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1",
            db_name,
        )


def _in_use(
    what: str, database: str, sessions: Sequence[Blocker], error: Exception
) -> DatabaseInUseError:
    detail = getattr(error, "detail", None)
    who = (
        "; ".join(map(str, sessions))
        or "who that is could not be seen, and may have left meanwhile"
    )
    return DatabaseInUseError(
        f"{what}, because it is in use: {who}.{f' PostgreSQL says: {detail}' if detail else ''} "
        "Close these sessions (engine.dispose()), or end them with pg_terminate_backend; "
        "drop_database(force=True) ends them itself.",
        database=database,
        sessions=sessions,
    )
