"""SQLSTATE codes, and where to find them in an error.

Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html
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

#: A transaction that failed so may succeed when it is run again from its start.
#: https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
RETRYABLE = frozenset({SERIALIZATION_FAILURE, DEADLOCK_DETECTED})


def driver_error(error: BaseException) -> BaseException:
    """The driver's own error, inside SQLAlchemy's two layers around it; any other error is given
    back."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def sqlstate_of(error: BaseException | None) -> str | None:
    """The SQLSTATE that `error` carries, as SQLAlchemy wrapped it, as the driver raised it, or as
    our own error."""
    if error is None:
        return None
    state = getattr(driver_error(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def reported_by_server(error: BaseException) -> bool:
    """Whether PostgreSQL itself raised `error`. asyncpg uses the same classes for what it refuses
    on its own."""
    return getattr(driver_error(error), "severity", None) is not None


def breaks_connection(error: BaseException) -> bool:
    """Whether asyncpg lost track of its conversation with the server, as it may when the server
    ends the session.

    SQLAlchemy takes such a connection for a sound one until asyncpg has noticed the closed socket
    too.
    """
    return type(driver_error(error)).__name__ == "InternalClientError"
