"""`lock_tables`: table locks for a block, taken in one global order under one budget of time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import check_flag, check_mode, optional_seconds, sync_session, tables_of
from pgtoolset._arguments import milliseconds as to_milliseconds
from pgtoolset._postgres.locks import (
    isolation_level_of,
    lock_block,
    lock_statement,
    sessions_holding,
)
from pgtoolset._postgres.lookout import Lookout
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of
from pgtoolset._postgres.tables import bind_arguments_of, qualified_names, translation_of
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import TransactionalSession
from pgtoolset.transactions import get_transaction
from pgtoolset.types import Duration, LockModeSpelling, TableTarget
from pgtoolset.values import Blocker, LockMode

__all__ = ["lock_tables"]

S = TypeVar("S", bound=TransactionalSession)


def lock_tables(
    session: S,
    tables: Iterable[TableTarget],
    *,
    mode: LockModeSpelling = LockMode.SHARE_UPDATE_EXCLUSIVE,
    timeout: Duration | None = "5s",
    nowait: bool = False,
) -> AbstractAsyncContextManager[S]:
    """A block that is a `get_transaction` and holds `mode` on all of `tables`.

    Outermost, the locks end with the block; nested, PostgreSQL holds them until the outermost
    transaction ends or this level rolls back. They are taken in one order whoever asks, so two
    callers that name the same tables never deadlock on them. `lock_timeout` has its earlier value
    when the block starts, and after a failure.

    Lock first, read afterwards: under REPEATABLE READ and SERIALIZABLE the snapshot is taken at the
    first query, and one that was taken before the lock does not show what the earlier holder has
    written. As the first statement of such a transaction, which `get_transaction(session,
    isolation_level=...)` begins, this takes no snapshot.

    Args:
        session: an `AsyncSession`.
        tables: mapped classes and `Table` objects. A class locks every table that it maps.
        mode: a `LockMode`, its value or its name, in any case.
        timeout: what all the tables together may be waited for: seconds, a `timedelta`, a number
            with a unit of PostgreSQL's settings such as `"500ms"`; `None` waits for ever.
        nowait: do not wait at all.

    Returns:
        An async context manager that yields `session`.

    Raises:
        LockTimeoutError: a lock was not to be had in time; it names who was in the way. The
            transaction around the block is still usable. Errors of the block itself are never
            translated.
        TransactionStateError: the session's connection is in AUTOCOMMIT, where a lock would be gone
            at once.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

    Example:
        >>> async with lock_tables(session, [Account], mode="EXCLUSIVE", timeout="2s"):
        ...     account = await session.get_one(Account, 1)
        ...     account.balance += 1

    See https://www.postgresql.org/docs/current/sql-lock.html and
    https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES
    """
    sync = sync_session(session)
    targets = tables_of(tables)
    lock_mode = check_mode(LockMode, mode)
    check_flag("nowait", nowait)
    milliseconds = to_milliseconds(optional_seconds("timeout", timeout))
    bind_arguments = bind_arguments_of(sync, targets)
    return _block(session, targets, lock_mode, 0 if nowait else milliseconds, bind_arguments)


@asynccontextmanager
async def _block(
    session: Any,
    tables: Sequence[Table],
    mode: LockMode,
    milliseconds: int | None,
    bind_arguments: dict[str, Any],
) -> AsyncIterator[Any]:
    async with get_transaction(session):
        await _acquire(session.sync_session, tables, mode, milliseconds, bind_arguments)
        yield session


async def _acquire(
    session: Session,
    tables: Sequence[Table],
    mode: LockMode,
    milliseconds: int | None,
    bind_arguments: dict[str, Any],
) -> None:
    """Take the locks, or raise `LockTimeoutError`. 0 milliseconds: without waiting."""
    names: list[str] = []

    async def holders(outside: AsyncConnection, pid: int) -> list[Blocker]:
        return await sessions_holding(outside, names, mode, but=pid)

    def take() -> None:
        connection = session.connection(bind_arguments=bind_arguments)
        isolation_level = isolation_level_of(connection)
        if isolation_level == "AUTOCOMMIT":
            raise TransactionStateError(
                "a table lock lasts until the transaction ends, and in AUTOCOMMIT that is at once; "
                "use a session of an engine that is not in AUTOCOMMIT"
            )
        names[:] = qualified_names(tables, connection.dialect, translation_of(session, connection))
        lookout.watch(connection)
        if milliseconds == 0:
            connection.exec_driver_sql(lock_statement(names, mode, nowait=True))
        elif isolation_level == "READ COMMITTED":
            connection.exec_driver_sql(lock_block(names, mode, milliseconds or 0))
        else:
            _lock_without_snapshot(connection, names, mode, milliseconds)

    async with Lookout(None if milliseconds is None else milliseconds / 1000, holders) as lookout:
        try:
            await greenlet_spawn(take)
        except DBAPIError as error:
            if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
                raise
            what = f"lock {', '.join(names)} in {mode.value} mode"
            raise await lookout.timed_out(what, tables=names, mode=mode.value) from error


def _lock_without_snapshot(
    connection: Connection, names: list[str], mode: LockMode, milliseconds: int | None
) -> None:
    """A statement for each step, of the kinds that take no snapshot. A DO block takes one before it
    starts to wait."""
    earlier = str(connection.exec_driver_sql("SHOW lock_timeout").scalar_one())
    if milliseconds is None:
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        connection.exec_driver_sql(lock_statement(names, mode))
    else:
        ends = time.monotonic() + milliseconds / 1000
        for name in names:
            left = max(1, round(1000 * (ends - time.monotonic())))
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {left}")
            connection.exec_driver_sql(lock_statement([name], mode))
    # A number and a unit, in the server's own words.
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{earlier}'")
