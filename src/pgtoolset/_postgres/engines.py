"""Engines that the library sees for the first time: refused, or mended for what is sent over them.

The driver is known without a connection. Whether the server is PostgreSQL is known at the first
one, when SQLAlchemy reads its version.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Dialect

from pgtoolset._postgres.drivers import DRIVERS, is_supported
from pgtoolset._text import printable
from pgtoolset.errors import UnsupportedDriverError

#: In the attributes of a dialect that was seen.
_KEY = "pgtoolset.seen"

_USE = "Use PostgreSQL through postgresql+asyncpg or postgresql+psycopg"


def see(dialect: Dialect) -> None:
    """Accept a dialect before the first statement over it. No I/O; only the first call does work.

    Raises:
        UnsupportedDriverError: the database or the driver is one that the library cannot verify.
    """
    if _KEY in vars(dialect):
        return
    if not is_supported(dialect):
        kind = "" if dialect.is_async else "the synchronous "
        raise UnsupportedDriverError(
            f"the engine uses {kind}{dialect.name}+{dialect.driver}, whose transactions pgtoolset "
            f"cannot verify. {_USE}; nothing was sent"
        )
    DRIVERS[dialect.driver].mend(dialect)
    _refuse_other_servers(dialect)
    vars(dialect)[_KEY] = True


def _refuse_other_servers(dialect: Dialect) -> None:
    """Let the first connection say so where the server only speaks PostgreSQL's protocol.

    SQLAlchemy cannot read the version of such a server, and says that as an `AssertionError`.
    """
    initialize = dialect.initialize

    def initialize_postgresql(connection: Connection) -> None:
        try:
            initialize(connection)
        except AssertionError as error:
            raise UnsupportedDriverError(
                f"the server is not PostgreSQL: {printable(str(error))}. Its transactions, locks "
                f"and catalog are others. {_USE}"
            ) from error

    methods: dict[str, Any] = vars(dialect)
    methods["initialize"] = initialize_postgresql
