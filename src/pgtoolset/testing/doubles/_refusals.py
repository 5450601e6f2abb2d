"""The errors that PostgreSQL would raise, as SQLAlchemy would wrap them: their SQLSTATE says what
they mean.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, IntegrityError

NOT_NULL = "23502"
FOREIGN_KEY = "23503"
UNIQUE = "23505"
READ_ONLY = "25006"


class MemoryDriverError(Exception):
    """Stands where the driver's error is, in `DBAPIError.orig`.

    Attributes:
        sqlstate: the code.
        severity: as the server reports it.
    """

    severity = "ERROR"

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


def refusal(sqlstate: str, message: str, statement: str) -> DBAPIError:
    """The error for `statement`; an `IntegrityError` where a constraint is violated."""
    class_ = IntegrityError if sqlstate.startswith("23") else DBAPIError
    return class_(statement, None, MemoryDriverError(message, sqlstate))
