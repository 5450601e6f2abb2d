"""`lock_rows`: row locks in the order of the keys, and the rows with the values as locked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import ColumnClause, Connection, Dialect, Row, Select, Table, column, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Mapper
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    PrimaryKey,
    check_at_most_one,
    check_mode,
    mapper_of,
    milliseconds,
    optional_seconds,
    parse_keys,
    writable_session,
)
from pgtoolset._compatibility import execute_of
from pgtoolset._lifecycle import abandon
from pgtoolset._listeners import listen_to_errors
from pgtoolset._postgres.arrays import among
from pgtoolset._postgres.catalog import GT, as_text
from pgtoolset._postgres.locks import (
    refuse_autocommit,
    sessions_holding,
    sessions_holding_rows,
    sessions_owning,
)
from pgtoolset._postgres.lookout import FindHolders, Lookout, Wanted
from pgtoolset._postgres.sending import PUTS_BACK
from pgtoolset._postgres.sqlstates import UNDEFINED_COLUMN, sqlstate_of
from pgtoolset._postgres.tables import qualified_names, translation_of
from pgtoolset.errors import DeadlineExceededError, LockTimeoutError
from pgtoolset.transactions import get_transaction
from pgtoolset.types import Duration, PrimaryKeys, RowLockModeSpelling
from pgtoolset.values import Blocker, LockMode, RowLockMode

__all__ = ["lock_rows"]

M = TypeVar("M")
Translation: TypeAlias = Mapping[str | None, str | None]

#: The arguments of SQLAlchemy's `with_for_update` for each mode.
_STRENGTH: dict[RowLockMode, dict[str, bool]] = {
    RowLockMode.UPDATE: {},
    RowLockMode.NO_KEY_UPDATE: {"key_share": True},
    RowLockMode.SHARE: {"read": True},
    RowLockMode.KEY_SHARE: {"read": True, "key_share": True},
}

#: PostgreSQL counts `lock_timeout` for each row separately, so `statement_timeout` limits all the
#: rows together. A shorter `statement_timeout` of the caller's stays, and any where `:statement` is
#: NULL.
_LIMIT = text(f"""
SELECT e.lock, e.statement, pg_catalog.pg_backend_pid() AS pid,
       pg_catalog.set_config('lock_timeout', :lock, true),
       pg_catalog.set_config('statement_timeout', CASE
           WHEN CAST(:statement AS varchar) IS NULL
             OR CAST(e.statement AS interval) {GT} CAST('0' AS interval)
            AND CAST(CAST(:statement AS varchar) AS interval) {GT} CAST(e.statement AS interval)
           THEN e.statement ELSE CAST(:statement AS varchar) END, true)
FROM (SELECT pg_catalog.current_setting('lock_timeout') AS lock,
             pg_catalog.current_setting('statement_timeout') AS statement OFFSET 0) AS e
""").execution_options(**PUTS_BACK)
_RESTORE = text("""
SELECT pg_catalog.set_config('lock_timeout', :lock, true),
       pg_catalog.set_config('statement_timeout', :statement, true)
""").execution_options(**PUTS_BACK)

#: How much longer the statement may take than the wait for a single row: where one row is in the
#: way, the error of `lock_timeout` comes first, which says more.
_STATEMENT_SHARE = 1.2

#: NOWAIT and SKIP LOCKED are about rows: PostgreSQL still waits for the lock on the table. It has
#: no shorter limit than this for that.
_NO_WAIT = "1ms"

_MEMBERS = text("""
SELECT CAST(m.xid AS varchar)
FROM pg_catalog.pg_get_multixact_members(CAST(CAST(:xid AS varchar) AS pg_catalog.xid)) AS m
""")


async def lock_rows(
    session: AsyncSession,
    model: type[M],
    pks: PrimaryKeys,
    *,
    mode: RowLockModeSpelling = RowLockMode.UPDATE,
    skip_locked: bool = False,
    nowait: bool = False,
    timeout: Duration | None = None,
) -> Sequence[M]:
    """Lock rows until the transaction ends, and return them with the values as locked.

    PostgreSQL locks the rows in the order of their keys, so two callers that name the same rows
    never deadlock on them. Pending changes of the session are flushed first, so that none is
    overwritten. A session that is not in a transaction begins one, as any query does.

    Args:
        session: an `AsyncSession`.
        model: the mapped class.
        pks: primary keys: scalars, or tuples in the mapper's order or mappings for a composite key.
        mode: a `RowLockMode`, its value or its name, in any case.
        skip_locked: leave out the rows that another session has locked, and do not wait at all.
        nowait: do not wait at all. As with `skip_locked`, a lock on the whole table, or an ALTER
            TABLE that waits for one, is an error at once.
        timeout: how long to wait for all the rows together: seconds, a `timedelta`, or a number
            with a unit such as `"500ms"`. `None` leaves that to the connection's `lock_timeout`;
            PostgreSQL's default waits without limit.

    Returns:
        The instances in the order of their keys, without rows that do not exist or were skipped.

    Raises:
        LockTimeoutError: a row, or the table, could not be locked in time; the error names the
            blockers. With `timeout`, `nowait` or `skip_locked` the transaction is still usable.
        TransactionStateError: the session's connection is in AUTOCOMMIT, where a lock would end
            with its own statement.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

    Example:
        >>> for account in await lock_rows(session, Account, [2, 1], timeout="500ms"):
        ...     account.balance -= 10

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-ROWS
    """
    writable_session(session, "lock_rows")
    mapper = mapper_of(model)
    keys = parse_keys("pks", mapper, pks)
    lock_mode = check_mode(RowLockMode, mode)
    check_at_most_one(skip_locked=skip_locked, nowait=nowait)
    seconds = optional_seconds("timeout", timeout)
    if not keys:
        return []
    statement = _statement(mapper, lock_mode, skip_locked, nowait)
    locks = _RowLocks(mapper, keys, lock_mode, 0 if nowait or skip_locked else seconds, statement)
    return await _take(session, locks)


async def _take(session: Any, locks: _RowLocks) -> Sequence[Any]:
    """Take the locks so that a failure leaves the session as it was."""
    if not session.in_transaction():
        try:
            return await locks.take(session)
        except (LockTimeoutError, DeadlineExceededError):
            await abandon(session)
            raise
    if locks.timeout is None:
        return await locks.take(session)
    # PostgreSQL keeps the locks of a savepoint that is released.
    async with get_transaction(session):
        return await locks.take(session)


@dataclass(frozen=True, slots=True)
class _RowLocks:
    """The row locks of one call.

    Attributes:
        timeout: in seconds, for all of them; 0 does not wait, `None` sets no limit.
        statement: selects the rows for update; its parameters are the keys.
    """

    mapper: Mapper[Any]
    keys: list[PrimaryKey]
    mode: RowLockMode
    timeout: float | None
    statement: Select[Any]

    async def take(self, session: Any) -> Sequence[Any]:
        """Lock the rows and return the instances."""
        await session.flush()
        # Where the session sends the statement itself.
        connection: AsyncConnection = await session.connection(
            bind_arguments={"mapper": self.mapper, "clause": self.statement}
        )
        assert connection.sync_connection is not None
        refuse_autocommit(connection.sync_connection)
        listen_to_errors(connection.sync_connection)
        return await self._select(session, connection, connection.sync_connection)

    async def _set_limits(self, connection: AsyncConnection, timeout: float) -> Row[Any]:
        """Set the timeouts in the transaction, and return the earlier ones."""
        limits: dict[str, str | None] = {"lock": _NO_WAIT, "statement": None}
        if timeout:
            limits = {
                "lock": f"{milliseconds(timeout)}ms",
                "statement": f"{milliseconds(timeout * _STATEMENT_SHARE)}ms",
            }
        return (await connection.execute(_LIMIT, limits)).one()

    async def _select(
        self, session: Any, connection: AsyncConnection, sync: Connection
    ) -> Sequence[Any]:
        translation = translation_of(session.sync_session, sync)
        names = self._names(sync.dialect, translation)
        async with Lookout(
            self.timeout, holders=self._holders(names, translation), limits_statement=True
        ) as lookout:
            limit = lookout.limit()
            earlier = None
            if self.timeout is not None and limit is not None:
                earlier = await self._set_limits(connection, limit)
            pid = None if earlier is None else earlier.pid
            await greenlet_spawn(partial(lookout.watch, sync, self._wanted(names), pid=pid))
            result = await execute_of(session)(
                self.statement,
                _parameters(self.keys),
                execution_options={"populate_existing": True},
            )
            rows: Sequence[Any] = result.scalars().unique().all()
            if earlier is not None:
                # The limit holds for this statement too: a timeout here is one of the lock.
                limits = {"lock": earlier.lock, "statement": earlier.statement}
                await connection.execute(_RESTORE, limits)
        return rows

    def _wanted(self, names: Sequence[str]) -> Wanted:
        rows = f"{len(self.keys)} row{'s' * (len(self.keys) != 1)}"
        action = f"lock {rows} of {names[0]} in {self.mode.value} mode"
        return Wanted(action, names[:1], self.mode.value, "rows")

    def _names(self, dialect: Dialect, translation: Translation) -> list[str]:
        """Return the qualified names of the tables, that of the model first."""
        tables = [self.mapper.local_table, *self.mapper.tables]
        return [
            name
            for table in dict.fromkeys(tables)
            for name in (
                qualified_names([table], dialect, translation)
                if isinstance(table, Table)
                else [str(table)]
            )
        ]

    def _holders(self, names: Sequence[str], translation: Translation) -> FindHolders:
        """Return a function that finds the sessions which have locked or changed the rows."""

        async def holders(outside: AsyncConnection, pid: int | None) -> list[Blocker]:
            found = await sessions_holding(outside, names, LockMode.ROW_SHARE, but=pid)
            if found:  # a query of the rows would wait for them
                return found
            outside = await outside.execution_options(schema_translate_map=translation)
            try:
                return await self._owners(outside, pid)
            except DBAPIError as error:
                if sqlstate_of(error) != UNDEFINED_COLUMN:
                    raise
            # A view has no system columns, so nothing tells which of its rows are locked.
            return await sessions_holding_rows(outside, names, but=pid)

        return holders

    async def _owners(self, outside: AsyncConnection, pid: int | None) -> list[Blocker]:
        """Return the sessions that have locked, changed or deleted the rows."""
        result = await outside.execute(_lockers(self.mapper), _parameters(self.keys))
        found = dict.fromkeys(xid for row in result for xid in row)
        xids = [xid for xid in found if xid not in ("0", None)]
        owners = await sessions_owning(outside, xids, but=pid)
        if owners:
            return owners
        members = [member for xid in xids for member in await _members(outside, xid)]
        return await sessions_owning(outside, members, but=pid)


def _lockers(mapper: Mapper[Any]) -> Select[Any]:
    """Select the transactions that have locked, changed or deleted the rows, in every table."""
    lockers: list[Any] = []
    for table in mapper.tables:
        xmax: ColumnClause[Any] = column("xmax")
        xmax.table = table
        lockers.append(as_text(xmax))
    lockers_of_all: Any = select(*lockers)
    statement: Select[Any] = lockers_of_all.select_from(mapper.persist_selectable)
    return statement.where(among(_columns(mapper)))


async def _members(outside: AsyncConnection, xid: str) -> list[str]:
    """Return the transactions that share a row lock: in `xmax` one number stands for them all."""
    try:
        return list(await outside.scalars(_MEMBERS, {"xid": xid}))
    except DBAPIError:  # the number is that of a single transaction, which has ended
        return []


def _columns(mapper: Mapper[Any]) -> dict[str, Any]:
    """Return the columns of the primary key, by the names of their parameters."""
    return {f"k{position}": column for position, column in enumerate(mapper.primary_key)}


def _parameters(keys: list[PrimaryKey]) -> dict[str, list[Any]]:
    """Return the values of each column of the keys, by the names of their parameters."""
    columns = zip(*keys, strict=True)
    return {f"k{position}": list(values) for position, values in enumerate(columns)}


def _statement(
    mapper: Mapper[Any], mode: RowLockMode, skip_locked: bool, nowait: bool
) -> Select[Any]:
    """Return the SELECT ... FOR UPDATE of the rows whose keys are its parameters."""
    statement = select(mapper).where(among(_columns(mapper))).order_by(*mapper.primary_key)
    # Without OF, PostgreSQL would also try to lock the outer joins of eager loading, and refuse to.
    return statement.with_for_update(
        of=list(mapper.tables), skip_locked=skip_locked, nowait=nowait, **_STRENGTH[mode]
    )
