"""The SQL of locks: take them, and ask PostgreSQL which sessions hold them and which wait.

https://www.postgresql.org/docs/current/explicit-locking.html and
https://www.postgresql.org/docs/current/view-pg-locks.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.catalog import EQ, GT, MINUS, NE
from pgtoolset._postgres.drivers import driver_at
from pgtoolset._postgres.modes import carried_isolation_level
from pgtoolset._postgres.quoting import do_block, literal
from pgtoolset.errors import TransactionStateError
from pgtoolset.values import Blocker, LockMode, LockWait

_M = LockMode

#: How many texts of `lock_block` are kept.
_BLOCKS = 100

#: By lock mode: the modes that no other session can hold at the same time.
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
    """Return the modes that conflict with `mode`, as `pg_locks` spells them."""
    return [other.value.title().replace(" ", "") + "Lock" for other in CONFLICTS[mode]]


def mode_in_sql(mode: str | None) -> str | None:
    """Return a mode of `pg_locks` (`AccessExclusiveLock`) as in SQL (`ACCESS EXCLUSIVE`)."""
    if mode is None:
        return None
    return re.sub(r"(?<!^)(?=[A-Z])", " ", mode.removesuffix("Lock")).upper()


def isolation_level_of(connection: Connection) -> str | None:
    """Return the isolation level, or AUTOCOMMIT, as it is known without a statement."""
    pooled = connection.connection
    level = carried_isolation_level(connection)
    level = level or driver_at(pooled).isolation_level(pooled)
    level = level or connection.dialect.default_isolation_level
    return None if level is None else level.upper().replace("_", " ")


def refuse_autocommit(connection: Connection) -> None:
    """Raise `TransactionStateError` where each statement is a transaction of its own."""
    if isolation_level_of(connection) == "AUTOCOMMIT":
        raise TransactionStateError(
            "a lock ends with its transaction, and in AUTOCOMMIT that is the statement itself: "
            "use a session of an engine that is not in AUTOCOMMIT"
        )


def lock_block(names: Sequence[str], mode: LockMode, milliseconds: int | None) -> str:
    """Return one statement that locks `names` in this order and leaves `lock_timeout` as it was.

    Tables that are all free are locked without touching the setting. Otherwise a second block waits
    for them; it is text inside the first, so that PostgreSQL compiles it only then. After a failure
    the rollback to the savepoint, or of the transaction, restores the setting.

    Args:
        names: qualified and quoted.
        mode: the lock mode.
        milliseconds: the budget for all the tables together; `None` waits without limit.
    """
    return _lock_block(tuple(names), mode, milliseconds)


@lru_cache(maxsize=_BLOCKS)
def _lock_block(names: tuple[str, ...], mode: LockMode, milliseconds: int | None) -> str:
    return do_block(f"""
BEGIN
 {lock_statement(names, mode, nowait=True)};
EXCEPTION WHEN lock_not_available THEN
 EXECUTE {literal(_waiting_block(names, mode, milliseconds))};
END """)


def _waiting_block(names: Sequence[str], mode: LockMode, milliseconds: int | None) -> str:
    """Return a statement that locks the tables one by one.

    The setting is, for each table, the rest of the budget, because PostgreSQL counts `lock_timeout`
    for each lock separately.
    """
    if milliseconds is None:
        left = "'0'"
    else:
        # The deadline is computed once, and the rest of the time before each lock.
        now = "pg_catalog.clock_timestamp()"
        rest = f"EXTRACT(EPOCH FROM ends {MINUS} {now}) OPERATOR(pg_catalog.*) 1000"
        left = f"CAST(GREATEST(1, pg_catalog.ceil({rest})) AS integer)"
    return do_block(f"""
DECLARE
 earlier varchar := pg_catalog.current_setting('lock_timeout');
 ends timestamp with time zone := pg_catalog.clock_timestamp()
  OPERATOR(pg_catalog.+) CAST('{milliseconds or 0} ms' AS interval);
 name varchar;
BEGIN
 FOREACH name IN ARRAY ARRAY[{", ".join(map(literal, names))}] LOOP
  PERFORM pg_catalog.set_config('lock_timeout', CAST({left} AS varchar), true);
  EXECUTE pg_catalog.format('LOCK TABLE %s IN {mode.value} MODE', name);
 END LOOP;
 PERFORM pg_catalog.set_config('lock_timeout', earlier, true);
END """)


def lock_statement(names: Sequence[str], mode: LockMode, *, nowait: bool = False) -> str:
    """Return the plain statement, which takes no snapshot, unlike a DO block."""
    return f"LOCK TABLE {', '.join(names)} IN {mode.value} MODE{' NOWAIT' if nowait else ''}"


#: Whether this role may see the session `a`. Of other sessions pg_stat_activity hides the state and
#: the age, and shows a sentence in place of the query.
VISIBLE = (
    "(pg_catalog.pg_has_role('pg_read_all_stats', 'USAGE')"
    " OR coalesce(pg_catalog.pg_has_role(a.usesysid, 'USAGE'), false))"
)

#: The columns of a `Blocker`, for the sessions whose pids the query `pids` returns.
_ACTIVITY = f"""
SELECT b.pid, a.application_name, a.state, CASE WHEN {VISIBLE} THEN a.query END AS query,
       pg_catalog.clock_timestamp() {MINUS} a.xact_start AS transaction_age{{more}}
FROM ({{pids}}) AS b LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid {EQ} b.pid
ORDER BY a.xact_start, b.pid
"""
ACTIVITY = _ACTIVITY.format(pids="SELECT DISTINCT p.pid FROM ({pids}) AS p", more="")

# Arrays of oid and text, because asyncpg asks the server about the types of other arrays.
_BLOCKING = text(
    _ACTIVITY.format(
        pids="""SELECT blocking.pid,
                pg_catalog.array_agg(waiting.pid) AS waiters
            FROM pg_catalog.unnest(CAST(:pids AS pg_catalog.oid[])) AS waiting(pid),
                 pg_catalog.unnest(pg_catalog.pg_blocking_pids(CAST(waiting.pid AS integer)))
                    AS blocking(pid)
            GROUP BY blocking.pid""",
        more=", b.waiters",
    )
)
_SESSIONS = text(
    ACTIVITY.format(
        pids="""SELECT CAST(given.pid AS integer) AS pid
            FROM pg_catalog.unnest(CAST(:pids AS pg_catalog.oid[])) AS given(pid)"""
    )
)
#: LOCK TABLE and SELECT ... FOR UPDATE also lock the tables below a view, the partitions of a table
#: and those that inherit from it.
_LOCKED_TOO = f"""
WITH RECURSIVE locked(oid) AS (
    SELECT CAST(pg_catalog.to_regclass(n) AS pg_catalog.oid)
    FROM pg_catalog.unnest(CAST(:names AS pg_catalog.text[])) AS n
    UNION
    SELECT below.oid FROM locked, LATERAL (
        SELECT i.inhrelid AS oid FROM pg_catalog.pg_inherits AS i WHERE i.inhparent {EQ} locked.oid
        UNION ALL
        SELECT d.refobjid FROM pg_catalog.pg_rewrite AS r JOIN pg_catalog.pg_depend AS d
            ON d.objid {EQ} r.oid AND d.refobjid {NE} r.ev_class
           AND d.classid {EQ} CAST('pg_catalog.pg_rewrite' AS pg_catalog.regclass)
           AND d.refclassid {EQ} CAST('pg_catalog.pg_class' AS pg_catalog.regclass)
        WHERE r.ev_class {EQ} locked.oid AND r.rulename {EQ} '_RETURN'
    ) AS below
)
SELECT locked.oid FROM locked
"""
_HOLDERS = text(
    ACTIVITY.format(
        # Waiters block NOWAIT too, since it does not overtake them. A prepared transaction has no
        # pid.
        pids=f"""SELECT coalesce(l.pid, 0) AS pid FROM pg_catalog.pg_locks AS l
            WHERE l.locktype {EQ} 'relation' AND (l.pid {EQ} :pid) IS NOT TRUE
              AND l.mode {EQ} ANY(CAST(:modes AS pg_catalog.text[]))
              AND l.database {EQ} (SELECT d.oid FROM pg_catalog.pg_database AS d
                                   WHERE d.datname {EQ} pg_catalog.current_database())
              AND l.relation {EQ} ANY({_LOCKED_TOO})"""
    )
)
_OWNERS = text(
    ACTIVITY.format(
        pids=f"""SELECT coalesce(l.pid, 0) AS pid FROM pg_catalog.pg_locks AS l
            WHERE l.locktype {EQ} 'transactionid' AND l.granted AND l.mode {EQ} 'ExclusiveLock'
              AND (l.pid {EQ} :pid) IS NOT TRUE
              AND CAST(l.transactionid AS pg_catalog.text)
                  {EQ} ANY(CAST(:xids AS pg_catalog.text[]))"""
    )
)

_WAITS = text(f"""
SELECT l.pid, CAST(pg_catalog.pg_blocking_pids(l.pid) AS pg_catalog.text[]) AS blocked_by,
       (SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
        FROM pg_catalog.pg_class AS c
        JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
        WHERE c.oid {EQ} coalesce(l.relation, (
            -- A session that waits for a row waits for the transaction that has locked it. The
            -- first in the queue holds a lock on the row itself.
            SELECT t.relation FROM pg_catalog.pg_locks AS t
            WHERE t.pid {EQ} l.pid AND t.locktype {EQ} 'tuple' AND t.granted
              AND l.locktype {EQ} 'transactionid' LIMIT 1))
       ) AS relation,
       l.mode, pg_catalog.clock_timestamp() {MINUS} l.waitstart AS waiting_for, a.application_name,
       CASE WHEN {VISIBLE} THEN a.query END AS query
FROM pg_catalog.pg_locks AS l JOIN pg_catalog.pg_stat_activity AS a ON a.pid {EQ} l.pid
WHERE NOT l.granted AND a.datname {EQ} pg_catalog.current_database()
ORDER BY l.waitstart, l.pid
""")

#: Within a transaction pg_stat_activity stays as it was at the first query, until this is called.
_CLEAR_SNAPSHOT = text("SELECT pg_catalog.pg_stat_clear_snapshot()")


async def _blockers(connection: AsyncConnection, query: Any, **parameters: object) -> list[Blocker]:
    return [Blocker(*row) for row in await connection.execute(query, parameters)]


async def sessions_blocking(
    connection: AsyncConnection, pids: Sequence[int]
) -> Mapping[int, list[Blocker]]:
    """Return the sessions that block backends which wait now, by the pid of each that waits."""
    found: dict[int, list[Blocker]] = {pid: [] for pid in pids}
    for *blocker, waiters in await connection.execute(_BLOCKING, {"pids": list(found)}):
        for waiter in waiters:
            found[waiter].append(Blocker(*blocker))
    return found


_MARKED = text(f"""
SELECT a.pid FROM pg_catalog.pg_stat_activity AS a
WHERE a.pid {NE} pg_catalog.pg_backend_pid() AND pg_catalog.strpos(a.query, :mark) {GT} 0
""")


async def backend_marked(connection: AsyncConnection, mark: str) -> int | None:
    """Return the pid of the backend whose last statement has this mark; `None` if none is shown."""
    pid: int | None = await connection.scalar(_MARKED, {"mark": mark})
    return pid


async def sessions_of(connection: AsyncConnection, pids: Sequence[int]) -> list[Blocker]:
    """Return the sessions with these pids, and what each is doing."""
    return await _blockers(connection, _SESSIONS, pids=list(pids))


async def sessions_holding(
    connection: AsyncConnection, names: Sequence[str], mode: LockMode, *, but: int | None
) -> list[Blocker]:
    """Return the sessions that hold or want a lock on the tables which conflicts with `mode`.

    Args:
        connection: any connection to the database.
        names: of the tables and views.
        mode: the lock mode that was refused.
        but: the pid of the session that asked for it.
    """
    return await _blockers(connection, _HOLDERS, names=list(names), modes=lock_names(mode), pid=but)


async def sessions_holding_rows(
    connection: AsyncConnection, names: Sequence[str], *, but: int | None
) -> list[Blocker]:
    """Return the sessions that have locked or changed any rows of the tables."""
    modes = ["RowShareLock", "RowExclusiveLock"]
    return await _blockers(connection, _HOLDERS, names=list(names), modes=modes, pid=but)


async def sessions_owning(
    connection: AsyncConnection, xids: Sequence[str], *, but: int | None
) -> list[Blocker]:
    """Return the sessions whose transactions have these ids, except the one with the pid `but`."""
    return await _blockers(connection, _OWNERS, xids=list(xids), pid=but)


async def waits(connection: Any) -> list[LockWait]:
    """Return the sessions of the database that wait for a lock, the longest wait first."""
    await connection.execute(_CLEAR_SNAPSHOT)
    rows = (await connection.execute(_WAITS)).all()
    return [
        LockWait(
            pid=row.pid,
            blocked_by=tuple(dict.fromkeys(map(int, row.blocked_by))),
            relation=row.relation,
            mode=mode_in_sql(row.mode),
            # PostgreSQL reads the clock before the row of a session that has just begun to wait.
            waiting_for=None if row.waiting_for is None else max(row.waiting_for, timedelta(0)),
            application_name=row.application_name,
            query=row.query,
        )
        for row in rows
    ]
