"""A connection that was detached from its pool: each function of a session works as on another."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from inspect import isclass, signature
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

import pgtoolset
from pgtoolset import (
    WaitTimeoutError,
    advisory_lock,
    cleanup_tables,
    driver_connection,
    get_transaction,
    list_lock_waits,
    lock_rows,
    lock_tables,
    m2m_add,
    m2m_add_many,
    m2m_remove,
    m2m_set,
    on_commit,
    release_connection,
    wait_for_row_change,
)
from tests.tagged import Post, Tagged

Function = Callable[[AsyncSession], Awaitable[object]]

SOURCES = Path(pgtoolset.__file__).parent


async def blocks(session: AsyncSession) -> None:
    async with get_transaction(session):
        await session.execute(text("SELECT 1"))


async def table_locks(session: AsyncSession) -> None:
    async with lock_tables(session, [Post]):
        pass


async def row_locks(session: AsyncSession) -> list[int]:
    return [each.id for each in await lock_rows(session, Post, [1])]


async def advisory_locks(session: AsyncSession) -> None:
    async with advisory_lock(session, 1):
        pass


async def lent(session: AsyncSession) -> None:
    async with driver_connection(session) as connection:
        await connection.execute("SELECT 1")


async def released(session: AsyncSession) -> str:
    """The modes of the transaction come back."""
    await session.execute(text("SELECT 1"))
    async with release_connection(session):
        pass
    return str(await session.scalar(text("SHOW transaction_read_only")))


async def changes(session: AsyncSession) -> None:
    with pytest.raises(WaitTimeoutError):
        await wait_for_row_change(session, Post, 1, timeout=0)


async def many(session: AsyncSession) -> int:
    return await m2m_add_many(session, Post.tags, [(1, 1)], ignore_conflicts=True)


async def sets(session: AsyncSession) -> object:
    return await m2m_set(session, await session.get_one(Post, 1), Post.tags, pks=[1])


async def adds(session: AsyncSession) -> object:
    post = await session.get_one(Post, 1)
    return await m2m_add(session, post, Post.tags, pks=[1], ignore_conflicts=True)


async def removes(session: AsyncSession) -> object:
    return await m2m_remove(session, await session.get_one(Post, 1), Post.tags, pks=[1])


async def callbacks(session: AsyncSession) -> None:
    on_commit(session, list)


#: By name, each function of the package that takes a session.
FUNCTIONS: dict[str, Function] = {
    "advisory_lock": advisory_locks,
    "cleanup_tables": lambda session: cleanup_tables(session, Tagged),
    "driver_connection": lent,
    "get_transaction": blocks,
    "list_lock_waits": list_lock_waits,
    "lock_rows": row_locks,
    "lock_tables": table_locks,
    "m2m_add": adds,
    "m2m_add_many": many,
    "m2m_remove": removes,
    "m2m_set": sets,
    "on_commit": callbacks,
    "release_connection": released,
    "wait_for_row_change": changes,
}

#: One row for each function to work with.
FILL = """
WITH links AS (DELETE FROM tagged_post_tag),
     tags AS (INSERT INTO tagged_tag VALUES (1) ON CONFLICT DO NOTHING)
INSERT INTO tagged_post VALUES (1) ON CONFLICT DO NOTHING
"""

OPTIONS: list[dict[str, Any]] = [
    {},
    {"isolation_level": "AUTOCOMMIT"},
    {"postgresql_readonly": True},
]


@asynccontextmanager
async def connected(engine: AsyncEngine, *, is_detached: bool) -> AsyncIterator[AsyncConnection]:
    """A connection of an engine."""
    async with engine.connect() as connection:
        pooled: Any = await connection.get_raw_connection()
        raw = pooled.driver_connection
        if is_detached:
            pooled.detach()
        yield connection
    if is_detached:
        await raw.close()  # SQLAlchemy leaves one of psycopg to its destructor


async def outcome(function: Function, connection: AsyncConnection, *, in_unit: bool) -> object:
    """What a function returns, or the error that it raises."""
    session = AsyncSession(connection)
    try:
        async with session, get_transaction(session) if in_unit else nullcontext():
            return repr(await function(session))
    except Exception as error:
        return type(error), re.sub(r"\d+", "N", str(error))


async def outcomes(
    engine: AsyncEngine, options: dict[str, Any], *, is_detached: bool
) -> dict[tuple[str, bool], object]:
    """The outcome of each function, in a unit of work and without one."""
    found = {}
    for name, function in FUNCTIONS.items():
        for in_unit in (False, True):
            async with engine.begin() as connection:
                await connection.execute(text(FILL))
            optional = engine.execution_options(**options)
            async with connected(optional, is_detached=is_detached) as connection:
                found[name, in_unit] = await outcome(function, connection, in_unit=in_unit)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_each_function(engine: AsyncEngine, options: dict[str, Any]) -> None:
    """A function does on a detached connection what it does on one of the pool, whatever the
    options of the engine, and raises the same errors."""
    async with engine.begin() as connection:
        await connection.run_sync(Tagged.metadata.create_all)
    attached = await outcomes(engine, options, is_detached=False)
    assert await outcomes(engine, options, is_detached=True) == attached
    async with engine.begin() as connection:
        await connection.run_sync(Tagged.metadata.drop_all)


def test_every_function_is_here() -> None:
    """Each function of the package that takes a session is in the list."""
    taking = {
        name
        for name in pgtoolset.__all__
        if callable(public := getattr(pgtoolset, name))
        and not isclass(public)
        and next(iter(signature(public).parameters)) in ("session", "connection_or_session")
    }
    assert taking == FUNCTIONS.keys()


#: Where SQLAlchemy's `driver_connection` is read of what cannot be detached: of an adapter or an
#: entry of a pool, of the first connection of an engine, and of one that was just made.
ELSEWHERE = {
    "_postgres/connections.py",
    "_postgres/discards.py",
    "_postgres/engines.py",
    "_postgres/holders.py",
    "_postgres/link.py",
    "_postgres/pooling.py",
    "testing/joining.py",
}


def test_one_place_knows() -> None:
    """The driver's connection, which SQLAlchemy does not name where it is detached, is read in the
    package of the drivers, and elsewhere only where it cannot be."""
    reading = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if "drivers" not in path.parts
        and re.search(r"[\w)]\.driver_connection\b(?!\")", path.read_text())
    }
    assert reading == ELSEWHERE
