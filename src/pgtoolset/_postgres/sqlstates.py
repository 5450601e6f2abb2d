"""SQLSTATE codes, and where an error carries one.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

from traceback import walk_tb

from sqlalchemy.exc import DataError, DBAPIError

IN_FAILED_SQL_TRANSACTION = "25P02"
READ_ONLY_SQL_TRANSACTION = "25006"
FEATURE_NOT_SUPPORTED = "0A000"
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
SERIALIZATION_FAILURE = "40001"
DEADLOCK_DETECTED = "40P01"
DUPLICATE_DATABASE = "42P04"
INVALID_CATALOG_NAME = "3D000"
OBJECT_IN_USE = "55006"
RESTRICT_VIOLATION = "23001"
NOT_NULL_VIOLATION = "23502"
FOREIGN_KEY_VIOLATION = "23503"
UNIQUE_VIOLATION = "23505"
CHECK_VIOLATION = "23514"
EXCLUSION_VIOLATION = "23P01"
UNDEFINED_COLUMN = "42703"
UNDEFINED_OBJECT = "42704"
INVALID_PARAMETER_VALUE = "22023"
IDLE_IN_TRANSACTION_SESSION_TIMEOUT = "25P03"

#: A transaction that failed with one of these may succeed when it runs again from its start.
#: https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
RETRYABLE = frozenset({SERIALIZATION_FAILURE, DEADLOCK_DETECTED})

#: The server or the network has ended the session: connection_does_not_exist, connection_failure,
#: admin_shutdown, crash_shutdown, idle_session_timeout, idle_in_transaction_session_timeout.
LOST_CONNECTION = frozenset({"08003", "08006", "57P01", "57P02", "57P05", "25P03"})

#: A server refuses a new session and may soon take it: sqlclient_unable_to_establish_sqlconnection,
#: sqlserver_rejected_establishment_of_sqlconnection, cannot_connect_now.
NOT_REACHED = frozenset({"08001", "08004", "57P03"})

#: SQLSTATEs, or their beginnings, that do not say what became of a transaction: a connection that
#: failed (reported by a pooler, say), a server that stops, and statement_completion_unknown.
_UNKNOWN = ("08", "57P", "40003")


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's error from inside SQLAlchemy's two layers, or `error` itself."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        # SQLAlchemy has errors of its own around asyncpg's, and raises psycopg's as they are.
        return error.orig if hasattr(error.orig, "diag") else error.orig.__cause__ or error.orig
    return error


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an error of SQLAlchemy, of the driver or of this library."""
    if error is None:
        return None
    state = getattr(driver_error(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def severity_of(error: BaseException) -> str | None:
    """Return the severity, in English, of an error that PostgreSQL sent; `None` for another.

    The drivers raise errors of the same classes by their own checks, but those have no severity.
    """
    answer = driver_error(error)
    # psycopg keeps the fields of the message apart.
    fields = getattr(answer, "diag", answer)
    # `severity` is translated by the server's lc_messages.
    for name in ("severity_nonlocalized", "severity_en", "severity"):
        severity = getattr(fields, name, None)
        if severity is not None:
            return str(severity)
    return None


def detail_of(error: BaseException) -> str | None:
    """Return the detail of an error that PostgreSQL sent."""
    answer = driver_error(error)
    detail = getattr(answer, "detail", None) or getattr(
        getattr(answer, "diag", None), "message_detail", None
    )
    return None if detail is None else str(detail)


def constraint_of(error: BaseException) -> str | None:
    """Return the name of the constraint that an error of PostgreSQL is about."""
    answer = driver_error(error)
    # psycopg keeps the fields of the message apart.
    name = getattr(getattr(answer, "diag", answer), "constraint_name", None)
    return None if name is None else str(name)


def is_data_error(error: BaseException) -> bool:
    """Whether a value was refused (class 22), by PostgreSQL or by the driver before it was sent.

    asyncpg gives its own refusals a SQLSTATE. psycopg refuses a text with a NUL character without
    one, by an error of the same class as for a stored value that Python's types cannot hold.
    """
    sqlstate = sqlstate_of(error)
    if sqlstate is not None:
        return sqlstate.startswith("22")
    return isinstance(error, DataError) and not _is_from_fetch(driver_error(error))


def _is_from_fetch(error: BaseException) -> bool:
    return any(
        frame.f_code.co_name.startswith("fetch") for frame, _ in walk_tb(error.__traceback__)
    )


def reported_by_server(error: BaseException) -> bool:
    """Whether PostgreSQL sent the error."""
    return severity_of(error) is not None


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
    return severity_of(error) == "ERROR" and not (sqlstate_of(error) or "").startswith(_UNKNOWN)


def breaks_connection(error: BaseException) -> bool:
    """Whether asyncpg lost its place in the protocol, as when the server ends the session.

    SQLAlchemy keeps such a connection until asyncpg has seen that the socket is closed. The class
    is compared by its name, because the driver is not imported here. libpq closes such a connection
    itself, before psycopg raises an error.
    """
    return type(driver_error(error)).__name__ == "InternalClientError"


def has_lost_connection(error: BaseException | None) -> bool:
    """Whether an error has cost its connection: SQLAlchemy says so, or asyncpg has lost its place.

    SQLAlchemy 2.0 passes that error of asyncpg on as it is.
    """
    if error is None:
        return False
    return getattr(error, "connection_invalidated", False) is True or breaks_connection(error)


def is_refused_connection(error: BaseException) -> bool:
    """Whether the driver could not connect, and no server has said why.

    asyncpg raises `TargetServerAttributeNotMatched` where no host of the URL is a primary, and
    psycopg an `OperationalError` without a SQLSTATE for each reason.
    """
    return type(driver_error(error)).__name__ in (
        *("TargetServerAttributeNotMatched", "ClientCannotConnectError"),
        *("OperationalError", "ConnectionTimeout"),
    )
