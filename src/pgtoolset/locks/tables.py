"""`lock_tables`: table locks for a block, in one global order and within one budget of time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import Connection, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._arguments import (
    check_flag,
    check_mode,
    milliseconds,
    optional_seconds,
    sync_session,
    tables_of,
)
from pgtoolset._postgres.locks import (
    isolation_level_of,
    lock_block,
    lock_statement,
    refuse_autocommit,
    sessions_holding,
)
from pgtoolset._postgres.lookout import Lookout, Wanted
from pgtoolset._postgres.tables import bind_arguments_of, qualified_names, translation_of
from pgtoolset.locks._block import LockedBlock
from pgtoolset.protocols import TransactionalSession
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
    """Open a `get_transaction` block that holds `mode` on all of `tables`.

    Outermost, the locks end with the block. Nested, PostgreSQL holds them until the outermost
    transaction ends or this level rolls back. All callers take their locks in one order, so two
    that name the same tables never deadlock on them. `lock_timeout` has its earlier value when the
    block starts, and after a failure.

    Lock first, read afterwards. Under REPEATABLE READ and SERIALIZABLE the first query takes the
    snapshot, and a snapshot from before the lock does not show what the earlier holder has written.
    As the first statement of such a transaction, which `get_transaction(session,
    isolation_level=...)` begins, this function takes no snapshot.

    Args:
        session: an `AsyncSession`.
        tables: mapped classes and `Table` objects. A class locks every table that it maps.
        mode: a `LockMode`, its value or its name, in any case.
        timeout: how long to wait for all the tables together: seconds, a `timedelta`, or a number
            with a unit of PostgreSQL's settings such as `"500ms"`. `None` waits without limit.
        nowait: do not wait at all.

    Returns:
        An async context manager that yields `session`.

    Raises:
        LockTimeoutError: a lock could not be acquired in time; the error names the blockers. The
            transaction around the block is still usable. Errors of the block itself are never
            translated.
        TransactionStateError: the session's connection is in AUTOCOMMIT, where a lock would end
            with its own statement.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

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
    seconds = optional_seconds("timeout", timeout)
    if nowait:
        seconds = 0
    bind_arguments = bind_arguments_of("tables", sync, targets)
    locks = _TableLocks(targets, lock_mode, seconds)

    def take(lookout: Lookout) -> S:
        connection = sync.connection(bind_arguments=bind_arguments)
        refuse_autocommit(connection)
        translation = translation_of(sync, connection)
        locks.names = qualified_names(targets, connection.dialect, translation)
        lookout.watch(connection, locks.wanted())
        locks.take(connection)
        return session

    return LockedBlock(session, take, seconds, holders=locks.holders)


@dataclass(slots=True)
class _TableLocks:
    """The table locks of one call.

    Attributes:
        timeout: in seconds, for all of them; 0 does not wait, `None` waits without limit.
        names: the quoted and qualified names of the tables, once there is a connection.
    """

    tables: Sequence[Table]
    mode: LockMode
    timeout: float | None
    names: list[str] = field(default_factory=list)

    def wanted(self) -> Wanted:
        """Describe the locks for an error."""
        action = f"lock {', '.join(self.names)} in {self.mode.value} mode"
        return Wanted(action, self.names, self.mode.value)

    async def holders(self, outside: AsyncConnection, pid: int) -> list[Blocker]:
        """Return the sessions other than `pid` that hold conflicting locks."""
        return await sessions_holding(outside, self.names, self.mode, but=pid)

    def take(self, connection: Connection) -> None:
        """Take the locks, as few statements as the isolation level allows."""
        if self.timeout == 0:
            connection.exec_driver_sql(lock_statement(self.names, self.mode, nowait=True))
        elif isolation_level_of(connection) == "READ COMMITTED":
            limit = milliseconds(self.timeout)
            connection.exec_driver_sql(lock_block(self.names, self.mode, limit))
        else:
            self._take_without_snapshot(connection)

    def _take_without_snapshot(self, connection: Connection) -> None:
        """Take the locks by statements that take no snapshot; a DO block takes one as it starts."""
        earlier = str(connection.exec_driver_sql("SHOW lock_timeout").scalar_one())
        if self.timeout is None:
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
            connection.exec_driver_sql(lock_statement(self.names, self.mode))
        else:
            # PostgreSQL counts the setting for each lock separately.
            ends = time.monotonic() + self.timeout
            for name in self.names:
                left = milliseconds(max(0.0, ends - time.monotonic()))
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {left}")
                connection.exec_driver_sql(lock_statement([name], self.mode))
        # SHOW returns a number and a unit, "5s", which needs quotes.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{earlier}'")
