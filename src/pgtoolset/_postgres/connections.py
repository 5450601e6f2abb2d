"""The connection of asyncpg below a connection of SQLAlchemy.

In an aborted transaction PostgreSQL answers COMMIT with the command tag ROLLBACK and no error.
asyncpg returns that tag, and SQLAlchemy's adapter drops it. `verify_next_commit` reads it, without
a further round trip. See https://www.postgresql.org/docs/current/sql-commit.html and
https://www.postgresql.org/docs/current/protocol-message-formats.html (CommandComplete).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection

from pgtoolset._cancellation import uninterrupted_here
from pgtoolset._compatibility import unsupported


def terminate(connection: Connection) -> None:
    """Close the socket at once, without a message to a server that may not answer."""
    driver: Any = connection.connection.driver_connection
    if driver is not None:
        driver.terminate()


def has_one_backend(connection: Connection) -> bool:
    """Whether two statements outside a transaction reach the same backend of PostgreSQL.

    Behind a pooler in transaction mode they may not: the next backend does not know a statement
    that the last one prepared. The driver does not say, but asyncpg must not cache statements
    there. An asyncpg that does not say whether it caches counts as behind a pooler: that is correct
    everywhere, at the price of a BEGIN.
    """
    return bool(getattr(connection.connection.driver_connection, "_stmt_cache_enabled", False))


#: The largest process id of Linux. A pooler such as PgBouncer answers with 32 random bits.
_LARGEST_PID = 2**22


def backend_pid(connection: Connection) -> int | None:
    """Return the pid of the backend, which the driver got as it connected; `None` where a pooler
    has answered in its place.
    """
    driver: Any = connection.connection.driver_connection
    pid = int(driver.get_server_pid())
    return pid if has_one_backend(connection) and 0 < pid <= _LARGEST_PID else None


def begun_transaction(connection: PoolProxiedConnection) -> Any | None:
    """Return asyncpg's transaction that SQLAlchemy's adapter has begun; `None` before the first
    statement.

    Raises:
        UnsupportedVersionError: the adapter does not have the attribute that keeps it.
    """
    adapter: Any = connection.dbapi_connection
    try:
        return adapter._transaction
    except AttributeError:
        raise unsupported(
            "sqlalchemy",
            f"attribute _transaction of {type(adapter).__name__}",
            "pgtoolset cannot see whether a transaction has begun",
        ) from None


def verify_next_commit(connection: PoolProxiedConnection, aborted: Callable[[], Exception]) -> None:
    """Check the COMMIT that `connection` is about to send; raise `aborted()` where it rolled back.

    Call it just before the COMMIT. SQLAlchemy's adapter keeps asyncpg's transaction in an attribute
    and calls `commit()` on it; a stand-in takes its place for that call.

    Raises:
        UnsupportedVersionError: the adapter or asyncpg does not have the attributes for that. The
            COMMIT must not be sent then: its answer could not be trusted.
    """
    transaction = begun_transaction(connection)
    if transaction is None:
        return  # no statement has run, so no COMMIT is sent
    driver: Any = connection.driver_connection
    if not hasattr(driver, "_top_xact"):
        raise unsupported(
            "asyncpg",
            "attribute _top_xact of Connection",
            "The answer to a COMMIT cannot be checked, so it is not sent",
        )
    adapter: Any = connection.dbapi_connection
    adapter._transaction = VerifiedTransaction(driver, transaction, aborted)


class VerifiedTransaction:
    """Stands in for asyncpg's `Transaction` while it commits."""

    __slots__ = ("_aborted", "_driver", "_transaction")

    def __init__(self, driver: Any, transaction: Any, aborted: Callable[[], Exception]) -> None:
        self._driver = driver
        self._transaction = transaction
        self._aborted = aborted

    async def commit(self) -> None:
        """Send COMMIT and wait for its answer, whatever cancels the caller in between."""
        try:
            # A caller who left before the answer would know neither of success nor of failure.
            tag = await uninterrupted_here(self._driver.execute("COMMIT;"))
        finally:
            # asyncpg's own `Transaction.commit` resets it too, however the COMMIT ended.
            self._driver._top_xact = None
        if tag != "COMMIT":
            raise self._aborted()

    async def rollback(self) -> None:
        """Roll back as asyncpg's own transaction does."""
        await self._transaction.rollback()
