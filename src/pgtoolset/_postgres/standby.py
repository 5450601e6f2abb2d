"""A primary that has become a standby: the connections of a pool that still reach it are replaced.

A standby refuses to write with SQLSTATE 25006, and goes on to answer: SQLAlchemy keeps the
connection, and `pool_pre_ping` finds it alive. PostgreSQL tells its clients by a parameter whether
it is a standby, so that nothing need be asked; what a pooler tells may be about another server.
https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-ASYNC
https://docs.sqlalchemy.org/en/20/core/pooling.html#more-on-invalidation
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.util import await_only

from pgtoolset._postgres.catalog import EQ
from pgtoolset._postgres.connections import is_closed
from pgtoolset._postgres.discards import CLOSE_TIMEOUT, discard, is_open
from pgtoolset._postgres.nodes import IS_STANDBY
from pgtoolset._postgres.sqlstates import (
    FEATURE_NOT_SUPPORTED,
    READ_ONLY_SQL_TRANSACTION,
    driver_error,
    sqlstate_of,
)

logger = logging.getLogger("pgtoolset")

#: In the `info` of a connection: the refusal in its open transaction; and whether its server was a
#: standby when the connection was first seen.
_REFUSED = "pgtoolset.refused"
_WAS_STANDBY = "pgtoolset.was_standby"

#: On an error of the driver: the transaction may succeed when it runs again on another connection.
_MOVED = "_pgtoolset_moved"

#: The largest process id of Linux. A pooler such as PgBouncer answers with 32 random bits.
_LARGEST_PID = 2**22

#: One row where the server is a standby, and the role is not read-only on a primary too. The number
#: of rows is in the command tag, so that the statement need not be prepared: a pooler may give each
#: message of a prepared one to another server.
_ASK = (
    f"SELECT 1 WHERE {IS_STANDBY} "
    f"AND pg_catalog.current_setting('default_transaction_read_only') {EQ} 'off'"
)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A statement that was refused because the transaction, or the server, is read-only.

    Attributes:
        error: the driver's error.
        connection: the connection of SQLAlchemy, as long as it is there.
        is_standby: whether the server is the reason; `None` where it has to be asked.
        is_broken: whether the driver cannot begin another transaction on its connection.
    """

    error: BaseException
    connection: ref[Connection]
    is_standby: bool | None
    is_broken: bool


def note_node(connection: PoolProxiedConnection) -> None:
    """Note whether the server of a connection is a standby, when the connection is first seen."""
    info = connection.info
    if _WAS_STANDBY not in info:
        info[_WAS_STANDBY] = _reported(connection.driver_connection, "in_hot_standby") == "on"


def note_refusal(
    connection: Connection, error: BaseException, *, is_read_only: bool, statement: str | None
) -> None:
    """Note an error of a statement where it says that the primary has moved.

    All that the pool has opened before is replaced, each connection when it is back in the pool, so
    that no other task loses the one that it uses. Sends nothing.

    Args:
        connection: the connection.
        error: an error of any kind.
        is_read_only: whether the transaction was made READ ONLY by a statement of ours.
        statement: the statement that failed.
    """
    state = sqlstate_of(error)
    if state != READ_ONLY_SQL_TRANSACTION and state != FEATURE_NOT_SUPPORTED:
        return
    if not is_open(connection):
        return
    proxied = connection.connection
    driver: Any = proxied.driver_connection
    is_refused = not _is_begun(proxied)
    if state == FEATURE_NOT_SUPPORTED and not is_refused and not _sets_transaction(statement):
        return
    # asyncpg takes such a transaction for open, and would send a SAVEPOINT as its next BEGIN.
    is_broken = is_refused and getattr(driver, "_top_xact", None) is not None
    if is_read_only or _is_read_only(proxied):
        is_standby: bool | None = False
    elif not _has_own_server(driver):
        is_standby = None
    else:
        is_standby = _reported(driver, "in_hot_standby") == "on"
        if is_standby or proxied.info.pop(_WAS_STANDBY, False):
            _mark(error)  # in the latter case it was promoted after the transaction had begun
    if is_standby:
        _replace_all(connection, proxied)
    if is_standby is not False or is_broken:
        proxied.info[_REFUSED] = _Refusal(
            driver_error(error), ref(connection), is_standby, is_broken
        )


def has_moved(error: BaseException) -> bool:
    """Whether an error was one of a primary that is a standby now."""
    return hasattr(driver_error(error), _MOVED)


def replacing_rollback(
    rollback: Callable[[PoolProxiedConnection], None],
) -> Callable[[PoolProxiedConnection], None]:
    """Return `Dialect.do_rollback` that replaces a connection to a primary that has moved."""

    def do_rollback(connection: PoolProxiedConnection) -> None:
        rollback(connection)
        if _REFUSED in connection.info:
            _settle(connection, connection.info.pop(_REFUSED))

    return do_rollback


def _settle(proxied: PoolProxiedConnection, refusal: _Refusal) -> None:
    """Replace a connection after its transaction has ended. Runs in SQLAlchemy's greenlet."""
    if _is_closed(proxied.driver_connection):
        return
    connection = refusal.connection()
    is_standby = refusal.is_standby
    if is_standby is None:
        is_standby = await_only(_ask(proxied.driver_connection))
        # Where a pooler has found a primary meanwhile, the transaction can run again as well.
        if is_standby is not False:
            _mark(refusal.error)
        if is_standby and connection is not None:
            _replace_all(connection, proxied)
    if not is_standby and not refusal.is_broken:
        return
    if connection is not None and connection.in_transaction():
        connection.invalidate(refusal.error)  # its owner goes on, with another one of the pool
    else:
        discard(proxied)


def _replace_all(connection: Connection, proxied: PoolProxiedConnection) -> None:
    """Let the pool replace each connection that it has opened before, as it gives it out again."""
    pool = connection.engine.pool
    if not hasattr(pool, "_invalidate"):
        return
    before = pool._invalidate_time
    pool._invalidate(proxied, None, _checkin=False)
    if pool._invalidate_time != before:  # not where another transaction was refused just before
        logger.warning(
            "the server of a connection is a standby now, and has refused to write; the pool "
            "replaces its connections, so that the next transaction can reach the new primary"
        )


def _mark(error: BaseException) -> None:
    setattr(driver_error(error), _MOVED, True)


async def _ask(driver: Any) -> bool | None:
    """Ask a server outside of a transaction whether it is a standby; `None` without an answer."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            if hasattr(driver, "pgconn"):
                cursor = await driver.execute(_ASK, prepare=False)
                found: bool = cursor.rowcount == 1
                await driver.rollback()
                return found
            tag: str = await driver.execute(_ASK)
            return tag == "SELECT 1"
    except Exception:
        logger.debug("a server did not say whether it is a standby", exc_info=True)
        return None


def _reported(driver: Any, name: str) -> str | None:
    """Return a parameter that the server reports by itself, as the driver has it last."""
    try:
        if hasattr(driver, "pgconn"):
            value = driver.pgconn.parameter_status(name.encode())
            return None if value is None else value.decode()
        value = getattr(driver.get_settings(), name, None)
    except Exception:
        return None
    return None if value is None else str(value)


def _has_own_server(driver: Any) -> bool:
    """Whether the driver's connection is one to PostgreSQL, and not to a pooler."""
    try:
        if hasattr(driver, "pgconn"):
            is_direct, pid = driver.prepare_threshold is not None, driver.info.backend_pid
        else:
            is_direct = bool(getattr(driver, "_stmt_cache_enabled", False))
            pid = driver.get_server_pid()
    except Exception:
        return False
    return is_direct and 0 < pid <= _LARGEST_PID


def _is_closed(driver: Any) -> bool:
    return bool(driver.closed) if hasattr(driver, "pgconn") else is_closed(driver)


def _is_read_only(proxied: PoolProxiedConnection) -> bool:
    """Whether the transaction was begun as READ ONLY, or the role's transactions are by default."""
    adapter: Any = proxied.dbapi_connection
    if getattr(adapter, "readonly", None) or getattr(adapter, "read_only", None):
        return True
    return _reported(proxied.driver_connection, "default_transaction_read_only") == "on"


def _is_begun(proxied: PoolProxiedConnection) -> bool:
    """Whether PostgreSQL is in a transaction. It is in none after a BEGIN that it has refused."""
    driver: Any = proxied.driver_connection
    try:
        if hasattr(driver, "pgconn"):
            return bool(driver.pgconn.transaction_status)
        return bool(driver.is_in_transaction())
    except Exception:
        return True


def _sets_transaction(statement: str | None) -> bool:
    """Whether a statement is one that a standby refuses with the SQLSTATE of a missing feature.

    Those are SERIALIZABLE and READ WRITE, of BEGIN and of SET TRANSACTION.
    """
    return statement is not None and statement.lstrip()[:16].upper() == "SET TRANSACTION "
