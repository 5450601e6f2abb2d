"""Which errors are problems of a request, and what the client may know of each."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pgtoolset._postgres.sqlstates import (
    CHECK_VIOLATION,
    EXCLUSION_VIOLATION,
    FOREIGN_KEY_VIOLATION,
    LOCK_NOT_AVAILABLE,
    NOT_NULL_VIOLATION,
    RESTRICT_VIOLATION,
    RETRYABLE,
    UNIQUE_VIOLATION,
    constraint_of,
    is_data_error,
    sqlstate_of,
)
from pgtoolset.errors import LockTimeoutError, PgToolsetError, RowNotFoundError, WaitTimeoutError

__all__ = ["PHRASES", "Finding", "Problem", "find_problem"]

#: The title of each status, and its description in the OpenAPI schema. `http.HTTPStatus` has
#: another phrase of 422 in Python 3.12 and older.
#: https://www.rfc-editor.org/rfc/rfc9110#name-status-codes
PHRASES = {
    404: "Not Found",
    409: "Conflict",
    422: "Unprocessable Content",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A kind of problem.

    Attributes:
        status: of the response.
        name: the end of its type, where the application has types of its own.
        detail: the text for the client.
    """

    status: int
    name: str
    detail: str


_NOT_FOUND = Problem(404, "not-found", "The requested resource does not exist.")
_EXISTS = Problem(409, "already-exists", "A resource with these values exists already.")
_OVERLAPS = Problem(409, "overlapping", "The values conflict with those of another resource.")
_REFERENCE = Problem(
    409,
    "reference",
    "The request refers to a resource that does not exist, or changes one to which others refer.",
)
_CONCURRENT = Problem(
    409,
    "concurrent-request",
    "Another request has changed the same data at the same time. Send the request again.",
)
_RULE = Problem(422, "rule-violated", "The values break a rule of the data.")
_MISSING = Problem(422, "value-missing", "A required value is missing.")
_VALUE = Problem(422, "invalid-value", "A value is not valid, or is out of range.")
_LOCKED = Problem(503, "locked", "The resource is in use by another request. Try again later.")
_BUSY = Problem(503, "overloaded", "The service has too many requests. Try again later.")
_UNCHANGED = Problem(504, "no-change", "The resource has not changed in time.")

#: By class, subclasses included.
_BY_CLASS: tuple[tuple[type[Exception], Problem], ...] = (
    (RowNotFoundError, _NOT_FOUND),
    (LockTimeoutError, _LOCKED),
    (PoolTimeout, _BUSY),
    (WaitTimeoutError, _UNCHANGED),
)

_BY_SQLSTATE = {
    UNIQUE_VIOLATION: _EXISTS,
    EXCLUSION_VIOLATION: _OVERLAPS,
    FOREIGN_KEY_VIOLATION: _REFERENCE,
    RESTRICT_VIOLATION: _REFERENCE,
    CHECK_VIOLATION: _RULE,
    NOT_NULL_VIOLATION: _MISSING,
    LOCK_NOT_AVAILABLE: _LOCKED,
    **dict.fromkeys(RETRYABLE, _CONCURRENT),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The problem that an exception is.

    Attributes:
        problem: its kind.
        error: the error itself, which may be the member of a group.
        constraint: the name of the violated constraint; `None` where PostgreSQL names none.
    """

    problem: Problem
    error: BaseException
    constraint: str | None = None


def find_problem(error: BaseException) -> Finding | None:
    """Return the problem that an exception is; `None` for a fault of the server or the program.

    A group is a problem where each of its members is the same one. An exception that has such an
    error as its cause is another one: the application has raised it for a reason of its own.
    """
    if type(error) is ExceptionGroup:
        return _of_group([find_problem(each) for each in error.exceptions])
    for class_, problem in _BY_CLASS:
        if isinstance(error, class_):
            return Finding(problem, error)
    # Others of the library know the SQLSTATE of the error that they are about.
    if not isinstance(error, DBAPIError) or isinstance(error, PgToolsetError):
        return None
    if is_data_error(error):
        return Finding(_VALUE, error)
    found = _BY_SQLSTATE.get(sqlstate_of(error) or "")
    return None if found is None else Finding(found, error, constraint_of(error))


def _of_group(found: list[Finding | None]) -> Finding | None:
    first = found[0]
    if first is None or any(each is None or each.problem != first.problem for each in found):
        return None
    constraints = {None if each is None else each.constraint for each in found}
    return first if len(constraints) == 1 else Finding(first.problem, first.error)
