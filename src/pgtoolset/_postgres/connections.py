"""What is done with the connection of the driver itself: a COMMIT that cannot lie or be cut in
half, and a hang-up.

In an aborted transaction PostgreSQL answers COMMIT with the command tag ROLLBACK and no error.
asyncpg reads that tag and SQLAlchemy's adapter drops it. Here it is looked at, at no cost: it is
part of the answer to a COMMIT that is sent anyway. See
https://www.postgresql.org/docs/current/sql-commit.html and
https://www.postgresql.org/docs/current/protocol-message-formats.html (CommandComplete).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection

from pgtoolset._cancellation import uninterrupted_here


def terminate(connection: Connection) -> None:
    """Drop the connection on the floor, without a word to a server that may not be listening."""
    driver: Any = connection.connection.driver_connection
    if driver is not None:
        driver.terminate()


def has_one_backend(connection: Connection) -> bool:
    """Whether two statements outside a transaction meet the same backend, as far as this side can
    tell.

    Behind a pooler of transactions they do not, and a statement that was prepared is gone when it
    is executed. Nobody can ask for one, but asyncpg has to go without its cache of statements
    there, and nowhere else.
    """
    return bool(getattr(connection.connection.driver_connection, "_stmt_cache_enabled", True))


def verify_next_commit(connection: PoolProxiedConnection, aborted: Callable[[], Exception]) -> None:
    """Have the COMMIT that `connection` is about to send checked; `aborted()` is raised where it
    rolled back.

    Meant for SQLAlchemy's `commit` event, which fires just before the COMMIT. SQLAlchemy's adapter
    keeps asyncpg's transaction in an attribute and calls its `commit()`; a stand-in takes its place
    for that one call. Where the adapter or the driver does not have the expected shape nothing is
    changed: errors that SQLAlchemy saw are still noticed, by `pgtoolset._record`. A test pins the
    shape for every supported version.
    """
    adapter: Any = connection.dbapi_connection
    driver: Any = connection.driver_connection
    transaction = getattr(adapter, "_transaction", None)
    if transaction is not None and hasattr(driver, "_top_xact"):
        adapter._transaction = VerifiedTransaction(driver, transaction, aborted)


class VerifiedTransaction:
    """Stands in for asyncpg's `Transaction` while it commits."""

    __slots__ = ("_aborted", "_driver", "_transaction")

    def __init__(self, driver: Any, transaction: Any, aborted: Callable[[], Exception]) -> None:
        self._driver = driver
        self._transaction = transaction
        self._aborted = aborted

    async def commit(self) -> None:
        try:
            # A COMMIT that was sent and not awaited to its end is neither success nor failure for
            # the caller.
            tag = await uninterrupted_here(self._driver.execute("COMMIT;"))
        finally:
            # What asyncpg's own `Transaction.commit` does, whatever became of the COMMIT.
            self._driver._top_xact = None
        if tag != "COMMIT":
            raise self._aborted()

    async def rollback(self) -> None:
        await self._transaction.rollback()
