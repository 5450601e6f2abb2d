"""`lock_rows`: row locks in the order of the keys, and the rows as they were locked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    Select,
    Table,
    Text,
    cast,
    literal_column,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Mapper

from pgtoolset._arguments import (
    PrimaryKey,
    check_flag,
    check_mode,
    mapper_of,
    optional_seconds,
    parse_keys,
    sync_session,
)
from pgtoolset._arguments import milliseconds as to_milliseconds
from pgtoolset._lifecycle import abandon
from pgtoolset._postgres.arrays import among
from pgtoolset._postgres.locks import isolation_level_of, sessions_owning
from pgtoolset._postgres.lookout import Lookout
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE, QUERY_CANCELED, sqlstate_of
from pgtoolset.errors import LockTimeoutError, TransactionStateError
from pgtoolset.transactions import get_transaction
from pgtoolset.types import Duration, PrimaryKeys, RowLockModeSpelling
from pgtoolset.values import Blocker, RowLockMode

__all__ = ["lock_rows"]

M = TypeVar("M")

_STRENGTH: dict[RowLockMode, dict[str, bool]] = {
    RowLockMode.UPDATE: {},
    RowLockMode.NO_KEY_UPDATE: {"key_share": True},
    RowLockMode.SHARE: {"read": True},
    RowLockMode.KEY_SHARE: {"read": True, "key_share": True},
}

#: `lock_timeout` counts for each row anew, so the statement as a whole is limited too, a little
#: later: where a single row is in the way, the more telling error comes first. A shorter
#: `statement_timeout` of the caller's stays.
_LIMIT = text("""
SELECT current_setting('lock_timeout') AS lock, current_setting('statement_timeout') AS statement,
       set_config('lock_timeout', :lock, true),
       set_config('statement_timeout', CASE
           WHEN CAST(current_setting('statement_timeout') AS interval) > CAST('0' AS interval)
            AND CAST(current_setting('statement_timeout') AS interval) < CAST(CAST(:statement AS text) AS interval)
           THEN current_setting('statement_timeout') ELSE CAST(:statement AS text) END, true)
""")
_RESTORE = text(
    "SELECT set_config('lock_timeout', :lock, true), set_config('statement_timeout', :statement, true)"
)
_PATIENCE = 1.2

_MEMBERS = text(
    "SELECT CAST(xid AS text) FROM pg_get_multixact_members(CAST(CAST(:xid AS text) AS xid))"
)


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
    """Lock rows in the order of their keys until the transaction ends, and return them with the
    values as locked.

    Two callers that lock the same rows never deadlock on them, whatever order they name them in.
    Pending changes of the session are flushed first, so none is overwritten. In a session without a
    transaction it begins one, as any query does.

    Args:
        session: an `AsyncSession`.
        model: the mapped class.
        pks: primary keys: scalars, or tuples in the mapper's order for a composite one.
        mode: a `RowLockMode`, its value or its name, in any case.
        skip_locked: leave out what somebody else has locked.
        nowait: do not wait at all.
        timeout: what all the rows together may be waited for: seconds, a `timedelta`, or a number
            with a unit such as `"500ms"`. `None` leaves that to the connection's `lock_timeout`,
            which by default is for ever.

    Returns:
        The instances in key order. A row that does not exist, or was skipped, is not among them.

    Raises:
        LockTimeoutError: a row was not to be had in time; it names who was in the way. With
            `timeout` or `nowait` the transaction is still usable.
        TransactionStateError: the session's connection is in AUTOCOMMIT, where a lock would be gone
            at once.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

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
        raise ValueError("skip_locked and nowait exclude each other")
    milliseconds = None if nowait else to_milliseconds(optional_seconds("timeout", timeout))
    if nowait:
        optional_seconds("timeout", timeout)
    if not keys:
        return []
    statement = _statement(mapper, lock_mode, skip_locked, nowait)
    request = _Request(mapper, keys, lock_mode, 0 if nowait else milliseconds, statement)
    if session.in_transaction() and (nowait or milliseconds is not None):
        # PostgreSQL keeps the locks of a savepoint that is released.
        async with get_transaction(session):
            return await request.run(session)
    fresh = not session.in_transaction()
    try:
        return await request.run(session)
    except LockTimeoutError:
        if fresh:
            await abandon(session)
        raise


class _Request:
    """What is wanted of which rows."""

    __slots__ = ("_keys", "_mapper", "_milliseconds", "_mode", "_statement")

    def __init__(
        self,
        mapper: Mapper[Any],
        keys: list[PrimaryKey],
        mode: RowLockMode,
        milliseconds: int | None,
        statement: Select[Any],
    ) -> None:
        self._mapper = mapper
        self._keys = keys
        self._mode = mode
        self._milliseconds = milliseconds
        self._statement = statement

    async def run(self, session: Any) -> Sequence[Any]:
        await session.flush()
        connection: AsyncConnection = await session.connection(
            bind_arguments={"mapper": self._mapper}
        )
        assert connection.sync_connection is not None
        if isolation_level_of(connection.sync_connection) == "AUTOCOMMIT":
            raise TransactionStateError(
                "a row lock lasts until the transaction ends, and in AUTOCOMMIT that is at once; "
                "use a session of an engine that is not in AUTOCOMMIT"
            )
        seconds = None if self._milliseconds is None else self._milliseconds / 1000
        earlier: dict[str, Any] | None = None
        if self._milliseconds:
            limits = {
                "lock": f"{self._milliseconds}ms",
                "statement": f"{round(self._milliseconds * _PATIENCE)}ms",
            }
            row = (await connection.execute(_LIMIT, limits)).one()
            earlier = {"lock": row.lock, "statement": row.statement}
        async with Lookout(seconds, self._owners(session)) as lookout:
            lookout.watch(connection.sync_connection)
            try:
                result = await session.scalars(
                    self._statement,
                    _parameters(self._keys),
                    execution_options={"populate_existing": True},
                )
                rows: Sequence[Any] = result.unique().all()
            except DBAPIError as error:
                if not self._is_timeout(error, lookout.waited):
                    raise
                table = self._mapper.local_table
                name = table.fullname if isinstance(table, Table) else str(table)
                what = f"lock {len(self._keys)} row{'s' * (len(self._keys) != 1)} of {name} in {self._mode.value} mode"
                raise await lookout.timed_out(what, tables=[name], mode=self._mode.value) from error
        if earlier is not None:
            await connection.execute(_RESTORE, earlier)
        return rows

    def _is_timeout(self, error: DBAPIError, waited: float) -> bool:
        sqlstate = sqlstate_of(error)
        if sqlstate == QUERY_CANCELED and self._milliseconds:
            return waited >= self._milliseconds / 1000
        return sqlstate == LOCK_NOT_AVAILABLE

    def _owners(self, session: Any) -> Any:
        """Asks whose transactions have locked or changed the rows: the system column `xmax`
        tells."""
        table = self._mapper.primary_key[0].table
        rows = (
            select(cast(literal_column("xmax"), Text))
            .select_from(table)
            .where(among(_columns(self._mapper)))
        )
        options = getattr(session.sync_session, "execution_options", None) or {}

        async def owners(outside: AsyncConnection, pid: int) -> list[Blocker]:
            translation = options.get("schema_translate_map")
            if translation is not None:
                outside = await outside.execution_options(schema_translate_map=translation)
            xids = [
                xid for xid in await outside.scalars(rows, _parameters(self._keys)) if xid != "0"
            ]
            found = await sessions_owning(outside, xids, but=pid)
            if not found:
                members: list[str] = []
                for xid in dict.fromkeys(xids):
                    members += await _members(outside, xid)
                found = await sessions_owning(outside, members, but=pid)
            return found

        return owners


async def _members(outside: AsyncConnection, xid: str) -> list[str]:
    """Several transactions that share a row lock stand in `xmax` as one number; what it means, a
    function tells."""
    try:
        return list(await outside.scalars(_MEMBERS, {"xid": xid}))
    except DBAPIError:  # it is the number of a transaction, and one that has ended
        return []


def _columns(mapper: Mapper[Any]) -> dict[str, Any]:
    """The columns of the primary key, by the names of the parameters."""
    return {f"k{at}": column for at, column in enumerate(mapper.primary_key)}


def _parameters(keys: list[PrimaryKey]) -> dict[str, list[Any]]:
    return {f"k{at}": list(values) for at, values in enumerate(zip(*keys, strict=True))}


def _statement(
    mapper: Mapper[Any],
    mode: RowLockMode,
    skip_locked: bool,
    nowait: bool,
) -> Select[Any]:
    # Without OF, PostgreSQL would try to lock what is joined for eager loading too, and refuses to.
    return (
        select(mapper)
        .where(among(_columns(mapper)))
        .order_by(*mapper.primary_key)
        .with_for_update(
            of=list(mapper.tables), skip_locked=skip_locked, nowait=nowait, **_STRENGTH[mode]
        )
    )
