"""The connection of the driver below a connection of SQLAlchemy.

What the drivers do differently is in `pgtoolset._postgres.drivers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.engine.interfaces import DBAPIConnection

from pgtoolset._postgres.drivers import CommitAttempt, Outcome, driver_at, driver_of, raw_at

__all__ = [
    "CommitAttempt",
    "Outcome",
    "backend_pid",
    "begin_with",
    "begun_transaction",
    "check_verifiable",
    "close_pooled",
    "driver_options",
    "has_one_backend",
    "is_closed",
    "is_detached",
    "is_open_cursor",
    "is_pooled",
    "is_transaction_open",
    "keeps_its_backend",
    "raw_at",
    "show",
    "terminate",
    "terminate_driver",
    "verify_next_commit",
]


def is_pooled(connection: PoolProxiedConnection) -> bool:
    """Whether a pool has given the connection to a user.

    SQLAlchemy looks at the server of a new engine over the first connection, before its pool gives
    it out. Nothing can be kept with it then, and what fails or ends on it is SQLAlchemy's.
    """
    try:
        return connection.info is not None
    except NotImplementedError:
        return False


def is_detached(connection: PoolProxiedConnection) -> bool:
    """Whether a connection has left its pool, and is its user's alone."""
    return connection.driver_connection is None and connection.dbapi_connection is not None


def terminate(connection: Connection) -> None:
    """Close the socket at once, without a message to a server that may not answer."""
    raw = raw_at(connection.connection)
    if raw is not None:
        terminate_driver(raw)


def terminate_driver(raw: Any) -> None:
    """Close the socket of a connection of the driver, or of a wrapper around one. Never raises."""
    driver_of(raw).terminate(raw)


def close_pooled(
    dbapi_connection: DBAPIConnection, dialect_terminate: Callable[[DBAPIConnection], None]
) -> None:
    """Close a connection that its pool has given up, as `Dialect.do_terminate` is to do."""
    adapter: Any = dbapi_connection
    driver_of(adapter.driver_connection).close_pooled(adapter, dialect_terminate)


def is_closed(raw: Any) -> bool:
    """Whether a connection of the driver, or a wrapper around one, is closed or lost."""
    return driver_of(raw).is_closed(raw)


def is_open_cursor(cursor: Any) -> bool:
    """Whether a server-side cursor of SQLAlchemy's adapter has rows to come, or may have some."""
    raw = getattr(cursor, "_cursor", None)
    return raw is not None and not getattr(raw, "closed", False)


def has_one_backend(connection: Connection) -> bool:
    """Whether two statements outside a transaction reach the same backend of PostgreSQL.

    Behind a pooler in transaction mode they may not: the next backend does not know a statement
    that the last one prepared. The driver does not say, but it must not cache statements there.
    """
    return keeps_its_backend(raw_at(connection.connection))


def keeps_its_backend(raw: Any) -> bool:
    """As `has_one_backend`, for a connection of the driver."""
    return driver_of(raw).keeps_its_backend(raw)


#: The largest process id of Linux. A pooler such as PgBouncer answers with 32 random bits.
_LARGEST_PID = 2**22


def backend_pid(connection: Connection) -> int | None:
    """Return the pid of the backend, which the driver got as it connected; `None` where a pooler
    has answered in its place.
    """
    raw: Any = raw_at(connection.connection)
    pid = driver_of(raw).server_pid(raw)
    return pid if has_one_backend(connection) and 0 < pid <= _LARGEST_PID else None


def begun_transaction(connection: PoolProxiedConnection) -> Any | None:
    """Return what stands for the open transaction; `None` before the first statement.

    Raises:
        UnsupportedVersionError: SQLAlchemy's adapter does not have the attribute that keeps it.
    """
    return driver_at(connection).begun_transaction(connection)


def is_transaction_open(connection: PoolProxiedConnection) -> bool:
    """Whether a transaction is open, as the server has said last."""
    raw: Any = raw_at(connection)
    return driver_of(raw).is_in_transaction(raw)


def driver_options(connection: PoolProxiedConnection) -> dict[str, Any]:
    """Return the attributes of the driver's connection on which SQLAlchemy relies."""
    raw: Any = raw_at(connection)
    return {name: getattr(raw, name) for name in driver_of(raw).options if hasattr(raw, name)}


def begin_with(connection: PoolProxiedConnection, statements: str) -> None:
    """Begin the transaction with statements of ours, with asyncpg in one message.

    Where a statement is refused, the transaction is open and aborted. Runs in SQLAlchemy's
    greenlet.
    """
    driver_at(connection).begin(connection, statements)


def show(connection: PoolProxiedConnection, name: str) -> str:
    """Return a setting, inside of the transaction that has begun. It takes no snapshot.

    Runs in SQLAlchemy's greenlet, below SQLAlchemy's own statements.
    """
    return driver_at(connection).show(connection, name)


def check_verifiable(connection: PoolProxiedConnection) -> bool:
    """Raise where a COMMIT of `connection` could not be verified. Nothing is sent.

    Returns:
        `False` where it is closed, so that it cannot be said.

    Call it before the first statement of a transaction: `async_creator` may give any object that
    behaves like the driver's connection, such as the proxy of asyncpg's own pool.

    Raises:
        UnsupportedVersionError: the driver, or a wrapper of its connection, lacks an attribute.
    """
    raw: Any = raw_at(connection)
    driver = driver_of(raw)
    # One that was lost in the pool refuses to be looked at. SQLAlchemy replaces it at its next use.
    if driver.is_closed(raw):
        return False
    driver.check_verifiable(connection)
    return True


def verify_next_commit(connection: PoolProxiedConnection) -> CommitAttempt | None:
    """Observe the COMMIT that `connection` is about to send; `None` where it sends none.

    Call it just before the COMMIT.

    Raises:
        UnsupportedVersionError: the adapter or the driver does not have the attributes for that.
            The COMMIT must not be sent then: its answer could not be trusted.
    """
    return driver_at(connection).verify_next_commit(connection)
