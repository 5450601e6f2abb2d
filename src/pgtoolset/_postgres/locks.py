"""The SQL of locks: taking them, and asking the server who holds them and who waits.

https://www.postgresql.org/docs/current/explicit-locking.html and
https://www.postgresql.org/docs/current/view-pg-locks.html
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.quoting import do_block, literal
from pgtoolset.values import Blocker, LockMode, LockWait

_M = LockMode

#: What each mode cannot be held together with by another session.
CONFLICTS: dict[LockMode, frozenset[LockMode]] = {
    _M.ACCESS_SHARE: frozenset({_M.ACCESS_EXCLUSIVE}),
    _M.ROW_SHARE: frozenset({_M.EXCLUSIVE, _M.ACCESS_EXCLUSIVE}),
    _M.ROW_EXCLUSIVE: frozenset(
        {_M.SHARE, _M.SHARE_ROW_EXCLUSIVE, _M.EXCLUSIVE, _M.ACCESS_EXCLUSIVE}
    ),
    _M.SHARE_UPDATE_EXCLUSIVE: frozenset(_M) - {_M.ACCESS_SHARE, _M.ROW_SHARE, _M.ROW_EXCLUSIVE},
    _M.SHARE: frozenset(_M) - {_M.ACCESS_SHARE, _M.ROW_SHARE, _M.SHARE},
    _M.SHARE_ROW_EXCLUSIVE: frozenset(_M) - {_M.ACCESS_SHARE, _M.ROW_SHARE},
    _M.EXCLUSIVE: frozenset(_M) - {_M.ACCESS_SHARE},
    _M.ACCESS_EXCLUSIVE: frozenset(_M),
}


def lock_names(mode: LockMode) -> list[str]:
    """The modes that conflict with `mode`, as `pg_locks` spells them."""
    return [other.value.title().replace(" ", "") + "Lock" for other in CONFLICTS[mode]]


def spelled_out(mode: str | None) -> str | None:
    """A mode of `pg_locks` (`AccessExclusiveLock`) as SQL spells it (`ACCESS EXCLUSIVE`)."""
    return (
        None if mode is None else re.sub(r"(?<!^)(?=[A-Z])", " ", mode.removesuffix("Lock")).upper()
    )


def isolation_level_of(connection: Connection) -> str | None:
    """The isolation level, or AUTOCOMMIT, as far as SQLAlchemy knows it without asking the
    server."""
    level = getattr(connection.connection.dbapi_connection, "isolation_level", None)
    level = level or connection.dialect.default_isolation_level
    return None if level is None else level.upper().replace("_", " ")


def backend_pid(connection: Connection) -> int:
    """The process id of the connection's backend, which the driver has known since it connected."""
    driver: Any = connection.connection.driver_connection
    return int(driver.get_server_pid())


def lock_block(names: Sequence[str], mode: LockMode, timeout: int) -> str:
    """One statement that locks all of `names` in this order and leaves `lock_timeout` as it was.

    `timeout`, in milliseconds, is the budget for all; 0 waits for ever. Where all are free they are
    had without touching the setting. Otherwise it is set: PostgreSQL counts `lock_timeout` for each
    lock anew, so for each it is what is left of the budget. A failure undoes the setting with the
    savepoint or transaction.
    """
    left = (
        f"ceil(1000 * EXTRACT(EPOCH FROM ends - pg_catalog.clock_timestamp()) + {timeout})"
        if timeout
        else "0"
    )
    body = f"""
DECLARE
 earlier text; name text; ends timestamptz;
BEGIN
 {lock_statement(names, mode, nowait=True)};
EXCEPTION WHEN lock_not_available THEN
 earlier := pg_catalog.current_setting('lock_timeout');
 ends := pg_catalog.clock_timestamp();
 FOREACH name IN ARRAY ARRAY[{", ".join(map(literal, names))}] LOOP
  PERFORM pg_catalog.set_config('lock_timeout', {f"GREATEST(1, {left})::int4::text" if timeout else "'0'"}, true);
  EXECUTE 'LOCK TABLE ' || name || ' IN {mode.value} MODE';
 END LOOP;
 PERFORM pg_catalog.set_config('lock_timeout', earlier, true);
END """
    return do_block(body)


def lock_statement(names: Sequence[str], mode: LockMode, *, nowait: bool = False) -> str:
    """The plain statement. Unlike a DO block it takes no snapshot."""
    return f"LOCK TABLE {', '.join(names)} IN {mode.value} MODE{' NOWAIT' if nowait else ''}"


#: pg_stat_activity hides the state, the query and the age of other roles' sessions, and shows a
#: sentence as the query.
_VISIBLE = "(pg_has_role('pg_read_all_stats', 'USAGE') OR coalesce(pg_has_role(a.usesysid, 'USAGE'), false))"

#: What sessions are doing, as a `Blocker` tells it; `pids` is a query for theirs.
ACTIVITY = f"""
SELECT b.pid, a.application_name, a.state, CASE WHEN {_VISIBLE} THEN a.query END AS query,
       clock_timestamp() - a.xact_start AS transaction_age
FROM (SELECT DISTINCT p.pid FROM ({{pids}}) AS p) AS b LEFT JOIN pg_stat_activity AS a ON a.pid = b.pid
ORDER BY a.xact_start, b.pid
"""
_BLOCKING = text(ACTIVITY.format(pids="SELECT unnest(pg_blocking_pids(:pid)) AS pid"))
_SESSIONS = text(ACTIVITY.format(pids="SELECT unnest(CAST(:pids AS int[])) AS pid"))
_HOLDERS = text(
    ACTIVITY.format(
        # Those who wait are in the way too: NOWAIT does not overtake them. A prepared transaction
        # has no pid.
        pids="""SELECT coalesce(l.pid, 0) AS pid FROM pg_locks AS l
            WHERE l.locktype = 'relation' AND l.pid IS DISTINCT FROM :pid AND l.mode = ANY(CAST(:modes AS text[]))
              AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
              AND l.relation IN (SELECT to_regclass(n)::oid FROM unnest(CAST(:names AS text[])) AS n)"""
    )
)
_OWNERS = text(
    ACTIVITY.format(
        pids="""SELECT coalesce(l.pid, 0) AS pid FROM pg_locks AS l
            WHERE l.locktype = 'transactionid' AND l.granted AND l.mode = 'ExclusiveLock'
              AND l.pid IS DISTINCT FROM :pid AND l.transactionid::text = ANY(CAST(:xids AS text[]))"""
    )
)

_WAITS = text(f"""
SELECT l.pid, pg_blocking_pids(l.pid) AS blocked_by,
       (SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname)
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.oid = coalesce(l.relation, (
            -- Who waits for a row waits for the transaction that has it, and holds the row's place in the queue.
            SELECT t.relation FROM pg_locks AS t
            WHERE t.pid = l.pid AND t.locktype = 'tuple' AND t.granted AND l.locktype = 'transactionid' LIMIT 1))
       ) AS relation,
       l.mode, clock_timestamp() - l.waitstart AS waiting_for, a.application_name,
       CASE WHEN {_VISIBLE} THEN a.query END AS query
FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE NOT l.granted AND a.datname = current_database()
ORDER BY l.waitstart, l.pid
""")

#: Within a transaction, pg_stat_activity shows what it was at the first look.
_LOOK_AGAIN = text("SELECT pg_stat_clear_snapshot()")


async def _blockers(connection: AsyncConnection, query: Any, **parameters: object) -> list[Blocker]:
    return [Blocker(*row) for row in await connection.execute(query, parameters)]


async def sessions_blocking(connection: AsyncConnection, pid: int) -> list[Blocker]:
    """Who is in the way of a backend that waits now."""
    return await _blockers(connection, _BLOCKING, pid=pid)


async def sessions_of(connection: AsyncConnection, pids: Sequence[int]) -> list[Blocker]:
    """What backends are doing, each as if it were in somebody's way."""
    return await _blockers(connection, _SESSIONS, pids=list(pids))


async def sessions_holding(
    connection: AsyncConnection, names: Sequence[str], mode: LockMode, *, but: int
) -> list[Blocker]:
    """Who has, or asks for, a lock on one of the tables that conflicts with `mode`."""
    return await _blockers(connection, _HOLDERS, names=list(names), modes=lock_names(mode), pid=but)


async def sessions_owning(
    connection: AsyncConnection, xids: Sequence[str], *, but: int
) -> list[Blocker]:
    """Whose transactions these are."""
    return await _blockers(connection, _OWNERS, xids=list(xids), pid=but)


async def waits(connection: Any) -> list[LockWait]:
    """Who waits for a lock in the database of `connection`, the longest wait first."""
    await connection.execute(_LOOK_AGAIN)
    rows = (await connection.execute(_WAITS)).all()
    return [
        LockWait(
            pid=row.pid,
            blocked_by=tuple(dict.fromkeys(row.blocked_by)),
            relation=row.relation,
            mode=spelled_out(row.mode),
            # The clock is read before the row of a session that begins to wait meanwhile.
            waiting_for=None if row.waiting_for is None else max(row.waiting_for, timedelta(0)),
            application_name=row.application_name,
            query=row.query,
        )
        for row in rows
    ]
