"""Connections that must not serve the next user of the pool: they are closed and replaced.

Such a connection is still in a transaction, or a statement of another task still runs on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.util import await_only

from pgtoolset._postgres.drivers import driver_at, driver_of, raw_at
from pgtoolset.errors import TransactionStateError

#: Seconds that the server may take to cancel a statement and to close the connection.
CLOSE_TIMEOUT = 2.0

logger = logging.getLogger("pgtoolset")

#: In the `info` of a connection, which the pool empties when it connects again.
_DISCARDED = "pgtoolset.discarded"


def is_running(connection: PoolProxiedConnection) -> bool:
    """Whether a task executes a statement on the connection at this moment.

    Such a statement is part of no transaction that could be ended now.
    """
    return driver_at(connection).is_running(connection)


def check_is_free(connection: PoolProxiedConnection) -> None:
    """Raise before a COMMIT that would not end the transaction of a statement that still runs."""
    if driver_at(connection).is_running(connection):
        raise TransactionStateError(
            "a statement of another task still runs on the connection, so the transaction cannot "
            "be committed; wait for every task that uses the session before that"
        )


def is_autocommit(connection: Connection) -> bool:
    """Whether each statement is a transaction of its own, as the driver's adapter knows it."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def discard(connection: PoolProxiedConnection) -> None:
    """Close the connection; the pool makes a new one in its place at the next checkout.

    Runs in SQLAlchemy's greenlet.
    """
    if connection.is_valid:
        connection.invalidate(soft=True)
        await_only(_end(connection))


async def _end(connection: PoolProxiedConnection) -> None:
    """Close the driver's connection, and cancel what runs on it.

    PostgreSQL does not see that a client is gone before the end of its statement. It would go on,
    and keep its row locks.
    """
    raw: Any = raw_at(connection)
    driver = driver_of(raw)
    if raw is None:
        return
    if driver.is_closed(raw):
        driver.terminate(raw)  # the driver may not know yet that it is lost
        return
    connection.info[_DISCARDED] = True
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await driver.close(raw)
    except BaseException as error:
        driver.terminate(raw)
        if not isinstance(error, Exception):
            raise


def replace_pool(connection: Connection) -> bool:
    """Let the pool replace each connection that it has opened before, as it gives it out again.

    SQLAlchemy does the same where it takes an error for the loss of a connection. No other task
    loses the one that it uses. `connection` itself stays.

    Returns:
        `False` where all connections as old as this one are replaced already.
    """
    pool = connection.engine.pool
    if not hasattr(pool, "_invalidate"):
        return False
    before = pool._invalidate_time
    pool._invalidate(connection.connection, None, _checkin=False)
    return bool(pool._invalidate_time != before)


def is_discarded(connection: Connection | None) -> bool:
    """Whether `discard` has closed a connection that was not lost before.

    The other connections of its pool are as good as they were.
    """
    return connection is not None and is_open(connection) and _DISCARDED in connection.info


async def release(connection: Connection) -> None:
    """Close the driver's connection, because its transaction cannot be rolled back otherwise.

    A COMMIT that was sent is left alone: it cannot be taken back, and its end frees the connection.
    """
    if is_open(connection) and not _is_committing(connection.connection):
        await _end(connection.connection)
        if is_open(connection):
            connection.invalidate()


def is_open(connection: Connection) -> bool:
    """Whether there is a connection of the driver below a connection of SQLAlchemy."""
    return not (connection.closed or connection.invalidated)


def _is_committing(connection: PoolProxiedConnection) -> bool:
    return driver_at(connection).is_committing(connection)


def checked_rollback(
    rollback: Callable[[PoolProxiedConnection], None],
) -> Callable[[PoolProxiedConnection], None]:
    """Return `Dialect.do_rollback` that discards a connection whose transaction has not ended."""

    def do_rollback(connection: PoolProxiedConnection) -> None:
        driver = driver_at(connection)
        if driver.is_running(connection):
            _discard_running(connection)
            return
        if _DISCARDED in connection.info:
            return  # the pool resets it once more as it returns
        try:
            driver.roll_back(connection, rollback)
        except Exception:
            discard(connection)
            raise
        # Without a transaction that SQLAlchemy knows of, it has sent no ROLLBACK.
        adapter: Any = connection.dbapi_connection
        if adapter is not None and driver.is_in_transaction(adapter.driver_connection):
            discard(connection)

    return do_rollback


def _discard_running(connection: PoolProxiedConnection) -> None:
    # The driver refuses a ROLLBACK now. Before the answer to its BEGIN, SQLAlchemy sends none.
    if _DISCARDED not in connection.info:
        logger.warning(
            "a statement of another task still runs on a connection that is to be rolled back; the "
            "connection is discarded, which ends the statement"
        )
        discard(connection)
