"""`lock_rows`: row locks in the order of the keys, and the rows with the values as locked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, Table, literal_column, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Mapper, Session

from pgtoolset._arguments import (
    PrimaryKey,
    check_flag,
    check_mode,
    mapper_of,
    milliseconds,
    optional_seconds,
    parse_keys,
    sync_session,
)
from pgtoolset._lifecycle import abandon
from pgtoolset._postgres.arrays import among
from pgtoolset._postgres.catalog import GT, as_text
from pgtoolset._postgres.locks import refuse_autocommit, sessions_owning
from pgtoolset._postgres.lookout import FindHolders, Lookout, Wanted
from pgtoolset._postgres.tables import options_of, qualified_names, translation_of
from pgtoolset.errors import LockTimeoutError
from pgtoolset.transactions import get_transaction
from pgtoolset.types import Duration, PrimaryKeys, RowLockModeSpelling
from pgtoolset.values import Blocker, RowLockMode

__all__ = ["lock_rows"]

M = TypeVar("M")

#: The arguments of SQLAlchemy's `with_for_update` for each mode.
_STRENGTH: dict[RowLockMode, dict[str, bool]] = {
    RowLockMode.UPDATE: {},
    RowLockMode.NO_KEY_UPDATE: {"key_share": True},
    RowLockMode.SHARE: {"read": True},
    RowLockMode.KEY_SHARE: {"read": True, "key_share": True},
}

#: PostgreSQL counts `lock_timeout` for each row separately, so `statement_timeout` limits all the
#: rows together. A shorter `statement_timeout` of the caller's stays.
_LIMIT = text(f"""
SELECT e.lock, e.statement, pg_catalog.set_config('lock_timeout', :lock, true),
       pg_catalog.set_config('statement_timeout', CASE
           WHEN CAST(e.statement AS interval) {GT} CAST('0' AS interval)
            AND CAST(CAST(:statement AS varchar) AS interval) {GT} CAST(e.statement AS interval)
           THEN e.statement ELSE CAST(:statement AS varchar) END, true)
FROM (SELECT pg_catalog.current_setting('lock_timeout') AS lock,
             pg_catalog.current_setting('statement_timeout') AS statement OFFSET 0) AS e
""")
_RESTORE = text("""
SELECT pg_catalog.set_config('lock_timeout', :lock, true),
       pg_catalog.set_config('statement_timeout', :statement, true)
""")

#: How much longer the statement may take than the wait for a single row: where one row is in the
#: way, the error of `lock_timeout` comes first, which says more.
_STATEMENT_SHARE = 1.2

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
        skip_locked: leave out the rows that another session has locked.
        nowait: do not wait at all.
        timeout: how long to wait for all the rows together: seconds, a `timedelta`, or a number
            with a unit such as `"500ms"`. `None` leaves that to the connection's `lock_timeout`;
            PostgreSQL's default waits without limit.

    Returns:
        The instances in the order of their keys, without rows that do not exist or were skipped.

    Raises:
        LockTimeoutError: a row could not be locked in time; the error names the blockers. With
            `timeout` or `nowait` the transaction is still usable.
        TransactionStateError: the session's connection is in AUTOCOMMIT, where a lock would end
            with its own statement.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

    Example:
        >>> for account in await lock_rows(session, Account, [2, 1], timeout="500ms"):
        ...     account.balance -= 10

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-ROWS
    """
    sync_session(session)
    mapper = mapper_of(model)
    keys = parse_keys("pks", mapper, pks)
    lock_mode = check_mode(RowLockMode, mode)
    check_flag("skip_locked", skip_locked)
    check_flag("nowait", nowait)
    if skip_locked and nowait:
        raise ValueError("skip_locked and nowait exclude each other; pass one of them")
    seconds = optional_seconds("timeout", timeout)
    if not keys:
        return []
    statement = _statement(mapper, lock_mode, skip_locked, nowait)
    locks = _RowLocks(mapper, keys, lock_mode, 0 if nowait else seconds, statement)
    return await _take(session, locks)


async def _take(session: Any, locks: _RowLocks) -> Sequence[Any]:
    """Take the locks so that a failure leaves the session as it was."""
    if not session.in_transaction():
        try:
            return await locks.take(session)
        except LockTimeoutError:
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
        earlier = await self._set_limits(connection)
        rows = await self._select(session, connection.sync_connection)
        if earlier is not None:
            await connection.execute(_RESTORE, earlier)
        return rows

    async def _set_limits(self, connection: AsyncConnection) -> dict[str, str] | None:
        """Set the timeouts in the transaction, and return the earlier ones; `None` if they stay."""
        if not self.timeout:
            return None
        limits = {
            "lock": f"{milliseconds(self.timeout)}ms",
            "statement": f"{milliseconds(self.timeout * _STATEMENT_SHARE)}ms",
        }
        row = (await connection.execute(_LIMIT, limits)).one()
        return {"lock": row.lock, "statement": row.statement}

    async def _select(self, session: Any, connection: Connection) -> Sequence[Any]:
        async with Lookout(
            self.timeout, holders=self._holders(session, connection), limits_statement=True
        ) as lookout:
            lookout.watch(connection, self._wanted(session.sync_session, connection))
            result = await session.scalars(
                self.statement,
                _parameters(self.keys),
                execution_options={"populate_existing": True},
            )
            rows: Sequence[Any] = result.unique().all()
        return rows

    def _wanted(self, session: Session, connection: Connection) -> Wanted:
        table = self.mapper.local_table
        name = str(table)
        if isinstance(table, Table):
            translation = translation_of(session, connection)
            (name,) = qualified_names([table], connection.dialect, translation)
        rows = f"{len(self.keys)} row{'s' * (len(self.keys) != 1)}"
        action = f"lock {rows} of {name} in {self.mode.value} mode"
        return Wanted(action, [name], self.mode.value)

    def _holders(self, session: Any, connection: Connection) -> FindHolders:
        """Return a function that finds the sessions which have locked or changed the rows."""
        options = options_of(session.sync_session, connection)

        async def holders(outside: AsyncConnection, pid: int) -> list[Blocker]:
            outside = await outside.execution_options(**options)
            # The system column xmax has the transaction that has locked, changed or deleted a row.
            xmax = select(as_text(literal_column("xmax"))).where(among(_columns(self.mapper)))
            xmax = xmax.select_from(self.mapper.primary_key[0].table)
            found = await outside.scalars(xmax, _parameters(self.keys))
            xids = [xid for xid in dict.fromkeys(found) if xid != "0"]
            owners = await sessions_owning(outside, xids, but=pid)
            if owners:
                return owners
            members = [member for xid in xids for member in await _members(outside, xid)]
            return await sessions_owning(outside, members, but=pid)

        return holders


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
