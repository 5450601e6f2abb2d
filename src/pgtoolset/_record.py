"""The record of a session: the error that its open transaction has met, and its callbacks.

SQLAlchemy's events fill it. The listeners on `Session` are registered once, with the first session
that gets a record, and return at once for a session without one; those on a dialect are registered
with its first recorded connection. https://docs.sqlalchemy.org/en/20/orm/session_events.html
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Connection, Dialect, PoolProxiedConnection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from pgtoolset._arguments import AUTOCOMMIT, shown
from pgtoolset._cancellation import uninterrupted
from pgtoolset._compatibility import connections_of
from pgtoolset._postgres.connections import verify_next_commit
from pgtoolset._postgres.discards import (
    checked_rollback,
    is_autocommit,
    is_discarded,
    is_running,
)
from pgtoolset._postgres.sqlstates import (
    breaks_connection,
    driver_error,
    reported_by_server,
    sqlstate_of,
)
from pgtoolset.errors import TransactionAbortedError, TransactionStateError

logger = logging.getLogger("pgtoolset")

Callback: TypeAlias = Callable[[], Awaitable[object] | object]

#: In the `info` of a session.
_KEY = "pgtoolset.record"

#: The record that a connection belongs to, by the object that the pool returned for one checkout.
#: Both sides are weak: the session keeps its record, and the record keeps the connections. So a
#: session that is dropped without `close()` is collected, and its connection with it.
_records: WeakKeyDictionary[PoolProxiedConnection, ref[Record]] = WeakKeyDictionary()

_dialects: WeakSet[Dialect] = WeakSet()
_is_listening = False


class Record:
    """The state of the open transaction of one session; emptied when the transaction ends.

    Attributes:
        verifies_commits: whether a block of ours is open, so that each `commit()` is verified.
        connections: the connections of the transaction.
        error: the error that aborted the transaction, or the first that may have.
        callbacks: of `on_commit`, each with the level whose rollback removes it.
        committed: the level that has just been committed.
        releasing: the savepoint whose RELEASE was sent last, and its connection.
        abandoned: the transaction whose block has ended while another task used the session.
    """

    __slots__ = (
        "__weakref__",
        "_aborts",
        "abandoned",
        "callbacks",
        "committed",
        "connections",
        "error",
        "releasing",
        "verifies_commits",
    )

    def __init__(self) -> None:
        self.verifies_commits = False
        self.connections: list[Connection] = []
        self.error: BaseException | None = None
        self.callbacks: list[tuple[SessionTransaction, Callback]] = []
        self.committed: SessionTransaction | None = None
        self.releasing: tuple[Connection, str] | None = None
        self.abandoned: SessionTransaction | None = None
        self._aborts = False

    @property
    def needs_verified_commit(self) -> bool:
        """Whether a COMMIT that PostgreSQL answers with ROLLBACK must be an error."""
        return self.verifies_commits or bool(self.callbacks)

    def add_connection(self, connection: Connection) -> None:
        """Note that the transaction uses a connection from now on."""
        if connection not in self.connections:
            _records[connection.connection] = ref(self)
            self.connections.append(connection)
            _listen_to_dialect(connection.dialect)

    def note_error(self, error: BaseException, *, is_disconnect: bool = False) -> None:
        """Keep the first error that PostgreSQL reported or that cost the connection.

        Until there is one, keep the first of the others: it may have left the transaction intact.
        """
        aborts = is_disconnect or reported_by_server(error)
        if self.error is None or (aborts and not self._aborts):
            self.error = error
            self._aborts = aborts

    def forget_error(self) -> None:
        """Forget the error: its transaction has ended, or is back at a savepoint before it."""
        self.error = None
        self._aborts = False

    def move_callbacks(self, level: SessionTransaction, enclosing: SessionTransaction) -> None:
        """Give the callbacks of a savepoint that ended to the level around it, or drop them."""
        if self.committed is level:
            self.callbacks = [
                (enclosing if each is level else each, callback)
                for each, callback in self.callbacks
            ]
        else:
            self.callbacks = [entry for entry in self.callbacks if entry[0] is not level]

    def callbacks_to_run(self, transaction: SessionTransaction) -> list[Callback]:
        """Return the callbacks to run now that the outermost transaction has ended."""
        if self.committed is not transaction:
            return []
        return [callback for _, callback in self.callbacks]

    def empty(self) -> None:
        """Forget the transaction, which has ended."""
        for connection in self.connections:
            # A closed connection has no entry: it went with the object of its checkout.
            if _is_open(connection) and record_of_connection(connection.connection) is self:
                del _records[connection.connection]
        self.connections.clear()
        self.callbacks.clear()
        self.committed = self.releasing = self.abandoned = None
        self.forget_error()


def record_of(session: Session) -> Record:
    """Return the record of a session; the first call makes it, and SQLAlchemy's events fill it."""
    record = _existing_record(session)
    if record is None:
        _listen_to_sessions()
        record = session.info[_KEY] = Record()
        # No event has told of the connections of a transaction that began before.
        for connection in connections_of(session.get_transaction()):
            record.add_connection(connection)
    return record


def record_of_connection(connection: PoolProxiedConnection) -> Record | None:
    """Return the record of the session whose transaction uses a checkout of the pool."""
    reference = _records.get(connection)
    return None if reference is None else reference()


def innermost(session: Session) -> SessionTransaction | None:
    """Return the savepoint or transaction that a session is in now, the innermost of them."""
    return session.get_nested_transaction() or session.get_transaction()


def aborted_by(error: BaseException | None) -> TransactionAbortedError:
    """Return the error for a lost transaction, caused by the error that the block swallowed."""
    if error is None:
        what = (
            "an error on its connection that SQLAlchemy did not see, such as one of asyncpg's own "
            "methods"
        )
    else:
        name = type(error).__name__
        what = f"an error that was caught inside the block ({name}: {driver_error(error)})"
    aborted = TransactionAbortedError(
        f"The transaction was aborted by {what}; PostgreSQL has discarded all its work. "
        "Let the error leave the block, or put the statement that may fail into a nested "
        "get_transaction().",
        sqlstate=sqlstate_of(error),
    )
    aborted.__cause__ = error
    return aborted


async def run_callbacks(callbacks: list[Callback]) -> None:
    """Call each callback in order, after the commit. A failure is logged: it undoes nothing."""
    for callback in callbacks:
        try:
            result = callback()
            if inspect.isawaitable(result):
                await result
        except (Exception, asyncio.CancelledError):
            # Not its repr: the arguments of a `partial` may hold a password.
            name = getattr(callback, "__qualname__", None) or shown(callback)
            logger.exception("on_commit callback %s failed; the transaction is committed", name)


def _existing_record(session: Session) -> Record | None:
    record: Record | None = session.info.get(_KEY)
    return record


def _open_record(connection: Connection | None) -> Record | None:
    if connection is None or not _is_open(connection):
        return None
    return record_of_connection(connection.connection)


def _is_open(connection: Connection) -> bool:
    return not (connection.closed or connection.invalidated)


# The listeners on sessions


def _listen_to_sessions() -> None:
    global _is_listening
    if not _is_listening:
        _is_listening = True
        event.listen(Session, "after_begin", _after_begin)
        event.listen(Session, "before_commit", _before_session_commit)
        event.listen(Session, "after_commit", _after_commit)
        event.listen(Session, "after_transaction_end", _after_transaction_end)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    record = _existing_record(session)
    if record is not None:
        record.add_connection(connection)
        if record.abandoned is not None or (record.verifies_commits and is_autocommit(connection)):
            _refuse_connection(record, session, connection)


def _refuse_connection(record: Record, session: Session, connection: Connection) -> None:
    """Take a connection away again that would be used outside of any transaction of ours.

    A session that kept it would execute its next statement there.
    """
    is_late = record.abandoned is not None and record.abandoned is session.get_transaction()
    if not is_late and not is_autocommit(connection):
        return
    if connection is not session.bind:
        connection.close()
    if is_late:
        raise TransactionStateError(
            "the block that this statement belongs to has ended while the statement waited for a "
            "connection; wait for every task that uses the session before the end of its block"
        )
    raise TransactionStateError(AUTOCOMMIT)


def _before_session_commit(session: Session) -> None:
    # On a lost connection SQLAlchemy refuses the commit with an error of its own before it calls
    # the dialect.
    record = _existing_record(session)
    if record is None or record.error is None or not record.needs_verified_commit:
        return
    if not session.in_nested_transaction() and any(
        connection.invalidated for connection in record.connections
    ):
        raise aborted_by(record.error)


def _after_commit(session: Session) -> None:
    record = _existing_record(session)
    if record is not None:
        record.committed = innermost(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    record = _existing_record(session)
    if record is None:
        return
    parent = transaction.parent
    if parent is None:
        callbacks = record.callbacks_to_run(transaction)
        record.empty()
        if callbacks:
            # The work is stored. A cancellation waits until the callbacks have run.
            await_only(uninterrupted(run_callbacks(callbacks)))
    elif transaction.nested and record.callbacks:
        record.move_callbacks(transaction, _level_of(parent))


def _level_of(transaction: SessionTransaction) -> SessionTransaction:
    """Return the savepoint or transaction around a flush, which has a transaction of its own."""
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction


# The listeners on a dialect


def _listen_to_dialect(dialect: Dialect) -> None:
    """Listen to errors, and to each COMMIT and savepoint just before it is sent.

    An engine with a listener takes SQLAlchemy's slow path at every statement and every checkout:
    10 us for each statement. The dialect's own methods are called at the same moments, and cost
    nothing elsewhere.
    """
    if dialect in _dialects:
        return
    _dialects.add(dialect)
    event.listen(dialect, "handle_error", _on_error)
    vars(dialect)["do_rollback"] = checked_rollback(dialect.do_rollback)
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

    if dialect.driver == "asyncpg":  # the answer to a COMMIT is read on asyncpg's connection
        vars(dialect)["do_commit"] = do_commit
    vars(dialect)["do_rollback_to_savepoint"] = do_rollback_to_savepoint
    vars(dialect)["do_release_savepoint"] = do_release_savepoint


def _before_commit(dbapi_connection: PoolProxiedConnection) -> None:
    record = record_of_connection(dbapi_connection)
    if record is not None and record.needs_verified_commit:
        if is_running(dbapi_connection):
            raise TransactionStateError(
                "a statement of another task still runs on the connection, so the transaction "
                "cannot be committed; wait for every task that uses the session before that"
            )
        error = record.error
        verify_next_commit(dbapi_connection, lambda: aborted_by(error))


def _before_rollback_to_savepoint(connection: Connection) -> None:
    record = _open_record(connection)
    # The statement repairs an aborted transaction, but not a lost connection.
    if record is not None:
        record.forget_error()


def _before_release_savepoint(connection: Connection, name: str) -> None:
    record = _open_record(connection)
    if record is not None:
        record.releasing = (connection, name)


def _on_error(context: ExceptionContext) -> None:
    if is_discarded(context.connection):
        context.invalidate_pool_on_disconnect = False
    record = _open_record(context.connection)
    if record is not None:
        error = context.sqlalchemy_exception or context.original_exception
        if breaks_connection(error):
            context.is_disconnect = True
        record.note_error(error, is_disconnect=context.is_disconnect)
