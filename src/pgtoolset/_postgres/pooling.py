"""Whether a pooler answers in place of PostgreSQL, its mode, and whether it keeps statements.

A pooler hides itself, so each answer is found out by an experiment. PgBouncer is described at
https://www.pgbouncer.org/features.html
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgtoolset._postgres.drivers import driver_of
from pgtoolset._postgres.sqlstates import sqlstate_of

__all__ = ["Pooler", "PoolerMode", "find_pooler", "is_pooled", "with_caches", "without_caches"]

PoolerMode: TypeAlias = Literal["session", "transaction"]

_PID = text("SELECT pg_catalog.pg_backend_pid()")

#: A statement for the experiments. It is the same text each time, so that the driver caches it.
_PROBE = "SELECT 1"

#: Rounds of an experiment that other clients of the pooler may disturb.
_ROUNDS = 5

#: Seconds for an experiment: a connection may have to wait for a backend that another one holds.
_LIMIT = 3.0

#: The SQLSTATEs of a prepared statement that the backend does not have, or has already.
_PREPARED = frozenset({"26000", "42P05"})


@dataclass(frozen=True, slots=True)
class Pooler:
    """A pooler between the driver and PostgreSQL.

    Attributes:
        mode: how long a client keeps a backend; `None` where that could not be found out.
        keeps_statements: whether prepared statements survive a change of the backend; `None` where
            that could not be found out.
    """

    mode: PoolerMode | None
    keeps_statements: bool | None


def without_caches(driver: str) -> dict[str, Any]:
    """Return the `connect_args` with which a driver depends on no backend."""
    if driver == "psycopg":
        return {"prepare_threshold": None}
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": _new_name,
    }


def with_caches(driver: str) -> dict[str, Any]:
    """Return the `connect_args` with which a driver keeps each statement that it has prepared."""
    if driver == "psycopg":
        return {"prepare_threshold": 0}
    return {"prepared_statement_name_func": _new_name}


def _new_name() -> str:
    return f"__asyncpg_{uuid4()}__"


async def is_pooled(connection: AsyncConnection) -> bool:
    """Return whether another program than the backend has answered as the driver connected.

    The driver was given a process id then, and a pooler gives one of its own.
    """
    raw: Any = (await connection.get_raw_connection()).driver_connection
    pid = driver_of(raw).server_pid(raw)
    return pid != 0 and pid != await _backend(connection)


async def find_pooler(
    connection: AsyncConnection, plain: AsyncEngine, caching: AsyncEngine
) -> Pooler | None:
    """Return the pooler; `None` where PostgreSQL itself answers.

    Args:
        connection: without caches, and in no transaction.
        plain: an engine without caches, and without a pool of its own.
        caching: one with caches.
    """
    if not await is_pooled(connection):
        return None
    mode: PoolerMode | None = None
    try:
        async with asyncio.timeout(_LIMIT), plain.connect() as second:
            mode = await _mode(connection, second)
    except (TimeoutError, OSError, DBAPIError):
        # No backend was free, or the pooler refuses another client.
        return Pooler(None, None)
    if mode == "session":
        return Pooler(mode, True)
    try:
        async with asyncio.timeout(_LIMIT):
            return Pooler(mode, await _keeps_statements(plain, caching))
    except TimeoutError:
        return Pooler(mode, None)


async def _mode(first: AsyncConnection, second: AsyncConnection) -> PoolerMode:
    """In transaction mode a backend serves another client after each transaction."""
    for _ in range(_ROUNDS):
        left = await _backend(first)
        async with second.begin():
            taken = await second.scalar(_PID)
            if taken == left or await _backend(first) != left:
                return "transaction"
    return "session"


async def _keeps_statements(plain: AsyncEngine, caching: AsyncEngine) -> bool | None:
    """Execute a prepared statement on a second backend, while the first one is taken."""
    try:
        async with caching.connect() as client, plain.connect() as holder:
            for _ in range(_ROUNDS):
                async with client.begin():
                    await client.exec_driver_sql(_PROBE)
                    prepared_on = await client.scalar(_PID)
                async with holder.begin():
                    if await holder.scalar(_PID) == prepared_on:
                        async with client.begin():
                            await client.exec_driver_sql(_PROBE)
                        return True
    except Exception as error:  # SQLAlchemy 2.0 leaves an error of the first connection as it is
        if sqlstate_of(error) in _PREPARED:
            return False
        raise
    return None


async def _backend(connection: AsyncConnection) -> int:
    """Return the process id of the backend of one transaction, which ends here."""
    async with connection.begin():
        pid: int = await connection.scalar(_PID)
    return pid
