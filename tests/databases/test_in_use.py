"""Templates and databases in use: waited for, named in the error, or ended by force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from pgtoolset import DatabaseInUseError, create_database, databases, drop_database
from pgtoolset._postgres.databases import users_of
from pgtoolset.databases import seal_database
from pgtoolset.testing import EmbeddedServer
from tests.databases.making import PREFIX, exists
from tests.support import until

pytestmark = pytest.mark.usefixtures("databases_gone")


async def test_copy(server_url: str, connect_to: Callable[..., Any]) -> None:
    """The copy of a template has its tables and rows."""
    await create_database(f"{PREFIX} model", server_url=server_url)
    connection = await connect_to(f"{PREFIX} model")
    await connection.execute("CREATE TABLE number AS SELECT generate_series(1, 3) AS n")
    await connection.close()
    await create_database(f"{PREFIX} copy", server_url=server_url, template=f"{PREFIX} model")
    connection = await connect_to(f"{PREFIX} copy")
    assert await connection.fetchval("SELECT sum(n) FROM number") == 6
    await connection.close()


async def test_template_is_left_in_time(
    server_url: str, other: asyncpg.Connection, connect_to: Any
) -> None:
    """A template in use is waited for, and new sessions wait until it is copied."""
    model, copy = f"{PREFIX} model", f"{PREFIX} copy"
    await create_database(model, server_url=server_url)
    connection = await connect_to(model)
    work = asyncio.create_task(create_database(copy, server_url=server_url, template=model))

    async def creating() -> bool:
        query = """SELECT EXISTS (SELECT FROM pg_stat_activity
                   WHERE query LIKE 'CREATE DATABASE%' AND state = 'active')"""
        return bool(await other.fetchval(query))

    await until(creating)
    newcomer = asyncio.create_task(connect_to(model))

    async def kept_out() -> bool:
        query = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'object' AND NOT granted)"
        return bool(await other.fetchval(query))

    await until(kept_out)
    await connection.close()
    await work
    assert await exists(other, copy)
    await (await newcomer).close()


async def test_template_stays_in_use(
    server_url: str, connect_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that stays in use is an error that names its sessions, and nothing was created."""
    monkeypatch.setattr(databases, "TRIES", 1)
    model, copy = f"{PREFIX} model", f"{PREFIX} copy"
    await create_database(model, server_url=server_url)
    connection = await connect_to(model, application_name="who forgot")
    await connection.execute("SELECT 'forgotten'")
    with pytest.raises(DatabaseInUseError, match="who forgot") as raised:
        await create_database(copy, server_url=server_url, template=model)
    assert raised.value.database == model
    (session,) = raised.value.sessions
    assert (session.pid, session.query) == (connection.get_server_pid(), "SELECT 'forgotten'")
    await connection.close()


async def test_sealed_template(server_url: str, connect_to: Any) -> None:
    """A sealed template refuses connections, is copied at once, and its copies accept them."""
    model, copy = f"{PREFIX} model", f"{PREFIX} copy"
    await create_database(model, server_url=server_url)
    connection = await connect_to(model)
    await seal_database(model, server_url=server_url)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.fetchval("SELECT 1")
    await connection.close()
    with pytest.raises(asyncpg.PostgresError, match="not currently accepting"):
        await connect_to(model)
    await create_database(copy, server_url=server_url, template=model)
    await (await connect_to(copy)).close()
    await drop_database(model, server_url=server_url)


async def test_drop_in_use(server_url: str, other: asyncpg.Connection, connect_to: Any) -> None:
    """A database in use stays, and the error names its sessions; force ends them and drops it."""
    name = f"{PREFIX} busy"
    await create_database(name, server_url=server_url)
    connection = await connect_to(name, application_name="busy one")
    with pytest.raises(DatabaseInUseError, match="busy one") as raised:
        await drop_database(name, server_url=server_url)
    assert [session.pid for session in raised.value.sessions] == [connection.get_server_pid()]
    assert await exists(other, name)
    await drop_database(name, server_url=server_url, force=True)
    assert not await exists(other, name)
    await connection.close()


async def test_drop_by_force_under_an_engine(server_url: str, other: asyncpg.Connection) -> None:
    """A pool that still has connections does not prevent a drop by force."""
    name = f"{PREFIX} pool"
    await create_database(name, server_url=server_url)
    engine = create_async_engine(make_url(server_url).set(database=name))
    async with engine.connect() as connection:
        await connection.exec_driver_sql("SELECT 1")
        await drop_database(name, server_url=server_url, force=True)
        await connection.invalidate()
    await engine.dispose()
    assert not await exists(other, name)


async def test_autovacuum_is_in_nobodys_way() -> None:
    """An autovacuum worker, which PostgreSQL itself ends, is not named as a session in the way."""
    settings = {
        "autovacuum_naptime": "1s",
        "autovacuum_vacuum_cost_delay": "100ms",
        "autovacuum_vacuum_cost_limit": "1",
        "autovacuum_vacuum_threshold": "1",
    }
    server = EmbeddedServer(settings=settings)
    await asyncio.to_thread(server.start)
    try:
        url = server.url(driver="postgresql")
        await create_database("vacuumed", server_url=url)
        vacuumed = server.url("vacuumed", driver="postgresql")
        connection, onlooker = await asyncpg.connect(vacuumed), await asyncpg.connect(url)
        try:
            await connection.execute("CREATE TABLE t AS SELECT generate_series(1, 100000) AS n")
            await connection.execute("UPDATE t SET n = n + 1")
            pids: list[int] = []

            async def is_asked_meanwhile() -> bool:
                began = await is_vacuumed(onlooker)
                pids[:] = [user.pid for user in await users_of(onlooker, "vacuumed")]
                return began and await is_vacuumed(onlooker)

            await until(is_asked_meanwhile)
            assert pids == [connection.get_server_pid()]
        finally:
            await connection.close()
            await onlooker.close()
    finally:
        await asyncio.to_thread(server.stop)


async def is_vacuumed(onlooker: asyncpg.Connection) -> bool:
    return await onlooker.fetchval(
        """SELECT EXISTS (SELECT FROM pg_stat_activity
           WHERE datname = 'vacuumed' AND backend_type = 'autovacuum worker')"""
    )
