"""`session.begin()` in a session whose transaction the library has begun: an error that helps."""

from __future__ import annotations

from functools import partial
from weakref import ref

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction

from pgtoolset.errors import TransactionStateError


class TransactionBegunError(TransactionStateError, InvalidRequestError):
    """`session.begin()` inside a unit of work; what catches SQLAlchemy's error catches it too."""


def explain_second_begin(session: Session) -> None:
    """Let a `begin()` in the transaction of a unit say what to use, until `stop_explaining`.

    SQLAlchemy says "A transaction is already begun on this Session", and the reader has begun none.
    The method is put on the instance, and refers to it weakly: no other session is touched, and
    this one can be collected.
    """
    vars(session)["begin"] = partial(_begin, ref(session))


def stop_explaining(session: Session) -> None:
    """Leave `begin()` to SQLAlchemy again."""
    vars(session).pop("begin", None)


def _begin(session_ref: ref[Session], nested: bool = False) -> SessionTransaction:
    session = session_ref()
    assert session is not None  # its own method is running
    if not nested and session.in_transaction():
        raise TransactionBegunError(
            "The session is in a transaction already: get_db() or db_context() has begun it, and "
            "commits it at the end. Leave session.begin() out, or write "
            "`async with get_transaction(session):` for a savepoint."
        )
    return type(session).begin(session, nested)
