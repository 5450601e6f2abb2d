"""SQLSTATE codes, and where an error carries one.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

IN_FAILED_SQL_TRANSACTION = "25P02"
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
SERIALIZATION_FAILURE = "40001"
DEADLOCK_DETECTED = "40P01"
DUPLICATE_DATABASE = "42P04"
INVALID_CATALOG_NAME = "3D000"
OBJECT_IN_USE = "55006"
UNIQUE_VIOLATION = "23505"
UNDEFINED_COLUMN = "42703"

#: A transaction that failed with one of these may succeed when it runs again from its start.
#: https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
RETRYABLE = frozenset({SERIALIZATION_FAILURE, DEADLOCK_DETECTED})


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's error from inside SQLAlchemy's two layers, or `error` itself."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an error of SQLAlchemy, of the driver or of this library."""
    if error is None:
        return None
    state = getattr(driver_error(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def reported_by_server(error: BaseException) -> bool:
    """Whether PostgreSQL sent the error. asyncpg raises errors of the same classes by its own
    checks, but those have no severity."""
    return getattr(driver_error(error), "severity", None) is not None


def breaks_connection(error: BaseException) -> bool:
    """Whether asyncpg lost its place in the protocol, as when the server ends the session.

    SQLAlchemy keeps such a connection until asyncpg has seen that the socket is closed. The class
    is compared by its name, because the driver is not imported here.
    """
    return type(driver_error(error)).__name__ == "InternalClientError"
