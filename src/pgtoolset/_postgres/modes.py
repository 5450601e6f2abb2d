"""The modes of an open transaction, what stands in the way of its end, and a next one like it.

Modes are the isolation level, READ ONLY and DEFERRABLE. Everything is asked in one statement.
https://www.postgresql.org/docs/current/sql-set-transaction.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import Row

from pgtoolset._postgres.catalog import EQ, NE
from pgtoolset._postgres.drivers import driver_at
from pgtoolset._postgres.sending import send

#: Among the execution options of a connection, which end with its use by the session: the isolation
#: level of a transaction that `Modes` has begun.
_ISOLATION_LEVEL = "pgtoolset_isolation_level"

#: Lock modes that no SELECT and no write takes. A write has a transaction id, and one that has
#: changed nothing leaves only a weak lock, which is no reason to keep the transaction.
_STRONG = (
    "'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock',"
    " 'AccessExclusiveLock'"
)

#: The portals of asyncpg stay after their last row, so SQLAlchemy's cursors are looked at instead.
_ASYNCPG_PORTAL = "__asyncpg_portal"


def _setting(name: str) -> str:
    return f"pg_catalog.current_setting('{name}')"


_LOOK = f"""
SELECT {_setting("transaction_isolation")} AS isolation,
       {_setting("default_transaction_isolation")} AS default_isolation,
       {_setting("transaction_read_only")} AS read_only,
       {_setting("default_transaction_read_only")} AS default_read_only,
       {_setting("transaction_deferrable")} AS deferrable,
       {_setting("default_transaction_deferrable")} AS default_deferrable,
       pg_catalog.pg_is_in_recovery() AS is_standby,
       held.ids, held.lock,
       (SELECT c.name FROM pg_catalog.pg_cursors AS c
        WHERE c.name {NE} '' AND NOT pg_catalog.starts_with(c.name, '{_ASYNCPG_PORTAL}')
        ORDER BY c.name LIMIT 1) AS cursor
FROM (SELECT CAST(pg_catalog.count(*) FILTER (WHERE l.locktype {EQ} 'transactionid'
                  AND l.mode {EQ} 'ExclusiveLock') AS integer) AS ids,
             pg_catalog.min(CASE WHEN l.locktype {EQ} 'advisory' THEN 'an advisory lock'
                  ELSE pg_catalog.format('a lock on %s (%s)',
                       CAST(l.relation AS pg_catalog.regclass), l.mode) END)
             FILTER (WHERE l.locktype {EQ} 'advisory'
                  OR l.locktype {EQ} 'relation' AND l.mode {EQ} ANY(ARRAY[{_STRONG}])) AS lock
      FROM pg_catalog.pg_locks AS l
      WHERE l.pid {EQ} pg_catalog.pg_backend_pid() AND l.granted) AS held
"""


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes and options of a transaction, for the next one of the same session.

    Attributes:
        statement: sets the modes that are not PostgreSQL's defaults, as the first of a transaction.
        isolation_level: as in SQL; `None` where it is the default.
        is_read_only: whether the transaction is READ ONLY because it was asked to be.
        options: the execution options of its connection that are not those of the engine.
    """

    statement: str
    isolation_level: str | None
    is_read_only: bool
    options: Mapping[str, Any]

    def apply(self, connection: Connection) -> None:
        """Give a connection the execution options, before its transaction has begun."""
        options = dict(self.options)
        if self.isolation_level is not None:
            options[_ISOLATION_LEVEL] = self.isolation_level
        if options:
            connection.execution_options(**options)


@dataclass(frozen=True, slots=True)
class Look:
    """What PostgreSQL says of an open transaction.

    Attributes:
        modes: its modes.
        writes: how many of its levels, the transaction and its savepoints, have written or locked
            rows.
        lock: a lock that it holds, in words.
        cursor: the name of a cursor that is open in it.
    """

    modes: Modes
    writes: int
    lock: str | None
    cursor: str | None


def look(connection: Connection, *, is_read_only: bool) -> Look:
    """Ask PostgreSQL about the open transaction of a connection. Runs in SQLAlchemy's greenlet.

    Args:
        connection: in a transaction.
        is_read_only: whether a statement of ours has made it READ ONLY.
    """
    row = send(connection, _LOOK).one()
    return Look(_modes(connection, row, is_read_only), row.ids, row.lock, row.cursor)


def carried_isolation_level(connection: Connection) -> str | None:
    """Return the isolation level that `Modes` has given the transaction of a connection."""
    level: str | None = connection.get_execution_options().get(_ISOLATION_LEVEL)
    return level


def _modes(connection: Connection, row: Row[Any], is_read_only: bool) -> Modes:
    proxied = connection.connection
    was_asked = is_read_only or driver_at(proxied).is_read_only(proxied)
    # Each transaction of a standby is READ ONLY, and the next one may be on a primary.
    read_only = was_asked if row.is_standby else row.read_only == "on"
    modes = []
    if row.isolation != row.default_isolation:
        modes.append(f"ISOLATION LEVEL {row.isolation.upper()}")
    if read_only != (row.default_read_only == "on"):
        modes.append("READ ONLY" if read_only else "READ WRITE")
    if row.deferrable != row.default_deferrable:
        modes.append("DEFERRABLE" if row.deferrable == "on" else "NOT DEFERRABLE")
    return Modes(
        statement=f"SET TRANSACTION {', '.join(modes)};" if modes else "",
        isolation_level=row.isolation.upper() if modes else None,
        is_read_only=read_only,
        options=_options_of(connection),
    )


def _options_of(connection: Connection) -> dict[str, Any]:
    """Return the execution options of a connection alone, without those of a transaction's modes,
    which cannot be set where the transaction has begun.
    """
    engine: Mapping[str, Any] = connection.engine.get_execution_options()
    dialect: Any = connection.dialect  # the attribute is that of SQLAlchemy's own dialects
    modes = dialect.connection_characteristics
    return {
        name: value
        for name, value in connection.get_execution_options().items()
        if name not in modes and not (name in engine and engine[name] is value)
    }
