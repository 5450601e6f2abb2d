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
INVALID_PARAMETER_VALUE = "22023"
IDLE_IN_TRANSACTION_SESSION_TIMEOUT = "25P03"

#: A transaction that failed with one of these may succeed when it runs again from its start.
#: https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
RETRYABLE = frozenset({SERIALIZATION_FAILURE, DEADLOCK_DETECTED})

#: The server or the network has ended the session: connection_does_not_exist, connection_failure,
#: admin_shutdown, crash_shutdown, idle_session_timeout, idle_in_transaction_session_timeout.
LOST_CONNECTION = frozenset({"08003", "08006", "57P01", "57P02", "57P05", "25P03"})

#: SQLSTATEs, or their beginnings, that do not say what became of a transaction: a connection that
#: failed (reported by a pooler, say), a server that stops, and statement_completion_unknown.
_UNKNOWN = ("08", "57P", "40003")


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


def refuses_commit(error: BaseException) -> bool:
    """Whether an error is PostgreSQL's answer to a COMMIT, and the transaction is rolled back.

    PostgreSQL raises no ERROR for a transaction after its commit record is written. A FATAL error
    may come afterwards, when the server stops, except for the timeout of an idle transaction: it is
    raised before the next statement is read.
    """
    if any(
        sqlstate_of(each) == IDLE_IN_TRANSACTION_SESSION_TIMEOUT and reported_by_server(each)
        for each in (error, error.__cause__)
        if each is not None
    ):
        return True
    answer = driver_error(error)
    # `severity` is translated by the server's lc_messages.
    severity = getattr(answer, "severity_en", None) or getattr(answer, "severity", None)
    return severity == "ERROR" and not (sqlstate_of(answer) or "").startswith(_UNKNOWN)


def breaks_connection(error: BaseException) -> bool:
    """Whether asyncpg lost its place in the protocol, as when the server ends the session.

    SQLAlchemy keeps such a connection until asyncpg has seen that the socket is closed. The class
    is compared by its name, because the driver is not imported here.
    """
    return type(driver_error(error)).__name__ == "InternalClientError"
