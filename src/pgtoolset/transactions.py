"""Transactions that nest, callbacks after the commit, and whole transactions that are tried
again."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    check_flag,
    check_session_maker,
    check_transactional,
    new_session,
    shown,
    sync_session_of,
)
from pgtoolset._cancellation import uninterrupted
from pgtoolset._lifecycle import abandon, close
from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION, RETRYABLE, sqlstate_of
from pgtoolset._record import (
    Callback,
    aborted_by,
    hold,
    innermost,
    record_of,
    release,
    run_callbacks,
    undo_failed_release,
)
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import ManagedSession, SessionFactory, TransactionalSession

__all__ = ["IsolationLevel", "get_transaction", "on_commit", "run_transaction"]

IsolationLevel: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

S = TypeVar("S", bound=TransactionalSession)
M = TypeVar("M", bound=ManagedSession)
R = TypeVar("R")

#: Seconds: the longest pause before the second attempt; it doubles with each further one, up to the
#: limit.
BACKOFF_BASE = 0.02
BACKOFF_LIMIT = 1.0

_DEFAULTS = (False, None, None, None)

#: Callbacks of sessions that have no SQLAlchemy events, by the session's id: a list for each open
#: block of ours.
_waiting: dict[int, list[list[Callback]]] = {}


def get_transaction(
    session: S,
    *,
    durable: bool = False,
    isolation_level: IsolationLevel | None = None,
    read_only: bool | None = None,
    deferrable: bool | None = None,
) -> AbstractAsyncContextManager[S]:
    """A block that is one transaction, or, in a session that is already in one, one savepoint.

    The end of the block commits (releases) it, an exception rolls back exactly this level and
    propagates. No connection is checked out, and no SAVEPOINT sent, before the first statement of
    the block.

    Args:
        session: an `AsyncSession`, or any object that satisfies
            `pgtoolset.protocols.TransactionalSession`.
        durable: insist on being the outermost, so that the end of the block is a commit.
        isolation_level: `"READ COMMITTED"`, `"REPEATABLE READ"` or `"SERIALIZABLE"`; `None` leaves
            the default.
        read_only: `True` for READ ONLY, `False` for READ WRITE; `None` leaves the server's default.
        deferrable: `True` lets a SERIALIZABLE READ ONLY transaction wait for a safe snapshot;
            `None` leaves the default.

    Returns:
        An async context manager that yields `session`.

    Raises:
        TransactionStateError: `durable`, or any of the other options, in a session that is already
            in a transaction.
        TransactionAbortedError: the block ended well, but had swallowed an error that aborted it.
        ValueError, TypeError: an argument is not what it must be; before any SQL, like the first.

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
    if (
        isinstance(session, AsyncSession)
        and (durable, isolation_level, read_only, deferrable) == _DEFAULTS
    ):
        return _Block(session, False, {})
    check_transactional(session)
    check_flag("durable", durable)
    return _Block(session, durable, _options(isolation_level, read_only, deferrable))


def on_commit(session: TransactionalSession, callback: Callback) -> None:
    """Call `callback` once the outermost transaction that `session` is now in has committed.

    Callbacks run in the order of registration, before control returns to whoever committed: the end
    of a block or an explicit `commit()`. One whose own level (savepoint or transaction) rolls back
    is forgotten. One that raises is logged (logger `pgtoolset`) and does not stop the next: the
    transaction stays committed. A cancellation that arrives while they run is delivered when they
    have.

    Args:
        session: a session in a transaction.
        callback: a function, sync or async, without parameters. For SQL it opens a session of its
            own.

    A session of your own that runs callbacks after each of its commits, those of `commit()` and of
    `create_db_context` too, has a method `run_after_commit(callback)`; it is called in place of all
    this.

    Raises:
        TransactionStateError: the session is not in a transaction; or it is no SQLAlchemy session
            and its transaction was not opened by `get_transaction`, so that nobody would hear of
            the commit.
        TypeError: `callback` is not callable.

    Example:
        >>> async with get_transaction(session=session):
        ...     session.add(order)
        ...     on_commit(session, lambda: events.publish("order placed"))
    """
    check_transactional(session)
    if not callable(callback):
        raise TypeError(f"callback must be callable, not {shown(callback)}")
    sync = sync_session_of(session)
    if sync is None:
        hook = getattr(session, "run_after_commit", None)
        if callable(hook):
            hook(callback)
            return
        waiting = _waiting.get(id(session))
        if waiting is None:
            raise TransactionStateError(
                f"on_commit needs a transaction that get_transaction opened: {session!r} is not in one"
            )
        waiting[-1].append(callback)
        return
    level = innermost(sync)
    if level is None:
        raise TransactionStateError(
            "on_commit needs a session in a transaction, and this one is not in one; "
            "register the callback inside get_transaction() or after session.begin()"
        )
    record_of(sync).callbacks.append((level, callback))


async def run_transaction(
    session_maker: SessionFactory[M],
    work: Callable[[M], Awaitable[R]],
    *,
    attempts: int = 5,
    isolation_level: IsolationLevel | None = None,
    read_only: bool | None = None,
) -> R:
    """Run `work(session)` as one transaction, and again from the start where PostgreSQL asks for
    that.

    A serialization failure (SQLSTATE 40001) or a deadlock (40P01), in the work or at the commit,
    rolls back and tries again in a new session after a random pause of up to 0.02 s, 0.04 s, 0.08
    s, ..., 1 s (exponential backoff with full jitter). Any other error propagates at once, and so
    does the last one. An error at the commit that leaves its outcome unknown, such as a lost
    connection, is not tried again.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions.
        work: an async function of one session. It may run several times, so everything that it does
            outside the database must bear that: put it into `on_commit`.
        attempts: how often to try at the most, at least 1.
        isolation_level: as in `get_transaction`.
        read_only: as in `get_transaction`.

    Returns:
        What `work` returned in the attempt that was committed.

    Raises:
        ValueError, TypeError: an argument is not what it must be, before any SQL.

    Example:
        >>> async def withdraw(session: AsyncSession) -> int:
        ...     account = await session.get_one(Account, 1)
        ...     account.balance -= 10
        ...     return account.balance
        >>> balance = await run_transaction(session_maker, withdraw, isolation_level="SERIALIZABLE")

    See https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
    """
    check_session_maker(session_maker)
    if not callable(work):
        raise TypeError(f"work must be an async function of one session, not {work!r}")
    if isinstance(attempts, bool) or not isinstance(attempts, int):
        raise TypeError(f"attempts must be an int, not {attempts!r}")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, not {attempts}")
    _options(isolation_level, read_only, None)
    attempt = 1
    while True:
        session = new_session(session_maker)
        try:
            async with get_transaction(
                session, isolation_level=isolation_level, read_only=read_only
            ):
                result = work(session)
                if not inspect.isawaitable(result):
                    raise TypeError(
                        f"work must be an async function, but {work!r} returned {result!r}"
                    )
                return await result
        except Exception as error:
            if attempt >= attempts or sqlstate_of(error) not in RETRYABLE:
                raise
        finally:
            await close(session)
        await asyncio.sleep(
            random.uniform(0, min(BACKOFF_LIMIT, BACKOFF_BASE * 2 ** (attempt - 1)))
        )
        attempt += 1


class _Block(AbstractAsyncContextManager[S]):
    """Chooses, when it is entered, what kind of block it is."""

    __slots__ = ("_block", "_durable", "_options", "_session")

    _block: AbstractAsyncContextManager[Any]

    def __init__(self, session: S, durable: bool, options: dict[str, Any]) -> None:
        self._session = session
        self._durable = durable
        self._options = options

    async def __aenter__(self) -> S:
        session = self._session
        sync = sync_session_of(session)
        nested = session.in_transaction()
        if nested and (self._durable or self._options):
            given = ["durable"] if self._durable else list(self._options)
            raise TransactionStateError(
                f"{', '.join(given)}: only an outermost transaction can have that, and the session is already in a "
                "transaction; leave it first, or open another session"
            )
        if sync is None:
            if self._options:
                raise TypeError(
                    f"{', '.join(self._options)}: only an AsyncSession has that, not {session!r}"
                )
            self._block = _block_of_any_session(session, nested)
        elif nested:
            self._block = _Savepoint(session, sync)
        else:
            self._block = _outermost(session, sync, self._options)
        await self._block.__aenter__()
        return session

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._block.__aexit__(exc_type, exc, traceback)


@asynccontextmanager
async def _outermost(session: Any, sync: Session, options: dict[str, Any]) -> AsyncIterator[Any]:
    held = hold(sync)
    try:
        # The lazy half of `AsyncSession.begin()`: it does no I/O, so it needs no greenlet.
        sync.begin()
        if options:
            await _set_options(session, options)
        yield session
        if sync.in_transaction():
            await session.commit()
    except BaseException:
        await abandon(session)
        raise
    finally:
        if held:
            release(sync)


class _Savepoint(AbstractAsyncContextManager[None]):
    """A class rather than a generator: entering and leaving it is on the path of every nested
    block."""

    __slots__ = ("_block", "_level", "_record", "_sync")

    def __init__(self, session: Any, sync: Session) -> None:
        self._sync = sync
        self._record = record_of(sync)
        self._block = session.begin_nested()

    async def __aenter__(self) -> None:
        await self._block.__aenter__()
        self._level = innermost(self._sync)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            await self._block.__aexit__(exc_type, exc, traceback)
            return
        swallowed, level = self._record.error, self._level
        if level is not None and not level.is_active and level is innermost(self._sync):
            # A flush failed, and SQLAlchemy has rolled back to the savepoint already.
            failure = aborted_by(getattr(level, "_rollback_exception", None) or swallowed)
            await self._block.__aexit__(type(failure), failure, None)
            raise failure
        try:
            await self._block.__aexit__(None, None, None)
        except DBAPIError as error:
            if sqlstate_of(error) != IN_FAILED_SQL_TRANSACTION:
                raise
            await greenlet_spawn(undo_failed_release, self._record)
            raise aborted_by(swallowed or error) from (swallowed or error)


@asynccontextmanager
async def _block_of_any_session(session: TransactionalSession, nested: bool) -> AsyncIterator[Any]:
    waiting = _waiting.get(id(session)) if nested else _waiting.setdefault(id(session), [])
    own: list[Callback] = []
    if waiting is not None:
        waiting.append(own)
    try:
        async with session.begin_nested() if nested else session.begin():
            yield session
    finally:
        if waiting is not None:
            waiting.pop()
        if not nested:
            # A block inside, after a commit(), was an outermost one too.
            _waiting.pop(id(session), None)
    if own and nested and waiting:
        waiting[-1].extend(own)
    elif own:
        await uninterrupted(run_callbacks(own))


_EXECUTION_OPTIONS = {
    "isolation_level": "isolation_level",
    "read_only": "postgresql_readonly",
    "deferrable": "postgresql_deferrable",
}
_SET_TRANSACTION = {
    "read_only": "SET TRANSACTION READ WRITE",
    "deferrable": "SET TRANSACTION NOT DEFERRABLE",
}


def _options(isolation_level: object, read_only: object, deferrable: object) -> dict[str, Any]:
    """The options that were given, checked, by the names of the arguments."""
    levels = get_args(IsolationLevel)
    if isolation_level is not None and isolation_level not in levels:
        raise ValueError(
            f"isolation_level must be one of {', '.join(levels)}, not {isolation_level!r}"
        )
    options = {"isolation_level": isolation_level, "read_only": read_only, "deferrable": deferrable}
    for name in ("read_only", "deferrable"):
        if options[name] is not None:
            check_flag(name, options[name])
    return {name: value for name, value in options.items() if value is not None}


async def _set_options(session: Any, options: dict[str, Any]) -> None:
    await session.connection(
        execution_options={_EXECUTION_OPTIONS[name]: value for name, value in options.items()}
    )
    for name, statement in _SET_TRANSACTION.items():
        # The driver says READ ONLY and DEFERRABLE in its BEGIN, but it has no way to say the
        # opposite.
        if options.get(name) is False:
            await session.execute(text(statement))
