"""`create_database` and `drop_database`: whole databases, by any name that PostgreSQL can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import URL

from pgtoolset._arguments import DatabaseUrl, check_flag, check_name, shown, url_of
from pgtoolset._cancellation import uninterrupted
from pgtoolset._outcomes import raise_if_unanswered
from pgtoolset._postgres.databases import (
    create_statement,
    drop_statement,
    execute_or_undo,
    obstacles_of,
    users_of,
)
from pgtoolset._postgres.quoting import quoted
from pgtoolset._postgres.renaming import END_SESSIONS
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset._postgres.sqlstates import (
    DUPLICATE_DATABASE,
    INVALID_CATALOG_NAME,
    OBJECT_IN_USE,
    UNIQUE_VIOLATION,
    detail_of,
    sqlstate_of,
)
from pgtoolset.errors import (
    DatabaseExistsError,
    DatabaseInUseError,
    DatabaseNotFoundError,
    PgToolsetError,
)
from pgtoolset.values import Blocker

__all__ = ["create_database", "drop_database", "seal_database"]

#: How often a CREATE DATABASE is tried while its template is in use. Each time PostgreSQL waits for
#: 5 seconds and holds a lock that keeps new sessions out of the template.
TRIES = 3

#: How to end what uses a database and is no session.
_ENDS = {
    "prepared": (
        "the prepared transaction {name}, which COMMIT PREPARED or ROLLBACK PREPARED ends in that "
        "database"
    ),
    "slot": (
        "the active replication slot {name}, which is free when its consumer has stopped (process "
        "{pid}; pg_terminate_backend ends it, and a consumer that still runs connects again)"
    ),
    "subscription": (
        "the subscription {name}, which DROP SUBSCRIPTION ends in that database (after ALTER "
        "SUBSCRIPTION ... DISABLE and ... SET (slot_name = NONE) where its publisher is gone)"
    ),
}


async def create_database(
    db_name: str,
    *,
    server_url: DatabaseUrl,
    template: str | None = None,
    exist_ok: bool = False,
) -> None:
    """Create a database.

    A call that raises `CancelledError` has created nothing. While `template` is in use, PostgreSQL
    keeps new sessions out of it and waits for its sessions, three times 5 seconds in all. Seal a
    template that no application uses, with `pgtoolset.databases.seal_database`; then nothing is
    waited for.

    Args:
        db_name: the name, which is quoted: at most 63 bytes in UTF-8.
        server_url: a URL for SQLAlchemy or libpq (`postgresql+asyncpg://...`, `postgresql://...`)
            of any database on the server. The connection is made to the database `postgres`, or,
            where that refuses it, to the one in the URL or to `template1`.
        template: the database to copy; the server's `template1` by default.
        exist_ok: whether a database of that name is accepted and left as it is. Of two calls at a
            time, one creates it.

    Raises:
        DatabaseExistsError: a database of that name exists.
        DatabaseNotFoundError: the template does not exist.
        DatabaseInUseError: the template is in use; the error names the sessions.
        CommitUnknownError: the connection was lost before PostgreSQL had answered.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

    Example:
        >>> await create_database("Shop, copy", server_url=url, template="template0", exist_ok=True)

    See https://www.postgresql.org/docs/current/sql-createdatabase.html
    """
    check_name("db_name", db_name)
    url = url_of("server_url", server_url)
    if template is not None:
        check_name("template", template)
    check_flag("exist_ok", exist_ok)
    async with maintenance_connection(url, never=db_name, rather_not=template) as connection:
        try:
            await create(connection, url, db_name, template)
        except DatabaseExistsError:
            if not exist_ok:
                raise


async def create(
    connection: Any, url: URL, db_name: str, template: str | None, *, called: str | None = None
) -> None:
    """Create a database over a connection of the driver to another database.

    Args:
        connection: to any other database on the server.
        url: of the server.
        db_name: the name of the new database.
        template: the database to copy.
        called: the name for errors, where the database will be renamed.
    """

    async def undo() -> None:
        await connection.execute(drop_statement(db_name, force=True))

    for left in reversed(range(TRIES)):
        try:
            return await execute_or_undo(connection, url, create_statement(db_name, template), undo)
        except Exception as error:
            raise_if_unanswered(error)
            if sqlstate_of(error) == OBJECT_IN_USE and left:
                continue
            refusal = await _refusal(connection, error, called or db_name, template or "template1")
            if refusal is None:
                raise
            raise refusal from error


async def _refusal(
    connection: Any, error: Exception, name: str, template: str
) -> PgToolsetError | None:
    """Return the error for PostgreSQL's refusal to create a database; `None` for any other."""
    state = sqlstate_of(error)
    # The unique index of the names finds a database that another session creates at this moment.
    if state in (DUPLICATE_DATABASE, UNIQUE_VIOLATION):
        return DatabaseExistsError(
            f"the database {shown(name)} exists already: drop it, choose another name, or pass "
            "exist_ok=True"
        )
    if state == INVALID_CATALOG_NAME:
        return DatabaseNotFoundError(
            f"the template {shown(template)} does not exist, so {shown(name)} cannot become a copy "
            "of it: create the template first, or choose another"
        )
    if state == OBJECT_IN_USE:
        sessions = await users_of(connection, template)
        action = f"create {shown(name)} as a copy of {shown(template)}"
        return _in_use(action, template, sessions, error)
    return None


async def drop_database(
    db_name: str, *, server_url: DatabaseUrl, missing_ok: bool = False, force: bool = False
) -> None:
    """Drop a database.

    Without `force`, PostgreSQL waits 5 seconds for its sessions to end. A DROP DATABASE that was
    sent runs to its end, and a cancellation is delivered after it: one that is interrupted would
    leave a database that refuses every connection.

    Args:
        db_name: the name, which is quoted.
        server_url: a URL for SQLAlchemy or libpq of any database on the server.
        missing_ok: whether a database that does not exist is accepted.
        force: end the sessions of the database. Prepared transactions, active replication slots and
            subscriptions are not ended.

    Raises:
        DatabaseNotFoundError: the database does not exist.
        DatabaseInUseError: the database is in use; the error names the sessions, and what else uses
            it and how to end that.
        CommitUnknownError: the connection was lost before PostgreSQL had answered.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

    Example:
        >>> await drop_database("Shop, copy", server_url=url, missing_ok=True, force=True)

    See https://www.postgresql.org/docs/current/sql-dropdatabase.html
    """
    check_name("db_name", db_name)
    url = url_of("server_url", server_url)
    check_flag("missing_ok", missing_ok)
    check_flag("force", force)
    async with maintenance_connection(url, never=db_name) as connection:
        try:
            await drop(connection, db_name, force=force)
        except DatabaseNotFoundError:
            if not missing_ok:
                raise


async def drop(connection: Any, db_name: str, *, force: bool, timeout: float | None = None) -> None:
    """Drop a database over a connection of the driver to another database.

    Args:
        connection: to any other database on the server.
        db_name: the name.
        force: end the sessions of the database.
        timeout: seconds after which the statement is cancelled with a `TimeoutError`: it may wait
            for a lock of another session.
    """
    statement = drop_statement(db_name, force=force)
    try:
        await uninterrupted(connection.execute(statement, timeout=timeout))
    except Exception as error:
        raise_if_unanswered(error)
        state = sqlstate_of(error)
        if state == INVALID_CATALOG_NAME:
            raise _missing(db_name) from error
        if state != OBJECT_IN_USE:
            raise
        sessions = await users_of(connection, db_name)
        obstacles = [
            _ENDS[kind].format(name=shown(name), pid=pid)
            for kind, name, pid in await obstacles_of(connection, db_name)
        ]
        raise _in_use(f"drop {shown(db_name)}", db_name, sessions, error, obstacles) from error


async def seal_database(db_name: str, *, server_url: DatabaseUrl) -> None:
    """Refuse connections to a database from now on, and end its sessions: for a template.

    A sealed database can still be copied and dropped, and its copies accept connections. No other
    function seals a database, since only its owner knows that no application uses it. `ALTER
    DATABASE ... ALLOW_CONNECTIONS true` opens it again.

    Args:
        db_name: the name, which is quoted.
        server_url: a URL for SQLAlchemy or libpq of any database on the server.

    Raises:
        DatabaseNotFoundError: the database does not exist.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

    Example:
        >>> await seal_database("shop_template", server_url=url)

    See https://www.postgresql.org/docs/current/sql-alterdatabase.html
    """
    check_name("db_name", db_name)
    url = url_of("server_url", server_url)
    async with maintenance_connection(url, never=db_name) as connection:
        try:
            await connection.execute(
                f"ALTER DATABASE {quoted(db_name)} WITH ALLOW_CONNECTIONS false"
            )
        except Exception as error:
            raise_if_unanswered(error)
            if sqlstate_of(error) != INVALID_CATALOG_NAME:
                raise
            raise _missing(db_name) from error
        await connection.execute(END_SESSIONS, db_name)


def _missing(db_name: str) -> DatabaseNotFoundError:
    return DatabaseNotFoundError(
        f"the database {shown(db_name)} does not exist on this server: check the name, and that "
        "server_url names the right server"
    )


def _in_use(
    action: str,
    database: str,
    sessions: Sequence[Blocker],
    error: Exception,
    obstacles: Sequence[str] = (),
) -> DatabaseInUseError:
    """Return the error for a database that is in use.

    Args:
        action: what could not be done, after "could not".
        database: the database in use.
        sessions: those in it.
        error: PostgreSQL's own.
        obstacles: what else is in the way, which `force=True` does not end.
    """
    detail = detail_of(error)
    users = [str(each) for each in sessions if each.pid or not obstacles]
    if not users and not obstacles:
        users = ["its sessions could not be seen, or have ended since"]
    says = f" PostgreSQL says: {detail}" if detail else ""
    advice = (
        "Close these sessions (engine.dispose()), or end them with pg_terminate_backend; "
        "drop_database(force=True) ends them itself."
    )
    if obstacles:
        advice = f"force=True does not end: {'; '.join(obstacles)}."
    used = f" is in use: {'; '.join(users)}" if users else " is in use"
    return DatabaseInUseError(
        f"could not {action}, because {shown(database)}{used}.{says} {advice}",
        database=database,
        sessions=sessions,
    )
