"""The node of a cluster that a connection reaches: its cluster, its timeline, primary or standby.

See https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-CONTROLDATA and
https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from pgtoolset._postgres.catalog import GT

#: SQL: the number that `initdb` gives to a cluster, and that all its standbys have.
SYSTEM_IDENTIFIER = "(SELECT c.system_identifier FROM pg_catalog.pg_control_system() AS c)"

#: SQL: whether the node is a standby.
IS_STANDBY = "pg_catalog.pg_is_in_recovery()"

#: SQL, on a primary only: the name of the WAL file that is written, which begins with the timeline.
#: `pg_control_checkpoint()` would have the timeline of the last checkpoint.
WAL_FILE = "pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn())"

#: What any role can see of a node. Of a standby the timeline is a lower limit: the control file has
#: that of the last restartpoint, or of the last page that was written. The timeline that it streams
#: is NULL for a role without the privileges of pg_read_all_stats.
_LOOK = f"""
SELECT {SYSTEM_IDENTIFIER},
       {IS_STANDBY},
       CASE WHEN {IS_STANDBY} THEN NULL ELSE {WAL_FILE} END,
       (SELECT GREATEST(c.timeline_id, r.min_recovery_end_timeline)
        FROM pg_catalog.pg_control_checkpoint() AS c, pg_catalog.pg_control_recovery() AS r),
       (SELECT w.received_tli FROM pg_catalog.pg_stat_get_wal_receiver() AS w),
       CAST(CASE WHEN {IS_STANDBY} THEN pg_catalog.pg_last_wal_replay_lsn()
                 ELSE pg_catalog.pg_current_wal_insert_lsn() END AS varchar),
       pg_catalog.current_setting('transaction_isolation'),
       pg_catalog.concat(pg_catalog.pg_postmaster_start_time(), ' ',
                         pg_catalog.inet_server_addr(), ' ',
                         pg_catalog.current_setting('port'))
"""

#: How far a standby has got since the last look, for a third of its price.
_GLANCE = """
SELECT CAST(pg_catalog.pg_last_wal_replay_lsn() AS varchar),
       (SELECT w.received_tli FROM pg_catalog.pg_stat_get_wal_receiver() AS w),
       pg_catalog.current_setting('transaction_isolation')
"""

#: Whether the open transaction has written, and whether its COMMIT waits for its WAL on the disk.
_BEFORE_COMMIT = """
SELECT pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL,
       pg_catalog.current_setting('synchronous_commit')
"""

#: Where the WAL of a primary ends, on its disk and in its memory.
_WRITTEN = f"""
SELECT {IS_STANDBY}, {SYSTEM_IDENTIFIER},
       CASE WHEN {IS_STANDBY} THEN NULL ELSE {WAL_FILE} END,
       CASE WHEN {IS_STANDBY} THEN NULL
            ELSE CAST(pg_catalog.pg_current_wal_flush_lsn() AS varchar) END,
       CASE WHEN {IS_STANDBY} THEN NULL
            ELSE CAST(pg_catalog.pg_current_wal_insert_lsn() AS varchar) END,
       pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL
"""

#: The same as a transaction that writes a message of a few bytes, which no table shows, and waits
#: until the WAL is on the disk up to it. It waits for no standby.
_FLUSHED = f"""
SELECT {IS_STANDBY}, {SYSTEM_IDENTIFIER},
       CASE WHEN {IS_STANDBY} THEN NULL ELSE {WAL_FILE} END,
       CASE WHEN {IS_STANDBY} THEN NULL ELSE CAST(
         pg_catalog.pg_logical_emit_message(true, 'pgtoolset', CAST('' AS pg_catalog.text))
         AS varchar) END
FROM (SELECT pg_catalog.set_config('synchronous_commit', 'local', true) OFFSET 0) AS s
WHERE pg_catalog.length(s.set_config) {GT} 0
"""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the WAL of a cluster.

    Attributes:
        system: the system identifier of the cluster.
        timeline: the timeline.
        lsn: the number of bytes before it.
    """

    system: int
    timeline: int
    lsn: int


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node has said of itself.

    Attributes:
        system: the system identifier of its cluster.
        is_standby: whether it is a standby.
        timeline: a timeline that belongs to its history; of a primary, its own.
        is_newest: whether its history has no newer one, as far as it has received WAL.
        lsn: the end of the replayed WAL; of a primary, the end of its own.
        isolation_level: that of the transaction which has asked, in capitals.
        server: the run of a server: when it was started, and where it listens.
    """

    system: int
    is_standby: bool
    timeline: int
    is_newest: bool
    lsn: int
    isolation_level: str
    server: str

    @property
    def position(self) -> Position:
        """The end of the WAL, and the timeline and the cluster that it is of."""
        return Position(self.system, self.timeline, self.lsn)


def timeline_of(wal_file: str) -> int:
    """Return the timeline that the name of a WAL file begins with."""
    return int(wal_file[:8], 16)


def look(connection: Connection) -> NodeState:
    """Ask a node for its state, in SQLAlchemy's greenlet."""
    row = connection.exec_driver_sql(_LOOK).one()
    system, is_standby, wal_file, timeline, streamed, lsn, level, server = row
    if wal_file is not None:
        timeline = timeline_of(wal_file)
    elif streamed is not None:
        timeline = max(timeline, streamed)
    return NodeState(
        system=_unsigned(system),
        is_standby=is_standby and wal_file is None,
        timeline=timeline,
        is_newest=wal_file is not None or streamed is not None,
        lsn=_lsn(lsn),
        isolation_level=level.upper(),
        server=server,
    )


def look_again(connection: Connection, last: NodeState) -> NodeState:
    """Ask the same server, a standby at the last look, how far it has got since."""
    lsn, streamed, level = connection.exec_driver_sql(_GLANCE).one()
    return replace(
        last,
        timeline=max(last.timeline, streamed or 0),
        is_newest=streamed is not None,
        lsn=_lsn(lsn),
        isolation_level=level.upper(),
    )


def asked_before_commit(connection: Connection) -> tuple[bool, bool]:
    """Return whether the transaction has written, and whether its COMMIT flushes the WAL."""
    has_written, synchronous = connection.exec_driver_sql(_BEFORE_COMMIT).one()
    return has_written, synchronous != "off"


class NotPrimary(Exception):
    """The node is a standby, which writes no WAL."""


class NotCommitted(Exception):
    """The transaction that asks has written, and is not committed."""


def flushed_position(connection: Connection) -> Position:
    """Return a position that all WAL has reached which is on the disk of the primary by now."""
    return _position(connection.exec_driver_sql(_WRITTEN).one(), index=3)


def written_position(connection: Connection, *, flushes: bool) -> Position:
    """Return a position that covers every commit on the primary by now, flushed or not.

    Args:
        connection: of the primary; with `flushes` in AUTOCOMMIT.
        flushes: whether to flush the WAL that is in memory only. A standby would receive it
            later: the WAL writer takes its time, and leaves the last page until the next commit.
    """
    row = connection.exec_driver_sql(_WRITTEN).one()
    position = _position(row, index=3)
    if row[5]:
        raise NotCommitted
    if _position(row, index=4) == position:
        return position
    return flush_position(connection) if flushes else _position(row, index=4)


def flush_position(connection: Connection) -> Position:
    """Flush the WAL of the primary and return a position that covers every commit by now.

    The connection is in AUTOCOMMIT.
    """
    return _position(connection.exec_driver_sql(_FLUSHED).one(), index=3)


def _position(row: Any, *, index: int) -> Position:
    if row[0] or row[index] is None:
        raise NotPrimary
    return Position(_unsigned(row[1]), timeline_of(row[2]), _lsn(row[index]))


def _unsigned(system: int) -> int:
    """Return a system identifier, which PostgreSQL shows as a signed number."""
    return system % 2**64


def _lsn(text: str) -> int:
    """Return the position that PostgreSQL writes as `16/B374D848`."""
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)
