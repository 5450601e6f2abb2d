"""Every error that pgtoolset raises on purpose.

Each derives from `PgToolsetError` and from the builtin that a Python programmer would catch.
"""

from __future__ import annotations

__all__ = [
    "EmbeddedServerError",
    "PgToolsetError",
    "TransactionAbortedError",
    "TransactionStateError",
    "UnsupportedVersionError",
]


class PgToolsetError(Exception):
    """The root of all errors of this library."""


class TransactionAbortedError(PgToolsetError, RuntimeError):
    """The work of a transaction is lost although its block ended without an exception.

    PostgreSQL refuses every statement after an error until the transaction, or the savepoint around the error, is
    rolled back, and it answers a COMMIT with ROLLBACK. Code that catches a database error and goes on would report
    success for work that is gone; this error is raised instead. Its `__cause__` is the error that was swallowed.

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
