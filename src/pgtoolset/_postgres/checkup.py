"""What the catalog says of a server and a database that may soon go wrong; nothing is judged here.

Any role can ask: values that it may not see are `None`, or are counted.
https://www.postgresql.org/docs/current/catalogs.html and
https://www.postgresql.org/docs/current/monitoring-stats.html
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.catalog import EQ, GE, MINUS, NE
from pgtoolset._postgres.locks import VISIBLE
from pgtoolset._postgres.nodes import IS_STANDBY

__all__ = [
    "Connections",
    "IdleSession",
    "InvalidIndex",
    "ServerState",
    "TableSize",
    "connections_of",
    "hidden_sessions",
    "idle_sessions",
    "invalid_indexes",
    "limited",
    "server_state",
    "settings_of",
    "table_sizes",
]

#: Milliseconds: the limits of one question, and of its waits for locks.
_LONGEST_QUESTION = 10_000
_LONGEST_LOCK = 1_000

_LIMITS = text(
    "SELECT pg_catalog.set_config('statement_timeout', CAST(:longest AS varchar), true),"
    " pg_catalog.set_config('lock_timeout', CAST(:lock AS varchar), true),"
    " pg_catalog.set_config('transaction_read_only', 'on', true)"
)


@asynccontextmanager
async def limited(connection: AsyncConnection) -> AsyncIterator[AsyncConnection]:
    """Begin a transaction that reads only, and in which no statement takes long or waits long."""
    async with connection.begin():
        limits = {"longest": str(_LONGEST_QUESTION), "lock": str(_LONGEST_LOCK)}
        await connection.execute(_LIMITS, limits)
        yield connection


@dataclass(frozen=True, slots=True)
class ServerState:
    """A server, and the role that asks.

    Attributes:
        version: as PostgreSQL writes it.
        version_num: the major version times 10,000, plus the minor one.
        is_standby: whether it is a standby.
        is_paused: whether a standby replays nothing until it is asked to.
        database: the database.
        user: the role.
    """

    version: str
    version_num: int
    is_standby: bool
    is_paused: bool
    database: str
    user: str


_SERVER = text(f"""
SELECT pg_catalog.current_setting('server_version') AS version,
       CAST(pg_catalog.current_setting('server_version_num') AS integer) AS version_num,
       {IS_STANDBY} AS is_standby,
       CASE WHEN {IS_STANDBY} THEN pg_catalog.pg_is_wal_replay_paused() ELSE false END AS is_paused,
       CAST(pg_catalog.current_database() AS varchar) AS database,
       CAST(current_user AS varchar) AS user_name
""")


async def server_state(connection: AsyncConnection) -> ServerState:
    """Return what the server is."""
    return ServerState(*(await connection.execute(_SERVER)).one())


_SETTINGS = text(f"""
SELECT CAST(s.name AS varchar), s.setting FROM pg_catalog.pg_settings AS s
WHERE s.name {EQ} ANY(CAST(:names AS pg_catalog.text[]))
""")


async def settings_of(connection: AsyncConnection, names: Sequence[str]) -> dict[str, str]:
    """Return settings as this role has them, times in milliseconds; an unknown one is missing."""
    rows = (await connection.execute(_SETTINGS, {"names": list(names)})).all()
    return dict(map(tuple, rows))


@dataclass(frozen=True, slots=True)
class Connections:
    """The connections of a server.

    Attributes:
        used: those of clients, to all databases.
        limit: the most that the role may have (ALTER ROLE ... CONNECTION LIMIT), or the database;
            `None` sets no limit.
    """

    used: int
    limit: int | None


_CONNECTIONS = text(f"""
SELECT (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity AS a
        WHERE a.usesysid IS NOT NULL) AS used,
       CASE WHEN r.rolsuper THEN NULL ELSE LEAST(
         CASE WHEN r.rolconnlimit {GE} 0 THEN r.rolconnlimit END,
         CASE WHEN d.datconnlimit {GE} 0 THEN d.datconnlimit END) END AS connection_limit
FROM pg_catalog.pg_roles AS r, pg_catalog.pg_database AS d
WHERE r.rolname {EQ} current_user AND d.datname {EQ} pg_catalog.current_database()
""")


async def connections_of(connection: AsyncConnection) -> Connections:
    """Return how many connections there are, and how many this role may have."""
    return Connections(*(await connection.execute(_CONNECTIONS)).one())


@dataclass(frozen=True, slots=True)
class TableSize:
    """A table, or a partition of one.

    Attributes:
        table: its name, quoted and with its schema.
        is_analyzed: whether the planner knows how many rows it has.
        size: bytes; 0 where it was dropped meanwhile.
    """

    table: str
    is_analyzed: bool
    size: int


#: The partitions in place of a partitioned table: each has statistics and rows of its own.
_SIZES = text(f"""
SELECT DISTINCT pg_catalog.format('%I.%I', n.nspname, c.relname), c.reltuples {GE} 0,
       coalesce(pg_catalog.pg_relation_size(CAST(c.oid AS pg_catalog.regclass)), 0)
FROM pg_catalog.unnest(CAST(:oids AS pg_catalog.oid[])) AS given(oid)
JOIN pg_catalog.pg_class AS top ON top.oid {EQ} given.oid
JOIN LATERAL (
    SELECT CAST(part.relid AS pg_catalog.oid) AS oid
    FROM pg_catalog.pg_partition_tree(CAST(top.oid AS pg_catalog.regclass)) AS part
    WHERE top.relkind {EQ} 'p' AND part.isleaf
    UNION ALL SELECT top.oid WHERE top.relkind {NE} 'p'
) AS leaf ON true
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} leaf.oid AND c.relkind {EQ} 'r'
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
ORDER BY 1
""")


async def table_sizes(connection: AsyncConnection, oids: Sequence[int]) -> list[TableSize]:
    """Return the sizes of tables."""
    return [TableSize(*row) for row in await connection.execute(_SIZES, {"oids": list(oids)})]


@dataclass(frozen=True, slots=True)
class InvalidIndex:
    """An index that serves no query.

    Attributes:
        index: its name, quoted and with its schema.
        table: its table.
    """

    index: str
    table: str


#: Indexes that are being built now do not count, nor do those of partitioned tables.
_INDEXES = text(f"""
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname),
       pg_catalog.format('%I.%I', tn.nspname, t.relname)
FROM pg_catalog.pg_index AS i
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} i.indexrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
JOIN pg_catalog.pg_class AS t ON t.oid {EQ} i.indrelid
JOIN pg_catalog.pg_namespace AS tn ON tn.oid {EQ} t.relnamespace
WHERE NOT i.indisvalid AND c.relkind {EQ} 'i'
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_stat_progress_create_index AS b
                  WHERE b.index_relid {EQ} c.oid)
ORDER BY n.nspname, c.relname
""")


async def invalid_indexes(connection: AsyncConnection) -> list[InvalidIndex]:
    """Return the indexes that a failed CREATE INDEX CONCURRENTLY has left."""
    return [InvalidIndex(*row) for row in await connection.execute(_INDEXES)]


@dataclass(frozen=True, slots=True)
class IdleSession:
    """A session that does nothing in an open transaction.

    Attributes:
        pid: of its backend.
        application_name: what the session calls itself.
        user: its role.
        seconds: since its last statement ended.
        query: that statement.
    """

    pid: int
    application_name: str
    user: str
    seconds: float
    query: str


_IDLE = text(f"""
SELECT a.pid, a.application_name, CAST(a.usename AS varchar),
       CAST(EXTRACT(EPOCH FROM pg_catalog.clock_timestamp() {MINUS} a.state_change)
            AS double precision), a.query
FROM pg_catalog.pg_stat_activity AS a
WHERE a.datname {EQ} pg_catalog.current_database()
  AND (a.state {EQ} 'idle in transaction' OR a.state {EQ} 'idle in transaction (aborted)')
  AND a.state_change {MINUS} pg_catalog.clock_timestamp()
      OPERATOR(pg_catalog.<=) pg_catalog.make_interval(secs => CAST(:seconds AS double precision))
ORDER BY a.state_change
""")


async def idle_sessions(connection: AsyncConnection, seconds: float) -> list[IdleSession]:
    """Return the sessions of this database that have been idle in a transaction for so long."""
    rows = await connection.execute(_IDLE, {"seconds": -seconds})
    return [IdleSession(*row) for row in rows]


_HIDDEN = text(f"""
SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity AS a
WHERE a.datname {EQ} pg_catalog.current_database() AND a.usesysid IS NOT NULL AND NOT {VISIBLE}
""")


async def hidden_sessions(connection: AsyncConnection) -> int:
    """Return how many sessions of this database hide their activity from this role."""
    count: int = await connection.scalar(_HIDDEN)
    return count
