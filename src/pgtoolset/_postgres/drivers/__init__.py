"""The drivers, each behind the same few methods; no other package knows what a driver does."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect, PoolProxiedConnection

from pgtoolset._postgres.drivers._asyncpg import AsyncpgDriver
from pgtoolset._postgres.drivers._attempts import CommitAttempt, Outcome
from pgtoolset._postgres.drivers._protocol import Driver
from pgtoolset._postgres.drivers._psycopg import PsycopgDriver

__all__ = [
    "DRIVERS",
    "CommitAttempt",
    "Driver",
    "Outcome",
    "driver_at",
    "driver_of",
    "is_supported",
    "raw_at",
]

ASYNCPG: Driver = AsyncpgDriver()
PSYCOPG: Driver = PsycopgDriver()

#: In the `info` of a connection, which the pool empties when it connects again: its driver.
_KEY = "pgtoolset.driver"

#: By `Dialect.driver`.
DRIVERS = {"asyncpg": ASYNCPG, "psycopg": PSYCOPG}


def is_supported(dialect: Dialect) -> bool:
    """Whether a dialect is PostgreSQL's over one of the drivers, which a sync engine is not."""
    return dialect.name == "postgresql" and dialect.is_async and dialect.driver in DRIVERS


def driver_of(raw: Any) -> Driver:
    """Return the driver of one of its connections, or of a wrapper around one.

    A connection of the pool does not say of which dialect it is. The driver's own does: psycopg
    has libpq's connection below it.
    """
    return PSYCOPG if getattr(raw, "pgconn", None) is not None else ASYNCPG


def raw_at(connection: PoolProxiedConnection) -> Any:
    """Return the driver's connection, also of one that was detached from its pool, for which
    SQLAlchemy returns `None`; `None` where it is gone.
    """
    raw: Any = connection.driver_connection
    if raw is not None:
        return raw
    adapter: Any = connection.dbapi_connection
    return None if adapter is None else adapter.driver_connection


def driver_at(connection: PoolProxiedConnection) -> Driver:
    """Return the driver of a connection that is out of its pool. Only the first call looks for it:
    SQLAlchemy asks the dialect for the driver's connection each time.
    """
    info = connection.info
    driver: Driver | None = info.get(_KEY)
    if driver is None:
        raw = raw_at(connection)
        driver = driver_of(raw)
        if raw is not None:
            info[_KEY] = driver
    return driver
