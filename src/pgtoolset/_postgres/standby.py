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
from pgtoolset._postgres.connections import backend_pid
from pgtoolset._postgres.discards import CLOSE_TIMEOUT, discard, is_open, replace_pool
from pgtoolset._postgres.drivers import driver_at, driver_of, raw_at
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
        connection: the connection of SQLAlchemy, while it is there.
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
        info[_WAS_STANDBY] = _is_standby(connection)


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
    raw: Any = raw_at(proxied)
    driver = driver_at(proxied)
    # It is in no transaction after a BEGIN that it has refused.
    is_refused = not (driver.is_closed(raw) or driver.is_in_transaction(raw))
    if state == FEATURE_NOT_SUPPORTED and not is_refused and not _sets_transaction(statement):
        return
    is_broken = driver.refuses_to_begin(raw)
    # A standby has no SERIALIZABLE, for readers neither: that is no refusal to write.
    if state == READ_ONLY_SQL_TRANSACTION and (is_read_only or _is_read_only(proxied)):
        is_standby: bool | None = False
    elif backend_pid(connection) is None:  # a pooler, which has told of another server perhaps
        is_standby = None
    else:
        is_standby = _is_standby(proxied)
        if is_standby or proxied.info.pop(_WAS_STANDBY, False):
            _mark(error)  # in the latter case it was promoted after the transaction had begun
    if is_standby:
        _replace_all(connection)
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
    raw: Any = raw_at(proxied)
    if raw is None or driver_of(raw).is_closed(raw):
        return
    connection = refusal.connection()
    is_standby = refusal.is_standby
    if is_standby is None:
        is_standby = await_only(_ask(raw))
        # Where a pooler has found a primary meanwhile, the transaction can run again as well.
        if is_standby is not False:
            _mark(refusal.error)
        if is_standby and connection is not None:
            _replace_all(connection)
    if not is_standby and not refusal.is_broken:
        return
    if connection is not None and connection.in_transaction():
        connection.invalidate(refusal.error)  # its owner goes on, with another one of the pool
    else:
        discard(proxied)


def _replace_all(connection: Connection) -> None:
    if replace_pool(connection):  # not where another transaction was refused just before
        logger.warning(
            "the server of a connection is a standby now, and has refused to write; the pool "
            "replaces its connections, so that the next transaction can reach the new primary"
        )


def _mark(error: BaseException) -> None:
    setattr(driver_error(error), _MOVED, True)


async def _ask(raw: Any) -> bool | None:
    """Ask a server outside of a transaction whether it is a standby; `None` without an answer."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            return await driver_of(raw).finds_row(raw, _ASK)
    except Exception:
        logger.debug("a server did not say whether it is a standby", exc_info=True)
        return None


def _is_standby(proxied: PoolProxiedConnection) -> bool:
    """Whether the server is a standby, as it has told last."""
    return _reported(proxied, "in_hot_standby") == "on"


def _is_read_only(proxied: PoolProxiedConnection) -> bool:
    """Whether the transaction was begun as READ ONLY, or the role's transactions are by default."""
    if driver_at(proxied).is_read_only(proxied):
        return True
    return _reported(proxied, "default_transaction_read_only") == "on"


def _reported(proxied: PoolProxiedConnection, name: str) -> str | None:
    return driver_at(proxied).reported(raw_at(proxied), name)


def _sets_transaction(statement: str | None) -> bool:
    """Whether a statement is one that a standby refuses with the SQLSTATE of a missing feature.

    Those are SERIALIZABLE and READ WRITE, of BEGIN and of SET TRANSACTION.
    """
    return statement is not None and statement.lstrip()[:16].upper() == "SET TRANSACTION "
