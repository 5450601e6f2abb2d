"""SQLSTATE codes, and where to find them in an error.

Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

IN_FAILED_SQL_TRANSACTION = "25P02"
SERIALIZATION_FAILURE = "40001"
DEADLOCK_DETECTED = "40P01"

#: A transaction that failed so may succeed when it is run again from its start.
#: https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
RETRYABLE = frozenset({SERIALIZATION_FAILURE, DEADLOCK_DETECTED})


def sqlstate_of(error: BaseException | None) -> str | None:
    """The SQLSTATE that `error` carries, as SQLAlchemy wrapped it, as the driver raised it, or as our own error."""
    if isinstance(error, DBAPIError):
        error = error.orig
    state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else None
