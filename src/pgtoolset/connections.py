"""The connection of a session: given back while something else answers, or used past SQLAlchemy."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import NestedTransaction
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    AUTOCOMMIT,
    READ_BLOCK,
    check_flag,
    sync_session,
)
from pgtoolset._checkouts import Checkout
from pgtoolset._compatibility import error_of_failed_flush, is_in_block
from pgtoolset._loans import Loan
from pgtoolset._outcomes import aborted_earlier, lost_unwritten
from pgtoolset._postgres.connections import is_open_cursor
from pgtoolset._postgres.discards import is_autocommit, is_open, is_running
from pgtoolset._postgres.modes import Look, Modes, look
from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION, sqlstate_of
from pgtoolset._record import Record, innermost, record_of, stands_alone
from pgtoolset.errors import CommitUnknownError, TransactionStateError

if TYPE_CHECKING:
    import asyncpg
    import psycopg

    DriverConnection: TypeAlias = asyncpg.Connection | psycopg.AsyncConnection[Any]

__all__ = ["driver_connection", "release_connection"]


def release_connection(
    session: AsyncSession, *, commit: bool = False
) -> AbstractAsyncContextManager[None]:
    """Give the connection of a session back to the pool while the block waits for something else.

    The transaction, in which nothing was written, ends. The next statement, in the block or after
    it, takes a connection again, and begins a transaction like the last one: with the same
    isolation level, READ ONLY and DEFERRABLE, the same `settings=` and `resolve_commit=`, and the
    same execution options. Loaded instances stay loaded. It is another transaction: what others
    have committed meanwhile is there. A session that holds no connection sends nothing.

    PostgreSQL is asked in one statement what the transaction has done. Then it is committed, and
    not rolled back: only the commit of a SERIALIZABLE transaction says that what it has read is
    true, and a `NOTIFY` is delivered. What `SET LOCAL` has set ends with it; settings that each
    transaction must have are `settings=`.

    Args:
        session: an `AsyncSession`.
        commit: commit first, with all that was written, and run the callbacks of `on_commit`. The
            work before the block is stored then, whatever happens after it. A commit that fails
            raises, and the block does not run.

    Returns:
        An async context manager.

    Raises:
        TransactionStateError: something would be lost or half done, and the message names it; the
            transaction goes on. Without `commit`: pending changes, something that was written or
            locked, an open cursor, callbacks of `on_commit`, an error that has aborted the
            transaction. In any case: an open savepoint (a nested `get_transaction`), a block of
            `session.begin()` or of `driver_connection`, a statement of another task, a session
            that is joined to a connection, one with `twophase=True`, a read block of
            `ReadReplicas`, and AUTOCOMMIT.
        TransactionLostError: the connection was lost while the transaction ended.
        TypeError: an argument is wrong. Nothing was sent.

    Example:
        >>> account = await session.get_one(Account, 1)
        >>> async with release_connection(session):
        ...     rate = await exchange_rate()
        >>> account.balance *= rate

    docs/connections.md says when to use it. See
    https://docs.sqlalchemy.org/en/20/orm/session_transaction.html
    """
    sync = sync_session(session)
    check_flag("commit", commit)
    return _Released(session, sync, commit)


def driver_connection(session: AsyncSession) -> AbstractAsyncContextManager[DriverConnection]:
    """Yield the connection of the driver, inside of the transaction of a session.

    For what SQLAlchemy has no function: COPY, or a job queue that takes a connection. Pending
    changes are flushed first, and the transaction is begun where it is not. What is executed on the
    connection is committed with the session, and gone with its rollback. The session itself may be
    used in the block, but not at the same moment: a connection executes one statement at a time.

    The block must not end the transaction: no COMMIT, no ROLLBACK, no `commit()` of psycopg's
    connection. Its end costs one statement that finds out. For a part of the work that may fail use
    `async with connection.transaction():`, which is a savepoint there.

    Args:
        session: an `AsyncSession`, also one that is joined to a connection. One that is in no
            transaction begins one, as a query does.

    Returns:
        An async context manager that yields an `asyncpg.Connection` or a `psycopg.AsyncConnection`,
        whichever the engine uses.

    Raises:
        TransactionStateError: the block has ended the transaction of the session, or the session
            has; nothing more of it is stored, and the connection is closed. Or the session's
            connection is in AUTOCOMMIT.
        TypeError: `session` is not an `AsyncSession`. Nothing was sent.

    An error that leaves the block, or that it has swallowed, aborts the transaction as any other
    does, and the end of the unit of work reports it.

    Example:
        >>> import asyncpg
        >>> async with driver_connection(session) as connection:
        ...     assert isinstance(connection, asyncpg.Connection)
        ...     await connection.copy_records_to_table("item", records=[(1, "one"), (2, "two")])

    docs/connections.md shows COPY and two job queues. See
    https://magicstack.github.io/asyncpg/current/api/index.html and
    https://www.psycopg.org/psycopg3/docs/basic/copy.html
    """
    return Loan(sync_session(session))


class _Released(AbstractAsyncContextManager[None]):
    """Ends the transaction as it is entered; its end has nothing to do."""

    __slots__ = ("_commit", "_session", "_sync")

    def __init__(self, session: AsyncSession, sync: Session, commit: bool) -> None:
        self._session = session
        self._sync = sync
        self._commit = commit

    async def __aenter__(self) -> None:
        sync = self._sync
        if READ_BLOCK in sync.info:
            raise TransactionStateError(
                "release_connection cannot be used in a read block of ReadReplicas, which is one "
                "transaction on one node; end the block, and open another one afterwards"
            )
        if not sync.in_transaction():
            return
        record = record_of(sync)
        _refuse_always(sync, record)
        if self._commit:
            await self._store(record)
        else:
            await greenlet_spawn(_end_unwritten, sync, record)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    async def _store(self, record: Record) -> None:
        sync = self._sync
        carried = dict(record.carried)
        level = innermost(sync)
        if level is not None and level.is_active:
            await self._session.flush()
            carried |= await greenlet_spawn(_modes_of_all, record)
        with _Unexpired(sync):
            await self._session.commit()
        _begin_again(sync, record, carried)


class _Unexpired:
    """A block in which a commit does not expire the instances of a session."""

    __slots__ = ("_before", "_sync")

    def __init__(self, sync: Session) -> None:
        self._sync = sync
        self._before = sync.expire_on_commit

    def __enter__(self) -> None:
        self._sync.expire_on_commit = False

    def __exit__(self, *_: object) -> None:
        self._sync.expire_on_commit = self._before


def _end_unwritten(sync: Session, record: Record) -> None:
    """End a transaction that has written nothing, and begin the next one without a connection."""
    _refuse(_changes(sync, record))
    if not record.checkouts:
        return
    carried = dict(record.carried)
    for checkout in record.checkouts:
        _refuse(_noted(checkout))
    for checkout in record.checkouts:
        seen = _look_at(checkout)
        _refuse(_seen(seen, checkout, is_alone=not stands_alone(sync)))
        carried[checkout.connection.engine] = seen.modes
    # It has written nothing, so there is nothing to resolve.
    resolve_commit, record.resolve_commit = record.resolve_commit, None
    try:
        with _Unexpired(sync):
            _commit_verified(sync, record)
    except CommitUnknownError as unknown:
        record.unknown = None
        raise lost_unwritten(unknown.__cause__) from unknown.__cause__
    finally:
        record.resolve_commit = resolve_commit
    _begin_again(sync, record, carried)


def _commit_verified(sync: Session, record: Record) -> None:
    if not record.needs_verified_commit:
        for checkout in record.checkouts:
            checkout.owes_commit = True
    sync.commit()


def _begin_again(sync: Session, record: Record, carried: dict[Engine, Modes]) -> None:
    if not sync.in_transaction():
        sync.begin()
    if not record.checkouts:
        record.carried = carried


def _modes_of_all(record: Record) -> dict[Engine, Modes]:
    """Return the modes of the connections; those of an aborted transaction cannot be asked for."""
    found = {}
    for checkout in record.checkouts:
        try:
            seen = look(checkout.connection, is_read_only=checkout.is_read_only)
        except DBAPIError as error:
            if sqlstate_of(error) != IN_FAILED_SQL_TRANSACTION:
                raise
        else:
            found[checkout.connection.engine] = seen.modes
    return found


def _look_at(checkout: Checkout) -> Look:
    try:
        return look(checkout.connection, is_read_only=checkout.is_read_only)
    except DBAPIError as error:
        if sqlstate_of(error) != IN_FAILED_SQL_TRANSACTION:
            raise
        raise aborted_earlier(checkout.error or error) from (checkout.error or error)


# What is in the way


def _refuse_always(sync: Session, record: Record) -> None:
    """Raise where the transaction cannot be ended here, by a commit neither. Sends nothing."""
    if sync.in_nested_transaction():
        raise _refused(
            "a savepoint is open, of a nested get_transaction or begin_nested", "leave it"
        )
    if is_in_block(sync):
        raise _refused(
            "a block of session.begin() is open, which allows no other transaction before its end",
            "write `async with get_transaction(session):`",
        )
    if sync.twophase and record.checkouts:
        raise _refused("the session has twophase=True", "use a session without it")
    if isinstance(sync.bind, Connection) and not stands_alone(sync):
        raise _joined()
    for checkout in record.checkouts:
        _refuse_connection(sync, record, checkout)


def _refuse_connection(sync: Session, record: Record, checkout: Checkout) -> None:
    connection = checkout.connection
    if not is_open(connection):
        raise aborted_earlier(checkout.error) from checkout.error
    if is_running(connection.connection):
        raise _refused("a statement of another task runs on it", "wait for that task")
    if checkout.borrowers:
        raise _refused("a block of driver_connection is open", "leave it")
    if is_autocommit(connection):
        raise TransactionStateError(AUTOCOMMIT)
    if stands_alone(sync):
        return
    if isinstance(checkout.participants.get(record), NestedTransaction):
        raise _joined()
    if connection.in_nested_transaction():
        raise _refused("a savepoint of its connection is open", "leave it")
    if len(checkout.participants) > 1:
        raise _refused("another session is joined to its connection", "close that session")


def _changes(sync: Session, record: Record) -> str | None:
    """Return what the session itself has to commit."""
    level = innermost(sync)
    if level is not None and not level.is_active:
        error = error_of_failed_flush(level) or record.error
        raise aborted_earlier(error) from error
    pending = [*sync.new, *sync.deleted, *filter(sync.is_modified, sync.dirty)]
    if pending:
        classes = ", ".join(sorted({type(each).__name__ for each in pending}))
        return f"changes are pending, of {classes}"
    if record.callbacks or any(checkout.deferred for checkout in record.checkouts):
        return "callbacks of on_commit wait for the commit"
    return None


def _noted(checkout: Checkout) -> str | None:
    """Return what is known without a question to PostgreSQL."""
    if checkout.locks:
        return f"the transaction holds {checkout.locks[0]}"
    if any(map(is_open_cursor, checkout.cursors)):
        return "a server-side cursor is open, such as one of session.stream()"
    return None


def _seen(seen: Look, checkout: Checkout, *, is_alone: bool) -> str | None:
    """Return what PostgreSQL has named.

    The sessions of a test are in a transaction that may have written, and may hold locks: only
    their own levels count.
    """
    if seen.writes > (0 if is_alone else len(checkout.participants)):
        return "the transaction has written or locked rows"
    if seen.lock is not None and is_alone:
        return f"the transaction holds {seen.lock}"
    if seen.cursor is not None:
        return f"the cursor {seen.cursor} is open"
    return None


def _refuse(what: str | None) -> None:
    if what is not None:
        raise _refused(what, "do that afterwards, or pass commit=True, which commits first")


def _refused(what: str, advice: str) -> TransactionStateError:
    return TransactionStateError(
        f"release_connection cannot give the connection of the session back: {what}; {advice}. "
        "The transaction goes on."
    )


def _joined() -> TransactionStateError:
    return _refused(
        "the session is joined to a connection, which is not its own", "use a session of the pool"
    )
