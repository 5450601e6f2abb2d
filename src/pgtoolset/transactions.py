"""Nested transactions, callbacks after the commit, and transactions that run again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._arguments import (
    IsolationLevel,
    SettingsSource,
    TransactionOptions,
    check_begun,
    check_count,
    check_function,
    check_session_maker,
    check_supported,
    check_transactional,
    check_work,
    shown,
    sync_session_of,
)
from pgtoolset._blocks import TransactionBlock, foreign_callbacks
from pgtoolset._callbacks import Callback
from pgtoolset._commits import raise_if_unknown
from pgtoolset._lifecycle import close
from pgtoolset._record import innermost, record_of
from pgtoolset._retries import OnRetry, Retries, RetryOn
from pgtoolset._units import own_session
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import ManagedSession, SessionFactory, TransactionalSession
from pgtoolset.types import Duration, SettingsOrFunction

__all__ = ["IsolationLevel", "get_transaction", "on_commit", "run_transaction"]

S = TypeVar("S", bound=TransactionalSession)
M = TypeVar("M", bound=ManagedSession)
R = TypeVar("R")


def get_transaction(
    session: S,
    *,
    durable: bool = False,
    isolation_level: IsolationLevel | None = None,
    read_only: bool | None = None,
    deferrable: bool | None = None,
    settings: SettingsOrFunction | None = None,
    resolve_commit: Duration | None = None,
) -> AbstractAsyncContextManager[S]:
    """Open a transaction, or a savepoint where the session is already in a transaction.

    The end of the block commits the transaction, or releases the savepoint. An exception rolls back
    exactly this level and propagates unchanged. The block checks out no connection, and sends no
    SAVEPOINT, before its first statement.

    Args:
        session: an `AsyncSession`, or any object that satisfies
            `pgtoolset.protocols.TransactionalSession`.
        durable: `True` refuses to be nested, so that the end of the block is a commit.
        isolation_level: `"READ COMMITTED"`, `"REPEATABLE READ"` or `"SERIALIZABLE"`; `None` leaves
            the server's default.
        read_only: `True` for READ ONLY, `False` for READ WRITE; `None` leaves the server's default.
        deferrable: `True` lets a SERIALIZABLE READ ONLY transaction wait for a safe snapshot;
            `None` leaves the server's default.
        settings: settings of PostgreSQL for the block, such as `{"app.tenant_id": "7"}`, or a
            function without parameters that returns them. They hold for each transaction of an
            outermost block, and none outlives its transaction. Nested, they hold for the block, and
            their earlier values are back after it. That takes a statement before and one after; the
            first takes the snapshot of a REPEATABLE READ transaction without one.
        resolve_commit: the time in which a commit whose answer was lost with its connection is
            resolved: PostgreSQL is asked what became of it. Seconds, a `timedelta` or a string such
            as `"5s"`; `None` leaves it unknown. It costs one short statement before each COMMIT.

    Returns:
        An async context manager that yields `session`.

    Raises:
        TransactionStateError: `durable`, or any of the other options but `settings`, in a session
            that is already in a transaction. Nothing was sent.
        TransactionAbortedError: the block ended normally, but had swallowed an error that aborted
            the transaction.
        CommitUnknownError: the connection was lost between COMMIT and its answer.
        TransactionLostError: the same, and `resolve_commit` has found that nothing is stored.
        ValueError, TypeError: an argument is wrong. Nothing was sent.

    Example:
        >>> async with get_transaction(session=session):          # BEGIN
        ...     session.add(order)
        ...     try:
        ...         async with get_transaction(session=session):  # SAVEPOINT
        ...             await charge(order)
        ...     except CardDeclined:                              # ROLLBACK TO SAVEPOINT
        ...         order.status = "unpaid"
        ...                                                       # COMMIT

    See https://www.postgresql.org/docs/current/sql-set-transaction.html and
    https://docs.sqlalchemy.org/en/20/orm/session_transaction.html
    """
    has_options = not (
        durable is False
        and isolation_level is None
        and read_only is None
        and deferrable is None
        and settings is None
        and resolve_commit is None
    )
    if isinstance(session, AsyncSession) and not has_options:
        return TransactionBlock(session)  # nearly every call, and nothing to check
    check_transactional(session)
    return TransactionBlock(
        session,
        TransactionOptions(
            durable,
            isolation_level,
            read_only,
            deferrable,
            resolve_commit,
            SettingsSource(settings).now(),
        ),
    )


def on_commit(session: TransactionalSession, callback: Callback) -> None:
    """Call `callback` after the outermost transaction of `session` has committed.

    Callbacks run in the order of their registration, after the end of a block and after an explicit
    `commit()` alike, before control returns to the caller. A callback is dropped when its own
    level, transaction or savepoint, rolls back. A callback that raises is logged (logger
    `pgtoolset`) and does not stop the next: the transaction stays committed. A cancellation that
    arrives meanwhile is delivered after the last callback.

    Args:
        session: a session in a transaction.
        callback: a function, sync or async, without parameters. For SQL it opens a session of its
            own.

    A session of your own may have a method `run_after_commit(callback)`. It is called in place of
    all this, and runs the callback after the next commit, that of `commit()` and of
    `create_db_context` too.

    Raises:
        TransactionStateError: the session is not in a transaction; or it is not SQLAlchemy's, and
            its transaction was not opened by `get_transaction`, so that its commit is not seen.
        TypeError: an argument is wrong.

    Example:
        >>> async with get_transaction(session=session):
        ...     session.add(order)
        ...     on_commit(session, lambda: events.publish("order placed"))

    See https://docs.sqlalchemy.org/en/20/orm/session_events.html
    """
    check_transactional(session)
    check_function("callback", "a function without parameters", callback)
    sync = sync_session_of(session)
    if sync is None:
        hook = getattr(session, "run_after_commit", None)
        if callable(hook):
            hook(callback)
            return
        callbacks = foreign_callbacks(session)
        if callbacks is None:
            raise TransactionStateError(
                "on_commit needs a transaction that get_transaction opened, and the session, "
                f"{shown(session)}, is not in one"
            )
        callbacks.append(callback)
        return
    check_supported(sync)
    level = innermost(sync)
    if level is None:
        raise TransactionStateError(
            "on_commit needs a session in a transaction, and this session is not in one; register "
            "the callback inside get_transaction() or after session.begin()"
        )
    record_of(sync).callbacks.append((level, callback))


async def run_transaction(
    session_maker: SessionFactory[M],
    work: Callable[[M], Awaitable[R]],
    *,
    attempts: int = 5,
    isolation_level: IsolationLevel | None = None,
    read_only: bool | None = None,
    retry_on: RetryOn | None = None,
    on_retry: OnRetry | None = None,
    resolve_commit: Duration | None = None,
    settings: SettingsOrFunction | None = None,
) -> R:
    """Run `work(session)` as one transaction, and again where PostgreSQL asks for that.

    A serialization failure (SQLSTATE 40001) or a deadlock (40P01), in the work or at the commit,
    rolls the attempt back, and so does a connection that is lost before COMMIT was sent, or whose
    server has refused to write because it is a standby now. The next attempt runs in a new session
    after a random pause of up to 0.02 s, 0.04 s, 0.08 s, ..., 1 s (exponential backoff with full
    jitter). After a lost server it may also fail to connect; the first attempt may not. The error
    may also be a member of an `ExceptionGroup`, or the cause of another one (`raise ... from
    error`). Any other error propagates at once, and so does the error of the last attempt.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions.
        work: an async function of one session. It may run several times, so put its effects
            outside of the database into `on_commit`, and leave the commit to this function: what
            a `commit()` of its own has stored is done again too.
        attempts: the largest number of attempts, at least 1. The pauses of 5 last up to 0.3 s, of
            20 up to 14 s: docs/poolers.md says how to bridge a failover.
        isolation_level: as in `get_transaction`.
        read_only: as in `get_transaction`.
        retry_on: a function of the error that returns whether to try again. It is asked for each
            other error of an attempt, such as one of your own.
        on_retry: a function, sync or async, that is called before each pause with a
            `pgtoolset.values.RetryAttempt`: `.number` (of the attempt that failed, from 1),
            `.error` and `.pause` (in seconds). An error that it raises ends the retries.
        resolve_commit: the time in which a commit whose answer was lost with its connection is
            resolved: PostgreSQL is asked what became of it. Seconds, a `timedelta` or a string such
            as `"5s"`; `None` leaves it unknown. Where it is certainly
            not stored, `work` runs again. It costs one short statement before each COMMIT.
        settings: settings of PostgreSQL for each transaction of each attempt, such as
            `{"app.tenant_id": "7"}`, or a function without parameters that returns them; it is
            called once.

    Returns:
        The result of `work` in the attempt that was committed.

    Raises:
        TransactionAbortedError: `work` swallowed an error that aborted the transaction.
        CommitUnknownError: the connection was lost between COMMIT and its answer, at the end or at
            a `commit()` of `work`. It is never tried again.
        TransactionLostError: the same in the last attempt, and nothing is stored.
        TransactionStateError: `session_maker` gave a session that is in a transaction or in use
            already, or its engine is in AUTOCOMMIT. Nothing was sent.
        ValueError, TypeError: an argument is wrong. Nothing was sent.

    Example:
        >>> async def withdraw(session: AsyncSession) -> int:
        ...     account = await session.get_one(Account, 1)
        ...     account.balance -= 10
        ...     return account.balance
        >>> balance = await run_transaction(session_maker, withdraw, isolation_level="SERIALIZABLE")

    See https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
    """
    check_session_maker(session_maker)
    check_work(work)
    check_count("attempts", attempts)
    options = TransactionOptions(
        isolation_level=isolation_level,
        read_only=read_only,
        resolve_commit=resolve_commit,
        settings=SettingsSource(settings).now(),
    )
    retries = Retries(retry_on, on_retry)
    for number in range(1, attempts):
        try:
            return await _attempt(session_maker, work, options, retries)
        except Exception as error:
            if not retries.allow(error):
                raise
            failure = error
        await retries.pause(number, failure)
        del failure  # its traceback keeps the session of the attempt
    return await _attempt(session_maker, work, options, retries)


async def _attempt(
    session_maker: SessionFactory[M],
    work: Callable[[M], Awaitable[R]],
    options: TransactionOptions,
    retries: Retries,
) -> R:
    session = own_session(session_maker)
    sync = sync_session_of(session)
    if sync is not None and sync.bind is not None:
        retries.dialects = (sync.bind.dialect,)
    try:
        async with TransactionBlock(session, options):
            result = work(session)
            check_begun(work, result)
            try:
                return await result
            except Exception:
                # Whatever `work` raises after a commit() in doubt, it must not run again.
                raise_if_unknown(sync)
                raise
            finally:
                if sync is not None and sync.bind is None:
                    retries.dialects = {each.dialect for each in record_of(sync).connections}
    finally:
        await close(session)
