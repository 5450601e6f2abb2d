"""What the doubles refuse, and PostgreSQL's errors that they raise where a test asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, ProgrammingError

from pgtoolset._arguments import shown
from pgtoolset.errors import NoDatabaseError

UNIQUE = "23505"

#: SQLAlchemy's errors by the class of the SQLSTATE, as the asyncpg dialect has them. The others are
#: a plain `DBAPIError`. https://www.postgresql.org/docs/current/errcodes-appendix.html
_CLASSES: dict[str, type[DBAPIError]] = {
    "23": IntegrityError,
    "42": ProgrammingError,
    "XX": InternalError,
}


class MissingAttributeError(NoDatabaseError, AttributeError):
    """A double does not have an attribute that the real object has. `hasattr` is false."""


def no_database(what: str) -> NoDatabaseError:
    """Return the one error of the doubles for what only PostgreSQL can answer.

    Args:
        what: a sentence that says what the double does not do, without its full stop.
    """
    return NoDatabaseError(_message(what))


def _message(what: str) -> str:
    return (
        f"{what}. The doubles of pgtoolset.testing emulate no ORM, no SQL and no constraint: "
        "test this on PostgreSQL, with the fixture pg_session"
    )


class Refusing:
    """Refuses each attribute that it does not have.

    Attributes:
        refusal: a sentence that says what the class is not, without its full stop.
    """

    refusal: ClassVar[str]

    # Hidden from type checkers, which would take every attribute for an existing one.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            what = f"{type(self).__name__}.{name}"
            if name.startswith("_"):  # Python's protocols, such as copying
                raise AttributeError(what)
            raise MissingAttributeError(_message(f"{what}: {self.refusal}"))


class NoResult(Refusing):
    """What `MemorySession.execute` returns. Each use of it is an error."""

    refusal = "a MemorySession records statements, and a recorded statement has no result"

    def _refuse(self, *arguments: object) -> Any:
        raise no_database(self.refusal[0].upper() + self.refusal[1:])

    # Type checkers refuse such uses where they do not see these.
    if not TYPE_CHECKING:
        __iter__ = __next__ = __len__ = __getitem__ = __contains__ = __bool__ = _refuse
        __await__ = __aiter__ = __anext__ = _refuse
        __enter__ = __exit__ = __aenter__ = __aexit__ = _refuse


class MemoryDriverError(Refusing, Exception):
    """Stands where the error of the driver is, in `DBAPIError.orig`.

    Attributes:
        sqlstate: the code; `pgcode` is the same.
        severity: as the server reports it.
    """

    refusal = "the error of a double has a SQLSTATE and no further field"
    severity = "ERROR"

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(message)
        self.sqlstate = self.pgcode = sqlstate


def database_error(sqlstate: str, message: str, statement: str) -> DBAPIError:
    """Return the error that SQLAlchemy raises for a SQLSTATE of PostgreSQL."""
    class_ = _CLASSES.get(sqlstate[:2], DBAPIError)
    return class_(statement, None, MemoryDriverError(message, sqlstate))


def checked_failure(error: object) -> str | BaseException | type[BaseException]:
    """Return what `fail_next` takes: an exception, its class, or a SQLSTATE."""
    if isinstance(error, BaseException) or (
        isinstance(error, type) and issubclass(error, BaseException)
    ):
        return error
    if not isinstance(error, str):
        raise TypeError(f"error must be a SQLSTATE or an exception, not {shown(error)}")
    if len(error) != 5 or not error.isalnum() or not error.isascii():
        raise ValueError(f"error must be a SQLSTATE of five characters, not {shown(error)}")
    return error
