"""What is known of a session's open transaction: the error that its block swallowed, and who waits
for its commit.

SQLAlchemy tells it through events. The listeners on `Session` are registered once, with the first
session that is recorded, and return at once for a session that is not; those on an engine are
registered with its first recorded connection.
https://docs.sqlalchemy.org/en/20/orm/session_events.html
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Dialect, PoolProxiedConnection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.connections import verify_next_commit
from pgtoolset._postgres.sqlstates import (
    IN_FAILED_SQL_TRANSACTION,
    breaks_connection,
    driver_error,
    reported_by_server,
    sqlstate_of,
)
from pgtoolset.errors import TransactionAbortedError

logger = logging.getLogger("pgtoolset")

Callback: TypeAlias = Callable[[], Awaitable[object] | object]

_KEY = "pgtoolset.record"
#: By what a checkout gave: SQLAlchemy makes one object for each, and drops it when the connection
#: goes back.
_records: WeakKeyDictionary[PoolProxiedConnection, Record] = WeakKeyDictionary()
_dialects: WeakSet[Dialect] = WeakSet()
_listening = False


class Record:
    """One per session, emptied whenever its outermost transaction ends."""

    __slots__ = ("aborted", "callbacks", "committed", "connections", "error", "held", "releasing")

    def __init__(self) -> None:
        self.held = False
        self.connections: list[Connection] = []
        self.error: BaseException | None = None
        self.aborted = False
        self.callbacks: list[tuple[SessionTransaction, Callback]] = []
        self.committed: SessionTransaction | None = None
        self.releasing: tuple[Connection, str] | None = None

    def saw(self, error: BaseException, *, is_disconnect: bool = False) -> None:
        """Keep the error that aborted the transaction: the first that came from the server or cost
        the connection.

        Until there is one, keep the first of the others: they may have left the transaction intact.
        """
        aborts = is_disconnect or reported_by_server(error)
        if self.error is None or (aborts and not self.aborted):
            self.error = error
            self.aborted = aborts

    def clear(self) -> None:
        for connection in self.connections:
            if _is_open(connection):
                _records.pop(connection.connection, None)
        self.connections.clear()
        self.callbacks.clear()
        self.committed = self.releasing = None
        self.forgive()

    def forgive(self) -> None:
        """Forget the error: its transaction is over, or back at a savepoint from before it."""
        self.error = None
        self.aborted = False


def record_of(session: Session) -> Record:
    """The record of `session`, from now on kept by its events."""
    record: Record | None = session.info.get(_KEY)
    if record is None:
        _listen_to_sessions()
        record = session.info[_KEY] = Record()
        # A transaction that began before has told nobody of its connections. SQLAlchemy shows them
        # from 2.1.7 on (`SessionTransaction.connections`); what is behind that is the same in every
        # supported version.
        transaction = session.get_transaction()
        for connection in list(getattr(transaction, "_connections", ())):
            if transaction is not None and isinstance(connection, Connection):
                _after_begin(session, transaction, connection)
    return record


def hold(session: Session) -> bool:
    """Keep a record of `session` and hold every `commit()` on it to the truth. False where it is
    held already.

    `release` undoes it. The method is put on the instance because SQLAlchemy refuses a commit after
    a failed flush (`PendingRollbackError`) before any event could turn the refusal into the error
    that names its cause.
    """
    record = record_of(session)
    if record.held:
        return False
    record.held = True
    vars(session)["commit"] = partial(_commit, session, record)
    return True


def release(session: Session) -> None:
    record_of(session).held = False
    vars(session).pop("commit", None)


def _commit(session: Session, record: Record) -> None:
    raise_if_aborted(session, record)
    type(session).commit(session)


def raise_if_aborted(session: Session, record: Record) -> None:
    """Raise `TransactionAbortedError` where the open transaction of `session` cannot be committed
    any more.

    Costs a round trip only where an error was seen that no savepoint has rolled back. Runs in
    SQLAlchemy's greenlet.
    """
    level = innermost(session)
    if level is None:
        return
    if not level.is_active:
        raise aborted_by(getattr(level, "_rollback_exception", None) or record.error)
    if record.error is None:
        return
    for connection in record.connections:
        if connection.invalidated:
            raise aborted_by(record.error)
        try:
            connection.exec_driver_sql("SELECT 1")
        except DBAPIError as refused:
            if sqlstate_of(refused) == IN_FAILED_SQL_TRANSACTION or refused.connection_invalidated:
                raise aborted_by(record.error) from record.error
            raise


def aborted_by(error: BaseException | None) -> TransactionAbortedError:
    """The error that tells of a lost transaction, caused by the `error` that the block
    swallowed."""
    if error is None:
        what = "an error on its connection that SQLAlchemy did not see, such as one of asyncpg's own methods"
    else:
        what = f"an error that was caught inside the block ({type(error).__name__}: {driver_error(error)})"
    aborted = TransactionAbortedError(
        f"The transaction was aborted by {what}; PostgreSQL has discarded all its work. "
        "Let the error leave the block, or put the statement that may fail into a nested get_transaction().",
        sqlstate=sqlstate_of(error),
    )
    aborted.__cause__ = error
    return aborted


def undo_failed_release(record: Record) -> None:
    """Roll back to the savepoint whose RELEASE was refused in an aborted transaction; SQLAlchemy
    leaves it at that.

    Runs in SQLAlchemy's greenlet.
    """
    if record.releasing is not None:
        connection, savepoint = record.releasing
        connection.dialect.do_rollback_to_savepoint(connection, savepoint)
        record.forgive()


def innermost(session: Session) -> SessionTransaction | None:
    """The transaction or savepoint that is on top now."""
    return session.get_nested_transaction() or session.get_transaction()


def _listen_to_sessions() -> None:
    global _listening
    if not _listening:
        _listening = True
        event.listen(Session, "after_begin", _after_begin)
        event.listen(Session, "before_commit", _before_session_commit)
        event.listen(Session, "after_commit", _after_commit)
        event.listen(Session, "after_transaction_end", _after_transaction_end)


def _listen_to_dialect(dialect: Dialect) -> None:
    """Hear of errors, and of each COMMIT and savepoint just before it is sent.

    An engine with any listener takes SQLAlchemy's slow path at every statement and every checkout:
    10 us a statement. The dialect's own methods are called at exactly the same moments and cost
    nothing where they are not called.
    """
    if dialect in _dialects:
        return
    _dialects.add(dialect)
    event.listen(dialect, "handle_error", _on_error)
    commit = dialect.do_commit
    rollback_to_savepoint = dialect.do_rollback_to_savepoint
    release_savepoint = dialect.do_release_savepoint

    def do_commit(dbapi_connection: PoolProxiedConnection) -> None:
        _before_commit(dbapi_connection)
        commit(dbapi_connection)

    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        _before_rollback_to_savepoint(connection)
        rollback_to_savepoint(connection, name)

    def do_release_savepoint(connection: Connection, name: str) -> None:
        _before_release_savepoint(connection, name)
        release_savepoint(connection, name)

    vars(dialect).update(
        do_commit=do_commit,
        do_rollback_to_savepoint=do_rollback_to_savepoint,
        do_release_savepoint=do_release_savepoint,
    )


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    record: Record | None = session.info.get(_KEY)
    if record is not None and connection not in record.connections:
        _records[connection.connection] = record
        record.connections.append(connection)
        _listen_to_dialect(connection.dialect)


def _record_on(connection: Connection | None) -> Record | None:
    return (
        _records.get(connection.connection)
        if connection is not None and _is_open(connection)
        else None
    )


def _is_open(connection: Connection) -> bool:
    return not (connection.closed or connection.invalidated)


def _before_session_commit(session: Session) -> None:
    # On a lost connection SQLAlchemy refuses the commit with an error of its own before it asks the
    # dialect for it.
    record: Record | None = session.info.get(_KEY)
    if record is None or record.error is None or not (record.held or record.callbacks):
        return
    if not session.in_nested_transaction() and any(
        connection.invalidated for connection in record.connections
    ):
        raise aborted_by(record.error)


def _after_commit(session: Session) -> None:
    record: Record | None = session.info.get(_KEY)
    if record is not None:
        record.committed = innermost(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    record: Record | None = session.info.get(_KEY)
    if record is None:
        return
    parent = transaction.parent
    if parent is None:
        callbacks = (
            [callback for _, callback in record.callbacks]
            if record.committed is transaction
            else []
        )
        record.clear()
        if callbacks:
            # The caller will be told that it is committed, so a cancellation waits until they have
            # run.
            await_only(uninterrupted(run_callbacks(callbacks)))
    elif transaction.nested and record.callbacks:
        committed = record.committed is transaction
        enclosing = _level(parent)
        record.callbacks = [
            (enclosing if level is transaction else level, callback)
            for level, callback in record.callbacks
            if committed or level is not transaction
        ]


def _level(transaction: SessionTransaction) -> SessionTransaction:
    """The savepoint or transaction that `transaction` is part of: a flush has a SessionTransaction
    of its own."""
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction


async def run_callbacks(callbacks: list[Callback]) -> None:
    """Call each in order. The transaction is committed, so nothing but a log line may come of a
    failure."""
    for callback in callbacks:
        try:
            result = callback()
            if inspect.isawaitable(result):
                await result
        except (Exception, asyncio.CancelledError):
            logger.exception(
                "on_commit callback %r failed; the transaction is committed all the same", callback
            )


def _before_commit(dbapi_connection: PoolProxiedConnection) -> None:
    record = _records.get(dbapi_connection)
    if record is not None and (record.held or record.callbacks):
        verify_next_commit(dbapi_connection, lambda: aborted_by(record.error))


def _before_rollback_to_savepoint(connection: Connection) -> None:
    record = _record_on(connection)
    # The statement puts an aborted transaction right again. A lost connection it does not bring
    # back.
    if record is not None:
        record.forgive()


def _before_release_savepoint(connection: Connection, name: str) -> None:
    record = _record_on(connection)
    if record is not None:
        record.releasing = (connection, name)


def _on_error(context: ExceptionContext) -> None:
    record = _record_on(context.connection)
    if record is not None:
        error = context.sqlalchemy_exception or context.original_exception
        if breaks_connection(error):
            context.is_disconnect = True
        record.saw(error, is_disconnect=context.is_disconnect)
