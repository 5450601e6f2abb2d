"""Commits that never report success for work that PostgreSQL has discarded.

After an error PostgreSQL refuses every statement until a rollback, and answers COMMIT with
ROLLBACK, without an error. https://www.postgresql.org/docs/current/sql-commit.html
"""

from __future__ import annotations

from functools import partial

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgtoolset._compatibility import error_of_failed_flush
from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION, sqlstate_of
from pgtoolset._record import Record, aborted_by, innermost, record_of


def verify_commits(session: Session) -> bool:
    """Verify each `commit()` of a session until `stop_verifying`; `False` where it is verified.

    The method is put on the instance, because after a failed flush SQLAlchemy refuses a commit
    (`PendingRollbackError`) before any event could replace that error by the one that names its
    cause.
    """
    record = record_of(session)
    if record.verifies_commits:
        return False
    record.verifies_commits = True
    vars(session)["commit"] = partial(_verified_commit, session, record)
    return True


def stop_verifying(session: Session) -> None:
    """Leave the commits of a session to SQLAlchemy again."""
    record_of(session).verifies_commits = False
    vars(session).pop("commit", None)


def undo_failed_release(record: Record) -> None:
    """Roll back to the savepoint whose RELEASE was refused, which SQLAlchemy does not do.

    Runs in SQLAlchemy's greenlet.
    """
    if record.releasing is not None:
        connection, savepoint = record.releasing
        connection.dialect.do_rollback_to_savepoint(connection, savepoint)
        record.forget_error()


def _verified_commit(session: Session, record: Record) -> None:
    _raise_if_aborted(session, record)
    type(session).commit(session)


def _raise_if_aborted(session: Session, record: Record) -> None:
    """Raise `TransactionAbortedError` where the transaction of a session is lost.

    It costs a round trip only after an error that no savepoint has rolled back. Runs in
    SQLAlchemy's greenlet.
    """
    level = innermost(session)
    if level is None:
        return
    if not level.is_active:
        # A flush has failed, and SQLAlchemy has rolled back already.
        raise aborted_by(error_of_failed_flush(level) or record.error)
    if record.error is not None:
        for connection in record.connections:
            _raise_if_refused(connection, record.error)


def _raise_if_refused(connection: Connection, error: BaseException) -> None:
    """Ask PostgreSQL with a statement whether `error` has aborted the transaction."""
    if connection.invalidated:
        raise aborted_by(error)
    try:
        connection.exec_driver_sql("SELECT 1")
    except DBAPIError as refused:
        if sqlstate_of(refused) == IN_FAILED_SQL_TRANSACTION or refused.connection_invalidated:
            raise aborted_by(error) from error
        raise
