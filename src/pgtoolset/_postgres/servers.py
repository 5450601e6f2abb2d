"""Connections of the driver itself to a server, for statements about whole databases.

CREATE DATABASE and DROP DATABASE refuse to run in a transaction, and need a connection to a
different database. https://www.postgresql.org/docs/current/sql-createdatabase.html and
https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from sqlalchemy import URL

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset._postgres.urls import connect_arguments, with_asyncpg

logger = logging.getLogger("pgtoolset")

#: Arguments that SQLAlchemy's adapter removes before it calls asyncpg.
_NOT_FOR_THE_DRIVER = ("async_creator_fn", "async_fallback", "prepared_statement_cache_size")

#: SQLSTATEs of a refused connection where another database may be open: the database is missing,
#: sealed or full, or the role has no CONNECT privilege or no line in pg_hba.conf.
_REFUSED = frozenset({"3D000", "42501", "28000", "55000", "53300"})

#: Seconds that PostgreSQL may take to answer a close.
_CLOSE_TIMEOUT = 5.0


async def connect(url: URL, database: str) -> Any:
    """Return a connection of asyncpg to `database` on the server of `url`."""
    # Imported late, because `import pgtoolset` imports no driver.
    asyncpg = import_module("asyncpg")
    translated = with_asyncpg(url)
    arguments = dict(translated.get_dialect()().create_connect_args(translated)[1])
    for name in _NOT_FOR_THE_DRIVER:
        arguments.pop(name, None)
    arguments |= connect_arguments(url)
    # Without the cache no prepared statement is looked for on another backend of a pooler.
    return await asyncpg.connect(**(arguments | {"database": database, "statement_cache_size": 0}))


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
            if sqlstate_of(error) not in _REFUSED:
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
