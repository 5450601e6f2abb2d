"""Connections of the driver itself to a server, for statements about whole databases.

CREATE DATABASE and DROP DATABASE refuse to run in a transaction, and need a connection to a
different database. https://www.postgresql.org/docs/current/sql-createdatabase.html and
https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import URL

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.drivers import DRIVERS
from pgtoolset._postgres.urls import driver_named

logger = logging.getLogger("pgtoolset")

#: Seconds that PostgreSQL may take to answer a close.
_CLOSE_TIMEOUT = 5.0


async def connect(url: URL, database: str) -> Any:
    """Return a connection to `database` on the server of `url`, with the methods of asyncpg's."""
    return await DRIVERS[driver_named(url)].connect(url, database)


@asynccontextmanager
async def maintenance_connection(
    url: URL, *, never: str, rather_not: str | None = None
) -> AsyncIterator[Any]:
    """Yield a connection to `postgres`, or else to the database of the URL or to `template1`.

    Args:
        url: the server.
        never: a database that must not be connected to, because it is about to be dropped.
        rather_not: a database that is tried last, because it is about to be copied.
    """
    candidates = [
        name
        for name in dict.fromkeys(["postgres", url.database, "template1"])
        if name and name != never
    ]
    candidates.sort(key=lambda name: name == rather_not)
    connection = await _first_open(url, candidates)
    try:
        yield connection
    finally:
        await uninterrupted(_close(connection))


async def _first_open(url: URL, candidates: list[str]) -> Any:
    refusal: Exception | None = None
    for name in candidates:
        try:
            return await connect(url, name)
        except Exception as error:
            if not DRIVERS[driver_named(url)].refuses_database(error):
                raise
            refusal = refusal or error
    assert refusal is not None
    raise refusal


async def _close(connection: Any) -> None:
    try:
        await connection.close(timeout=_CLOSE_TIMEOUT)
    except Exception:
        logger.debug("closing a connection failed; it is terminated", exc_info=True)
    finally:
        connection.terminate()
