"""Commits that never report success for work that PostgreSQL has discarded or may have lost.

After an error PostgreSQL refuses every statement until a rollback, and answers COMMIT with
ROLLBACK, without an error. https://www.postgresql.org/docs/current/sql-commit.html
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any
from weakref import ref

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgtoolset._arguments import Settings
from pgtoolset._compatibility import error_of_failed_flush
from pgtoolset._deadlines import suspended
from pgtoolset._endings import note_aborted
from pgtoolset._outcomes import aborted_by, flush_failed, partly_stored, unknown_again
from pgtoolset._postgres.discards import discard, is_open
from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION, sqlstate_of
from pgtoolset._record import Record, innermost, record_of
from pgtoolset.errors import TransactionAbortedError


def verify_commits(
    session: Session, resolve_commit: float | None = None, settings: Settings | None = None
) -> bool:
    """Verify each `commit()` of a session until `stop_verifying`; `False` where it is verified.

    Args:
        session: the session.
        resolve_commit: seconds in which a commit without an answer is to be resolved.
        settings: of each of its transactions.

    The method is put on the instance, because after a failed flush SQLAlchemy refuses a commit
    (`PendingRollbackError`) before any event could replace that error by the one that names its
    cause. It refers to the session weakly: a session in no transaction is freed with its last
    reference.
    """
    record = record_of(session)
    if record.verifies_commits:
        return False
    record.verifies_commits = True
    record.resolve_commit = resolve_commit
    record.take_settings(session, settings)
    vars(session)["commit"] = partial(_verified_commit, ref(session))
    return True


def stop_verifying(session: Session) -> None:
    """Leave the commits of a session to SQLAlchemy again."""
    record = record_of(session)
    record.verifies_commits = False
    record.resolve_commit = record.unknown = record.settings = None
    vars(session).pop("commit", None)


async def commit_at_end(session: Any, sync: Session) -> None:
    """Commit the open transaction at the end of a block whose commits are verified.

    Raises:
        CommitUnknownError: the answer to this COMMIT was lost, or that to an earlier one, whose
            error the block has swallowed. Nothing more is committed then.
        TransactionAbortedError: the transaction is lost.
    """
    record = record_of(sync)
    if record.unknown is not None:
        raise unknown_again(record.unknown)
    # The block may have ended the transaction, and begun another one or none.
    if sync.in_transaction():
        record.is_ending = True
        try:
            await session.commit()
        finally:
            record.is_ending = False


def raise_if_unknown(session: Session | None) -> None:
    """Raise `CommitUnknownError` where the open block of a session has swallowed one."""
    record = None if session is None else record_of(session)
    if record is not None and record.unknown is not None:
        raise unknown_again(record.unknown)


def rolled_back_by_flush(session: Session) -> TransactionAbortedError:
    """Return the error for the innermost level of a session, which a failed flush rolled back."""
    record = record_of(session)
    level = innermost(session)
    error = None if level is None else error_of_failed_flush(level)
    return flush_failed(error or record.error, is_connected=bool(record.checkouts))


def undo_failed_release(record: Record) -> None:
    """Roll back to the savepoint whose RELEASE was refused, which SQLAlchemy does not do.

    Another connection of the session may have released its part already, which cannot be undone:
    none of them may be committed then. Runs in SQLAlchemy's greenlet.
    """
    is_alone = len(record.checkouts) == 1
    for checkout in record.checkouts:
        connection = checkout.connection
        if not is_alone:
            if is_open(connection):
                discard(connection.connection)
        elif checkout.releasing is not None:
            connection.dialect.do_rollback_to_savepoint(connection, checkout.releasing)


def _verified_commit(session_ref: ref[Session]) -> None:
    session = session_ref()
    assert session is not None  # its own method is running
    record = record_of(session)
    try:
        _raise_if_aborted(session, record)
    except TransactionAbortedError:
        for checkout in record.checkouts:
            note_aborted(checkout)
        raise
    try:
        type(session).commit(session)
    except (Exception, asyncio.CancelledError) as error:
        if record.is_partly_stored and record.unknown is None:
            record.unknown = partly_stored("end" if record.is_ending else "commit", error)
            raise record.unknown from error
        raise


def _raise_if_aborted(session: Session, record: Record) -> None:
    """Raise where the transaction of a session is lost, or an earlier one may be.

    It costs a round trip only after an error that no savepoint has rolled back. Runs in
    SQLAlchemy's greenlet.
    """
    if record.unknown is not None:
        raise unknown_again(record.unknown)
    level = innermost(session)
    if level is None:
        return
    if not level.is_active:
        # A flush has failed, and SQLAlchemy has rolled back already.
        raise rolled_back_by_flush(session)
    for checkout in record.checkouts:
        if checkout.error is not None:
            _raise_if_refused(checkout.connection, checkout.error)


def _raise_if_refused(connection: Connection, error: BaseException) -> None:
    """Ask PostgreSQL with a statement whether `error` has aborted the transaction."""
    if connection.invalidated:
        raise aborted_by(error)
    try:
        with suspended():
            connection.exec_driver_sql("SELECT 1")
    except DBAPIError as refused:
        if sqlstate_of(refused) == IN_FAILED_SQL_TRANSACTION or refused.connection_invalidated:
            raise aborted_by(error) from error
        raise
