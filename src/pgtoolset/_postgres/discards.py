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

from pgtoolset.errors import TransactionStateError

#: Seconds that the server may take to cancel a statement and to close the connection.
CLOSE_TIMEOUT = 2.0

logger = logging.getLogger("pgtoolset")

#: In the `info` of a connection, which the pool empties when it connects again.
_DISCARDED = "pgtoolset.discarded"


def is_running(connection: PoolProxiedConnection) -> bool:
    """Whether a task executes a statement on the connection at this moment.

    The driver refuses a second statement, but SQLAlchemy sends none to end a transaction whose
    BEGIN has not been answered yet.
    """
    mutex = getattr(connection.dbapi_connection, "_execute_mutex", None)
    return mutex is not None and mutex.locked()


def check_is_free(connection: PoolProxiedConnection) -> None:
    """Raise before a COMMIT that would not end the transaction of a statement that still runs."""
    if is_running(connection):
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
    driver: Any = connection.driver_connection
    if connection.is_valid and driver is not None:
        if not driver.is_closed():
            connection.info[_DISCARDED] = True
        connection.invalidate(soft=True)
        await_only(_end(driver))


async def _end(driver: Any) -> None:
    """Close the driver's connection, and cancel what runs on it.

    PostgreSQL does not see that a client is gone before the end of its statement. It would go on,
    and keep its row locks.
    """
    if driver.is_closed():
        return
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await driver.close()
    except Exception:
        driver.terminate()


def is_discarded(connection: Connection | None) -> bool:
    """Whether `discard` has closed a connection that was not lost before.

    The other connections of its pool are as good as they were.
    """
    if connection is None or connection.closed or connection.invalidated:
        return False
    return _DISCARDED in connection.info


async def release(connection: Connection, *, is_own: bool) -> None:
    """Close the driver's connection, because its transaction cannot be rolled back otherwise.

    Args:
        connection: a connection in a transaction.
        is_own: whether it goes back to the pool too. The caller of a session that is bound to a
            connection does that.
    """
    if connection.closed:
        return
    if not connection.invalidated:
        driver: Any = connection.connection.driver_connection
        if driver is not None:
            await _end(driver)
        connection.invalidate()
    if is_own:
        connection.close()


def checked_rollback(
    rollback: Callable[[PoolProxiedConnection], None],
) -> Callable[[PoolProxiedConnection], None]:
    """Return `Dialect.do_rollback` that discards a connection whose transaction has not ended."""

    def do_rollback(connection: PoolProxiedConnection) -> None:
        if is_running(connection):
            _discard_running(connection)
            return
        if _DISCARDED in connection.info:
            return  # the pool resets it once more as it returns
        try:
            rollback(connection)
        except Exception:
            discard(connection)
            raise
        # Without a transaction that SQLAlchemy knows of, it has sent no ROLLBACK.
        if _is_in_transaction(connection):
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


def _is_in_transaction(connection: PoolProxiedConnection) -> bool:
    check = getattr(connection.driver_connection, "is_in_transaction", None)
    return check is not None and bool(check())
