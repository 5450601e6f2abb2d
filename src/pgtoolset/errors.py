"""Every error that pgtoolset raises on purpose.

Each derives from `PgToolsetError` and from the builtin that a Python programmer would catch.
"""

from __future__ import annotations

from collections.abc import Sequence

from pgtoolset.values import Blocker

__all__ = [
    "DatabaseExistsError",
    "DatabaseInUseError",
    "DatabaseNotFoundError",
    "EmbeddedServerError",
    "LockTimeoutError",
    "NoDatabaseError",
    "OutsideReferenceError",
    "PgToolsetError",
    "RowDeletedError",
    "RowNotFoundError",
    "TransactionAbortedError",
    "TransactionStateError",
    "UnsupportedVersionError",
    "WaitTimeoutError",
    "WatchFailedError",
    "WatcherClosedError",
]


class PgToolsetError(Exception):
    """The root of all errors of this library."""


class TransactionAbortedError(PgToolsetError, RuntimeError):
    """The work of a transaction is lost although its block ended without an exception.

    PostgreSQL refuses every statement after an error until the transaction, or the savepoint around
    the error, is rolled back, and it answers a COMMIT with ROLLBACK. Code that catches a database
    error and goes on would report success for work that is gone; this error is raised instead. Its
    `__cause__` is the error that was swallowed.

    Attributes:
        sqlstate: the SQLSTATE of the swallowed error, or `None` where it has none or was not seen.
    """

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class TransactionStateError(PgToolsetError, RuntimeError):
    """A transaction was asked for something that its present state does not allow."""


class UnsupportedVersionError(PgToolsetError, RuntimeError):
    """An installed package is too old, or too new, for what was asked of it."""


class EmbeddedServerError(PgToolsetError, RuntimeError):
    """The embedded PostgreSQL of `pgtoolset.testing` is missing or did not start."""


class LockTimeoutError(PgToolsetError, TimeoutError):
    """A lock was not to be had in time; nothing of what was asked for is held.

    Attributes:
        tables: the qualified names of the tables that were asked for; empty for an advisory lock.
        mode: the mode that was asked for, `"EXCLUSIVE"`.
        timeout: the seconds that it was waited for; 0 with `nowait`.
        blockers: the sessions that were in the way; empty where none could be seen, and the message
            says why.
    """

    def __init__(
        self,
        message: str,
        *,
        tables: Sequence[str],
        mode: str,
        timeout: float,
        blockers: Sequence[Blocker] = (),
    ) -> None:
        super().__init__(message)
        self.tables: tuple[str, ...] = tuple(tables)
        self.mode = mode
        self.timeout = timeout
        self.blockers: tuple[Blocker, ...] = tuple(blockers)


class NoDatabaseError(PgToolsetError, NotImplementedError):
    """A double of `pgtoolset.testing` was asked for something that takes a database, such as a SQL
    statement."""


class RowNotFoundError(PgToolsetError, LookupError):
    """There is no row with the key that was given."""


class RowDeletedError(RowNotFoundError):
    """A row that was waited for has vanished."""


class WaitTimeoutError(PgToolsetError, TimeoutError):
    """A row did not change in time."""


class WatchFailedError(PgToolsetError, RuntimeError):
    """The rows that a `RowWatcher` watches can no longer be read: their table was dropped, a
    privilege revoked.

    It ends those who wait for these rows and columns, and nobody else. Its `__cause__` is the error
    of the driver.

    Attributes:
        sqlstate: the SQLSTATE of the cause, or `None` where it has none.
    """

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class WatcherClosedError(PgToolsetError, RuntimeError):
    """A `RowWatcher` was closed, or never opened, while somebody waits on it."""


class DatabaseExistsError(PgToolsetError, ValueError):
    """A database of that name exists already."""


class DatabaseNotFoundError(PgToolsetError, LookupError):
    """There is no database of that name."""


class DatabaseInUseError(PgToolsetError, RuntimeError):
    """A database cannot be dropped, or copied, because somebody is in it.

    Attributes:
        database: its name.
        sessions: who is in it; empty where nobody could be seen any more.
    """

    def __init__(self, message: str, *, database: str, sessions: Sequence[Blocker] = ()) -> None:
        super().__init__(message)
        self.database = database
        self.sessions: tuple[Blocker, ...] = tuple(sessions)


class OutsideReferenceError(PgToolsetError, RuntimeError):
    """Rows that were to be deleted are referenced by rows of tables that are not to be touched.

    Attributes:
        references: each table, schema-qualified, with the constraint in parentheses.
    """

    def __init__(self, message: str, *, references: Sequence[str]) -> None:
        super().__init__(message)
        self.references: tuple[str, ...] = tuple(references)
