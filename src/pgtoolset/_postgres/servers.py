"""A connection to a server for what concerns whole databases: straight from the driver, in no
transaction and no pool.

CREATE DATABASE and DROP DATABASE refuse to run in a transaction, and need a connection to another
database than theirs. https://www.postgresql.org/docs/current/sql-createdatabase.html and
https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.sqlstates import sqlstate_of

logger = logging.getLogger("pgtoolset")

#: What SQLAlchemy's adapter takes out of the arguments before asyncpg sees them.
_NOT_FOR_THE_DRIVER = ("async_creator_fn", "async_fallback", "prepared_statement_cache_size")

#: Why a server lets nobody into one database, while another may be open: it is not there, the
#: privilege CONNECT or a line of pg_hba.conf is missing, it is closed or full.
_CLOSED = frozenset({"3D000", "42501", "28000", "55000", "53300"})

#: Seconds that a farewell may take.
_FAREWELL = 5.0


def server_of(name: str, url: object) -> URL:
    """The URL that is given as the argument `name`, or `TypeError` or `ValueError`."""
    if not isinstance(url, str | URL):
        raise TypeError(f"{name} must be a SQLAlchemy URL or a string, not {url!r}")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # whose texts may show a password
        raise ValueError(
            f"{name} cannot be read; it must look like postgresql+asyncpg://user@host/database"
        ) from None
    backend = parsed.drivername.partition("+")[0]
    if backend == "postgres":
        parsed = parsed.set(drivername="postgresql")
    elif backend != "postgresql":
        raise ValueError(f"{name} must be the URL of a PostgreSQL server, not of {backend!r}")
    return parsed


def asyncpg_url(url: URL) -> URL:
    """The URL for `create_async_engine`: one that names no driver gets asyncpg."""
    if url.drivername != "postgresql":
        return url
    # What libpq calls sslmode, SQLAlchemy hands to asyncpg under asyncpg's name for it.
    query = {("ssl" if name == "sslmode" else name): value for name, value in url.query.items()}
    return url.set(drivername="postgresql+asyncpg", query=query)


async def connect(url: URL, database: str) -> Any:
    """A connection of asyncpg to `database` on the server of `url`."""
    asyncpg = import_module("asyncpg")  # only here, and it has no types
    if url.drivername == "postgresql+asyncpg":
        arguments = dict(url.get_dialect()().create_connect_args(url)[1])
        for name in _NOT_FOR_THE_DRIVER:
            arguments.pop(name, None)
    else:
        # What stands in such a URL are libpq's parameters, which asyncpg reads in a DSN only.
        plain = url.set(drivername="postgresql", database="")
        arguments = {"dsn": plain.render_as_string(hide_password=False)}
    # No prepared statement is kept, so that a pooler in between does no harm.
    return await asyncpg.connect(**(arguments | {"database": database, "statement_cache_size": 0}))


@asynccontextmanager
async def maintenance_connection(
    url: URL, *, never: str, rather_not: str | None = None
) -> AsyncIterator[Any]:
    """A connection to `postgres`, or to the database of the URL or `template1` where that one lets
    nobody in.

    Args:
        url: the server.
        never: a database that must not be connected to, because it is about to be dropped.
        rather_not: one that is connected to only where no other is to be had.
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
            if sqlstate_of(error) not in _CLOSED:
                raise
            refusal = refusal or error
    assert refusal is not None
    raise refusal


async def _close(connection: Any) -> None:
    try:
        await connection.close(timeout=_FAREWELL)
    except Exception:
        logger.debug("closing a connection failed; it is dropped", exc_info=True)
    finally:
        connection.terminate()
