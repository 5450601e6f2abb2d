"""`lock_tables`: table locks for a block, in one global order and within one budget of time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import Connection, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._arguments import (
    check_flag,
    check_mode,
    milliseconds,
    optional_seconds,
    tables_of,
    writable_session,
)
from pgtoolset._arguments import seconds as seconds_of
from pgtoolset._listeners import checkout_of
from pgtoolset._postgres.locks import (
    isolation_level_of,
    lock_block,
    lock_statement,
    sessions_holding,
)
from pgtoolset._postgres.lookout import Lookout, Wanted
from pgtoolset._postgres.sending import send
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of
from pgtoolset._postgres.tables import bind_arguments_of, qualified_names, translation_of
from pgtoolset.locks._block import LockedBlock
from pgtoolset.protocols import TransactionalSession
from pgtoolset.types import Duration, LockModeSpelling, TableTarget
from pgtoolset.values import Blocker, LockMode

__all__ = ["lock_tables"]

S = TypeVar("S", bound=TransactionalSession)

#: The settings that limit the wait.
_LIMITS = ("lock_timeout", "statement_timeout")

#: Seconds by which `statement_timeout` is longer, so that the error of `lock_timeout`, which says
#: more, comes first where a single lock is in the way.
_STATEMENT_SURPLUS = 0.02


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
    sync = writable_session(session, "lock_tables")
    targets = tables_of(tables)
    lock_mode = check_mode(LockMode, mode)
    check_flag("nowait", nowait)
    seconds = optional_seconds("timeout", timeout)
    if nowait:
        seconds = 0
    bind_arguments = bind_arguments_of("tables", sync, targets)
    locks = _TableLocks(targets, lock_mode, seconds)

    def connect() -> Connection:
        return sync.connection(bind_arguments=bind_arguments)

    def take(lookout: Lookout, connection: Connection) -> S:
        translation = translation_of(sync, connection)
        locks.names = qualified_names(targets, connection.dialect, translation)
        locks.timeout = lookout.limit()
        mark = lookout.watch(connection, locks.wanted(), marks=True)
        locks.take(connection, mark)
        checkout_of(connection).locks.append(f"a lock of lock_tables on {', '.join(locks.names)}")
        return session

    return LockedBlock(
        session, connect, take, seconds, holders=locks.holders, limits_statement=True
    )


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
    _spent: float = 0.0

    def wanted(self) -> Wanted:
        """Describe the locks for an error."""
        action = f"lock {', '.join(self.names)} in {self.mode.value} mode"
        return Wanted(action, self.names, self.mode.value, "tables")

    async def holders(self, outside: AsyncConnection, pid: int | None) -> list[Blocker]:
        """Return the sessions other than `pid` that hold conflicting locks."""
        return await sessions_holding(outside, self.names, self.mode, but=pid)

    def take(self, connection: Connection, mark: str) -> None:
        """Take the locks, as few statements as the isolation level allows.

        Args:
            connection: in a transaction.
            mark: a comment before the statement that may wait.
        """
        if self.timeout == 0:
            send(connection, mark + lock_statement(self.names, self.mode, nowait=True))
        elif isolation_level_of(connection) == "READ COMMITTED":
            limit = milliseconds(self.timeout)
            send(connection, mark + lock_block(self.names, self.mode, limit))
        elif not self._are_free(connection):
            self._wait_without_snapshot(connection, mark)

    def _are_free(self, connection: Connection) -> bool:
        """Take the locks if none has to be waited for, and return whether they are taken.

        A DO block would take a snapshot as it starts; plain statements take none.
        """
        began = time.monotonic()
        try:
            with connection.begin_nested():
                send(connection, lock_statement(self.names, self.mode, nowait=True))
        except DBAPIError as error:
            if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
                raise
            self._spent = time.monotonic() - began
            return False
        return True

    def _wait_without_snapshot(self, connection: Connection, mark: str) -> None:
        earlier = {name: str(send(connection, f"SHOW {name}").scalar_one()) for name in _LIMITS}
        limits = {"lock_timeout": "0"}
        if self.timeout is not None:
            # PostgreSQL counts `lock_timeout` for each lock separately, so `statement_timeout`
            # limits all of them together. A shorter one of the caller's stays.
            left = max(0.001, self.timeout - self._spent)
            limits["lock_timeout"] = f"{milliseconds(left)}ms"
            theirs = earlier["statement_timeout"]
            if theirs == "0" or seconds_of("statement_timeout", theirs) > left:
                limits["statement_timeout"] = f"{milliseconds(left + _STATEMENT_SURPLUS)}ms"
        _set(connection, limits)
        send(connection, mark + lock_statement(self.names, self.mode))
        _set(connection, {name: earlier[name] for name in limits})


def _set(connection: Connection, settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        send(connection, f"SET LOCAL {name} = '{value}'", puts_back=True)
