"""The errors of transactions that are lost, and of commits whose outcome is unknown."""

from __future__ import annotations

from pgtoolset._postgres.sqlstates import (
    driver_error,
    has_lost_connection,
    refuses_commit,
    reported_by_server,
    sqlstate_of,
)
from pgtoolset.errors import (
    CommitUnknownError,
    TransactionAbortedError,
    TransactionLostError,
    TransactionStateError,
)
from pgtoolset.types import CommitPhase

#: What became of the work, for `aborted_by`.
DISCARDED = "PostgreSQL has discarded all its work"
LOST = "its connection is lost, and PostgreSQL discards all its work"
ROLLED_BACK = "SQLAlchemy has rolled it back, and nothing of it is stored"
NEVER_BEGUN = "nothing of it had reached PostgreSQL, and nothing is stored"

_SENT = {
    "commit": "An explicit commit() has sent COMMIT",
    "end": "The end of the block has sent COMMIT",
    "statement": "A statement outside a transaction was sent",
}


def flush_failed(error: BaseException | None, *, is_connected: bool) -> TransactionAbortedError:
    """Return the error for a transaction that SQLAlchemy rolled back because a flush failed.

    Args:
        error: the error of the flush.
        is_connected: whether the transaction has had a connection.
    """
    if error is None or reported_by_server(error) or has_lost_connection(error):
        return aborted_by(error)
    return aborted_by(error, ROLLED_BACK if is_connected else NEVER_BEGUN)


def aborted_by(error: BaseException | None, result: str | None = None) -> TransactionAbortedError:
    """Return the error for a lost transaction, caused by the error that the block swallowed."""
    if error is None:
        what = (
            "an error on its connection that SQLAlchemy did not see, such as one of the driver's "
            "methods"
        )
    else:
        what = f"an error that was caught inside the block ({_named(error)})"
    if result is None:
        result = LOST if has_lost_connection(error) else DISCARDED
    aborted = TransactionAbortedError(
        f"The transaction was aborted by {what}; {result}. "
        "Let the error leave the block, or put the statement that may fail into a nested "
        "get_transaction().",
        sqlstate=sqlstate_of(error),
    )
    aborted.__cause__ = error
    return aborted


def rolled_back_outside() -> TransactionAbortedError:
    """Return the error for a session whose outer transaction was rolled back under it."""
    return TransactionAbortedError(
        "The transaction or savepoint that the session had joined was rolled back outside of it, "
        "and the work of the session with it. Roll back a level outside only after the sessions "
        'that joined it have ended, or join them with join_transaction_mode="create_savepoint".'
    )


def commit_unknown(
    phase: CommitPhase, cause: BaseException | None, reason: str = ""
) -> CommitUnknownError:
    """Return the error for a commit that was sent and not answered, caused by the driver's.

    Args:
        phase: which commit it was.
        cause: the driver's error.
        reason: why `resolve_commit` could not find out, where it was given.
    """
    because = f" ({_named(cause)})" if cause is not None else ""
    asked = f" resolve_commit could not find out: {reason}." if reason else ""
    unknown = CommitUnknownError(
        f"{_SENT[phase]}, and no answer says what became of it{because}: PostgreSQL may have "
        f"stored the work or not.{asked} Find out in a new session before you run the work again.",
        phase=phase,
    )
    unknown.__cause__ = cause
    return unknown


def transaction_lost(phase: CommitPhase, cause: BaseException | None) -> TransactionLostError:
    """Return the error for a commit that was not answered, and has certainly stored nothing."""
    because = f" ({_named(cause)})" if cause is not None else ""
    lost = TransactionLostError(
        f"{_SENT[phase]}, and its connection was lost{because}. PostgreSQL says that the "
        "transaction is rolled back: nothing of it is stored. Run the work again."
    )
    lost.__cause__ = cause
    return lost


def aborted_earlier(error: BaseException | None) -> TransactionStateError:
    """Return the error of release_connection for a transaction that is aborted already."""
    because = f" ({_named(error)})" if error is not None else ""
    return TransactionStateError(
        "release_connection cannot end the transaction of the session, which was aborted by an "
        f"error that was caught inside the block{because}. Let the error leave the block, or put "
        "the statement that may fail into a nested get_transaction()."
    )


def lost_unwritten(cause: BaseException | None) -> TransactionLostError:
    """Return the error for a transaction that has written nothing, and whose connection was lost
    at its COMMIT.
    """
    because = f" ({_named(cause)})" if cause is not None else ""
    return TransactionLostError(
        f"The connection was lost{because} while release_connection ended the transaction, which "
        "had written nothing. Run the work again."
    )


def partly_stored(phase: CommitPhase, cause: BaseException) -> CommitUnknownError:
    """Return the error for a session with several connections, of which not all were committed."""
    unknown = CommitUnknownError(
        f"{_SENT[phase]} on each connection of the session. One of them has stored its part of the "
        f"work, and a later one has failed ({_named(cause)}). Look at each database before you run "
        "the work again. Only a session with twophase=True commits all or none of them.",
        phase=phase,
    )
    unknown.__cause__ = cause
    return unknown


def unknown_again(unknown: CommitUnknownError) -> CommitUnknownError:
    """Return the same error for a block that has swallowed it."""
    again = CommitUnknownError(str(unknown), phase=unknown.phase)
    again.__cause__ = unknown.__cause__
    return again


def raise_if_unanswered(error: Exception) -> None:
    """Raise `CommitUnknownError` for an error of a statement outside a transaction, unless the
    error is PostgreSQL's answer.

    The driver refuses to send with an `InterfaceError`. The class is compared by its name, because
    the driver is not imported here.
    """
    if not refuses_commit(error) and type(error).__name__ != "InterfaceError":
        raise commit_unknown("statement", error)


def _named(error: BaseException) -> str:
    """Return the class and the message of an error, where it has one."""
    message = str(driver_error(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
