"""What PostgreSQL knows of a COMMIT whose answer was lost: noted before it, and asked for after it.

`pg_xact_status` answers for a transaction id, and the same id means another transaction on another
cluster, on another timeline, and on a server that crashed: it gives the ids of transactions that
were not flushed to other ones. So these three are noted with the id.

See https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import PoolProxiedConnection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.catalog import EQ, GE, NE
from pgtoolset._postgres.nodes import IS_STANDBY, SYSTEM_IDENTIFIER, WAL_FILE, timeline_of
from pgtoolset._postgres.sqlstates import INVALID_PARAMETER_VALUE, sqlstate_of

#: In the `info` of a connection, which the pool empties when it connects again.
_KEY = "pgtoolset.incarnations"

#: Seconds after which a server is described again. A reset of its statistics looks like a
#: crash.
LONGEST_MEMORY = 60.0

#: Backends that one connection remembers: behind a pooler it may reach each of them.
_MOST_BACKENDS = 100


def _exactly(timestamp: str) -> str:
    """Return SQL for a timestamp as text that does not depend on settings."""
    return f"CAST(EXTRACT(epoch FROM {timestamp}) AS pg_catalog.text)"


#: SQL: it changes when the server recovers from a crash, and not when it was shut down. Any role
#: sees it. https://www.postgresql.org/docs/current/monitoring-stats.html
_CRASH_MARK = _exactly("pg_catalog.pg_stat_get_bgwriter_stat_reset_time()")

#: All of them are PUBLIC's, unless an administrator revoked that.
_FUNCTIONS = (
    "pg_control_system()",
    "pg_current_wal_insert_lsn()",
    "pg_stat_get_activity(integer)",
    "pg_stat_get_bgwriter_stat_reset_time()",
    "pg_walfile_name(pg_catalog.pg_lsn)",
    "pg_xact_status(pg_catalog.xid8)",
)

#: A role that may not call a function would abort its transaction by the attempt.
_REFUSED = f"""
SELECT pg_catalog.min(f.name)
FROM pg_catalog.unnest(CAST(ARRAY[{", ".join(f"'{name}'" for name in _FUNCTIONS)}]
    AS pg_catalog.text[])) AS f(name)
WHERE NOT COALESCE(pg_catalog.has_function_privilege(
    CAST(pg_catalog.to_regprocedure('pg_catalog.' OPERATOR(pg_catalog.||) f.name)
        AS pg_catalog.oid), 'EXECUTE'), false)
"""

_XID = "CAST(CAST(:xid AS pg_catalog.text) AS pg_catalog.xid8)"

_TRACE = f"""
SELECT CAST(pg_catalog.pg_current_xact_id_if_assigned() AS pg_catalog.text),
    pg_catalog.pg_backend_pid(),
    {_exactly("pg_catalog.pg_postmaster_start_time()")},
    pg_catalog.current_setting('synchronous_commit')"""

_INCARNATION = f"""
SELECT CAST({SYSTEM_IDENTIFIER} AS pg_catalog.text),
    {WAL_FILE},
    {_CRASH_MARK},
    (SELECT {_exactly("a.backend_start")}
     FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) AS a)"""

_LOOK = text(f"""
SELECT n.is_standby, n.system_identifier, n.wal_file, n.crash_mark,
    CASE WHEN n.system_identifier {EQ} :system_identifier
        AND pg_catalog.left(n.wal_file, 8) {EQ} :timeline
        AND n.wal_file COLLATE pg_catalog."C" {GE} :wal_file
        AND n.crash_mark {EQ} :crash_mark
    THEN pg_catalog.pg_xact_status({_XID}) END AS status,
    pg_catalog.current_setting('synchronous_standby_names') {NE} '' AS has_standbys
FROM (
    SELECT {IS_STANDBY} AS is_standby,
        CAST({SYSTEM_IDENTIFIER} AS pg_catalog.text) AS system_identifier,
        CASE WHEN NOT {IS_STANDBY} THEN {WAL_FILE} END AS wal_file,
        {_CRASH_MARK} AS crash_mark
    OFFSET 0
) AS n
""")

#: A backend that waits for a synchronous standby has committed: to end it would show its work to
#: others, although it is on one machine only.
_END = text(f"""
SELECT pg_catalog.pg_terminate_backend(a.pid)
FROM pg_catalog.pg_stat_get_activity(CAST(:pid AS integer)) AS a
WHERE {_exactly("a.backend_start")} {EQ} :backend_start
    AND a.backend_xid {EQ} pg_catalog.xid({_XID})
    AND COALESCE(a.wait_event {NE} 'SyncRep', true)
""")

#: A transaction of its own, with something in the write-ahead log: its COMMIT waits for the
#: synchronous standbys, which have everything before it then.
_CONFIRM = text("""
SELECT pg_catalog.set_config('synchronous_commit', :level, true),
    pg_catalog.pg_logical_emit_message(true, 'pgtoolset', '')
""")


@dataclass(frozen=True, slots=True)
class Incarnation:
    """A server from its start, or its recovery from a crash, to the next crash; and a backend.

    Attributes:
        system_identifier: of the cluster.
        wal_file: the name of the file that the server wrote, which begins with its timeline.
        crash_mark: a value that changes when the server recovers from a crash; `None` if it has
            no such value.
        backend_start: when the backend was started.
    """

    system_identifier: str
    wal_file: str
    crash_mark: str | None
    backend_start: str | None


@dataclass(frozen=True, slots=True)
class Trace:
    """The notes on a transaction, made just before its COMMIT.

    Attributes:
        xid: its id; `None` where it has written nothing.
        pid: the process id of its backend.
        synchronous_commit: the setting.
        incarnation: the server; `None` where the transaction has written nothing, or the role may
            not ask.
        refused: the function that the role may not call.
    """

    xid: str | None
    pid: int
    synchronous_commit: str
    incarnation: Incarnation | None
    refused: str | None = None

    @property
    def waits_for_standbys(self) -> bool:
        """Whether its COMMIT waits for synchronous standbys, where there are any."""
        return self.synchronous_commit not in ("off", "local")


@dataclass(frozen=True, slots=True)
class Look:
    """What a server says of a transaction.

    Attributes:
        is_standby: whether it is in recovery.
        has_standbys: whether its commits wait for synchronous standbys.
        difference: what tells the server from the one that was noted; `None` where it is the same.
        status: of `pg_xact_status`; `None` where the server does not know.
    """

    is_standby: bool
    has_standbys: bool
    difference: str | None
    status: str | None


class _Memory:
    """What one connection knows of the servers behind it.

    Attributes:
        refused: a function that the role may not call; `None` where it may call all of them.
        known: each server by its backend, with the time when it was described.
    """

    __slots__ = ("known", "refused")

    def __init__(self, refused: str | None) -> None:
        self.refused = refused
        self.known: dict[tuple[int, str], tuple[float, Incarnation]] = {}

    def find(self, backend: tuple[int, str]) -> Incarnation | None:
        noted, incarnation = self.known.get(backend, (0.0, None))
        return incarnation if time.monotonic() < noted + LONGEST_MEMORY else None

    def keep(self, backend: tuple[int, str], incarnation: Incarnation) -> None:
        if len(self.known) >= _MOST_BACKENDS:
            self.known.clear()
        self.known[backend] = (time.monotonic(), incarnation)


def trace(connection: PoolProxiedConnection) -> Trace:
    """Note the transaction that is open on a connection. One statement; more in the first minute.

    Runs in SQLAlchemy's greenlet, and raises what the driver's adapter raises.
    """
    memory: _Memory | None = connection.info.get(_KEY)
    try:
        xid, pid, started, level = _row(connection, _TRACE)
        if xid is None:
            return Trace(None, pid, level, None)
        if memory is None:
            memory = connection.info[_KEY] = _Memory(_row(connection, _REFUSED)[0])
        if memory.refused is not None:
            refused = memory.refused.replace("pg_catalog.", "")
            return Trace(xid, pid, level, None, refused)
        incarnation = memory.find((pid, started))
        if incarnation is None:
            cluster, wal_file, mark, backend_start = _row(connection, _INCARNATION)
            incarnation = Incarnation(cluster, wal_file, mark, backend_start)
            memory.keep((pid, started), incarnation)
        return Trace(xid, pid, level, incarnation)
    except BaseException:
        connection.info.pop(_KEY, None)
        raise


def _row(connection: PoolProxiedConnection, statement: str) -> Any:
    """Return the row of a statement, which costs half of what SQLAlchemy's `Connection` takes."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()


async def look(connection: AsyncConnection, trace: Trace) -> Look:
    """Ask what became of a transaction. One statement, and so one server, behind a pooler too."""
    noted = trace.incarnation
    assert noted is not None
    try:
        result = await connection.execute(
            _LOOK,
            {
                "system_identifier": noted.system_identifier,
                "timeline": noted.wal_file[:8],
                "wal_file": noted.wal_file,
                "crash_mark": noted.crash_mark,
                "xid": trace.xid,
            },
        )
    except DBAPIError as error:
        if sqlstate_of(error) != INVALID_PARAMETER_VALUE:
            raise
        return Look(False, False, "the server has not given out that transaction id yet", None)
    row = result.one()
    return Look(row.is_standby, row.has_standbys, _difference(noted, row), row.status)


def _difference(noted: Incarnation, row: Any) -> str | None:
    """Return what tells two servers apart: the same id may be of another transaction there."""
    if row.system_identifier != noted.system_identifier:
        return "the server that answers belongs to another cluster"
    if row.is_standby:
        return None
    if row.wal_file[:8] != noted.wal_file[:8]:
        return (
            f"the server that answers is on timeline {timeline_of(row.wal_file)} and the COMMIT "
            f"was sent on timeline {timeline_of(noted.wal_file)}, so a standby was promoted"
        )
    if row.wal_file < noted.wal_file:
        return "the server that answers has written less than the one that was noted"
    if noted.crash_mark is None or row.crash_mark != noted.crash_mark:
        return "the server has recovered from a crash since, or its statistics were reset"
    return None


async def end_backend(connection: AsyncConnection, trace: Trace) -> None:
    """End the backend of a transaction, if it is still in that transaction."""
    noted = trace.incarnation
    assert noted is not None
    await connection.execute(
        _END, {"pid": trace.pid, "backend_start": noted.backend_start, "xid": trace.xid}
    )


async def confirm(connection: AsyncConnection, trace: Trace) -> None:
    """Wait until the synchronous standbys have what the transaction has written."""
    await connection.execute(_CONFIRM, {"level": trace.synchronous_commit})
