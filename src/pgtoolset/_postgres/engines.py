"""Engines that the library sees for the first time: refused, or mended for their statements.

The driver is known without a connection. Whether the server is PostgreSQL is known at the first
one, when SQLAlchemy reads its version.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Dialect, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgtoolset._postgres.connections import terminate_driver
from pgtoolset._postgres.drivers import DRIVERS, is_supported
from pgtoolset._postgres.holders import see_pool, see_pool_of
from pgtoolset._postgres.statements import note_statements
from pgtoolset._text import printable
from pgtoolset.errors import UnsupportedDriverError

#: In the attributes of a dialect and of a pool that were seen.
_KEY = "pgtoolset.seen"

_USE = "Use PostgreSQL through postgresql+asyncpg or postgresql+psycopg"


def see(bind: Connection | Engine | AsyncConnection | AsyncEngine) -> None:
    """Accept an engine before the first statement over it, and note who holds its connections.

    No I/O; only the first call does work.

    Raises:
        UnsupportedDriverError: the database or the driver is one that the library cannot verify.
    """
    dialect = bind.dialect
    if isinstance(bind, Engine):  # nearly always, and the others cost more to tell apart
        pool = bind.pool
    elif isinstance(bind, AsyncConnection | AsyncEngine):
        pool = bind.sync_engine.pool
    else:
        pool = bind.engine.pool
    if _KEY not in vars(dialect):
        _see_dialect(dialect)
    if _KEY not in vars(pool):
        see_pool(pool)
        vars(pool)[_KEY] = True


def see_connection(connection: Connection) -> None:
    """As `see`, by a connection that was just taken."""
    dialect, pool = connection.dialect, connection.engine.pool
    if _KEY not in vars(dialect):
        _see_dialect(dialect)
    if _KEY not in vars(pool):
        see_pool_of(connection.connection, pool)
        vars(pool)[_KEY] = True


def _see_dialect(dialect: Dialect) -> None:
    if not is_supported(dialect):
        kind = "" if dialect.is_async else "the synchronous "
        raise UnsupportedDriverError(
            f"the engine uses {kind}{dialect.name}+{dialect.driver}, whose transactions pgtoolset "
            f"cannot verify. {_USE}; nothing was sent"
        )
    DRIVERS[dialect.driver].mend(dialect)
    _mend_initialize(dialect)
    note_statements(dialect)
    vars(dialect)[_KEY] = True


def _mend_initialize(dialect: Dialect) -> None:
    """Refuse a server that only speaks PostgreSQL's protocol, and close what could not be read.

    SQLAlchemy cannot read the version of such a server, and says that as an `AssertionError`.
    Before 2.1 SQLAlchemy forgets a first connection whose properties it could not read, also after
    a cancellation: nothing would close it.
    """
    initialize = dialect.initialize

    def initialize_postgresql(connection: Connection) -> None:
        raw = connection.connection.driver_connection
        try:
            initialize(connection)
        except BaseException as error:
            terminate_driver(raw)
            if not connection.closed:
                connection.invalidate()  # SQLAlchemy would send a ROLLBACK over it
            if not isinstance(error, AssertionError):
                raise
            raise UnsupportedDriverError(
                f"the server is not PostgreSQL: {printable(str(error))}. Its transactions, locks "
                f"and catalog are others. {_USE}"
            ) from error

    methods: dict[str, Any] = vars(dialect)
    methods["initialize"] = initialize_postgresql
