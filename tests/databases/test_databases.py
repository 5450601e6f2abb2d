"""`create_database` and `drop_database`: names, races, templates in use, and nothing half done."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from pgtoolset import (
    DatabaseExistsError,
    DatabaseInUseError,
    DatabaseNotFoundError,
    create_database,
    databases,
    drop_database,
)
from pgtoolset._postgres.databases import users_of
from pgtoolset.databases import seal_database
from pgtoolset.testing import EmbeddedServer
from tests.support import Interrupted, plain_url, until

PREFIX = "pgtoolset databases"
NAMES = [
    "plain",
    "MixedCase",
    'two words, a "quote"; DROP TABLE item; --',
    "per%cent & ampersand ? # / \\ $$",
    "ünïcödé 数据库 🐘",
    "x" * (63 - len(PREFIX) - 1),
    "ü" * ((63 - len(PREFIX) - 1) // 2),
    " blank at both ends ",
    "new\nline",
]


async def exists(connection: asyncpg.Connection, name: str) -> bool:
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name
        )
    )


@pytest.fixture
async def databases_gone(other: asyncpg.Connection) -> AsyncIterator[None]:
    """Drop each database that a test has created under the prefix."""
    yield
    for name in await other.fetch(
        "SELECT datname FROM pg_database WHERE starts_with(datname, $1)", PREFIX
    ):
        await other.execute('DROP DATABASE "{}" WITH (FORCE)'.format(name[0].replace('"', '""')))


pytestmark = pytest.mark.usefixtures("databases_gone")


@pytest.fixture
def connect_to(server_url: str) -> Callable[..., Any]:
    """Connects to a database of any name."""

    async def connect(name: str, **settings: str) -> asyncpg.Connection:
        return await asyncpg.connect(plain_url(server_url), database=name, server_settings=settings)

    return connect


# Names


@pytest.mark.parametrize("suffix", NAMES)
async def test_any_name(
    server_url: str, other: asyncpg.Connection, connect_to: Callable[..., Any], suffix: str
) -> None:
    """Every name that PostgreSQL can hold makes a database of exactly that name."""
    name = f"{PREFIX} {suffix}"
    await create_database(name, server_url=server_url)
    connection = await connect_to(name)
    assert await connection.fetchval("SELECT current_database()") == name
    await connection.close()
    await drop_database(name, server_url=server_url)
    assert not await exists(other, name)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", ValueError),
        ("x" * 64, ValueError),
        ("ü" * 32, ValueError),
        ("a\0b", ValueError),
        ("\ud800", ValueError),
        (None, TypeError),
        (b"bytes", TypeError),
        (7, TypeError),
    ],
)
async def test_bad_names(name: Any, error: type[Exception]) -> None:
    """A name that PostgreSQL cannot hold is refused before any SQL: there is no server here."""
    nowhere = "postgresql://nobody@127.0.0.1:1/nothing"
    with pytest.raises(error, match="db_name"):
        await create_database(name, server_url=nowhere)
    with pytest.raises(error, match="db_name"):
        await drop_database(name, server_url=nowhere)
    with pytest.raises(error, match="db_name"):
        await seal_database(name, server_url=nowhere)
    if name is not None:
        with pytest.raises(error, match="template"):
            await create_database("fine", server_url=nowhere, template=name)


# The server


@pytest.mark.parametrize(
    "database", ["postgres", "template1", None, "pgtoolset databases that is not there"]
)
@pytest.mark.parametrize(
    "driver", ["postgresql+asyncpg", "postgresql", "postgres", "postgresql+psycopg"]
)
async def test_any_url(
    server_url: str, other: asyncpg.Connection, driver: str, database: str | None
) -> None:
    """A URL of any form, with any database or none in it, finds the server."""
    url = make_url(server_url).set(drivername=driver)
    url = URL.create(driver, url.username, url.password, url.host, url.port, database, url.query)
    name = f"{PREFIX} url"
    await create_database(name, server_url=url)
    assert await exists(other, name)
    await drop_database(name, server_url=url.render_as_string(hide_password=False))
    assert not await exists(other, name)


async def test_url_of_the_database_itself(server_url: str, other: asyncpg.Connection) -> None:
    """The URL may name the very database that is made or dropped."""
    name = f"{PREFIX} itself"
    url = make_url(server_url).set(database=name)
    await create_database(name, server_url=url)
    await drop_database(name, server_url=url)
    assert not await exists(other, name)


async def test_arguments_of_the_url(server_url: str, other: asyncpg.Connection) -> None:
    """Parameters of SQLAlchemy's dialect and of libpq in the URL are understood."""
    url = make_url(server_url)
    with_cache = url.update_query_dict({"prepared_statement_cache_size": "0"})
    await create_database(f"{PREFIX} 1", server_url=with_cache)
    with_libpq = url.set(drivername="postgresql").update_query_dict(
        {"application_name": "x", "sslmode": "disable"}
    )
    await create_database(f"{PREFIX} 2", server_url=with_libpq)
    assert await exists(other, f"{PREFIX} 1")
    assert await exists(other, f"{PREFIX} 2")


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("sqlite://", ValueError),
        ("mysql://u:secret@h/x", ValueError),
        ("no URL: secret", ValueError),
        ("postgresql://u:secret@h:port/x", ValueError),
        (None, TypeError),
        (7, TypeError),
    ],
)
async def test_bad_urls(url: Any, error: type[Exception]) -> None:
    """A URL that leads to no PostgreSQL is refused, and the error does not show its password."""
    for call in (create_database, drop_database, seal_database):
        with pytest.raises(error, match="server_url") as raised:
            await call("fine", server_url=url)
        assert "secret" not in str(raised.value)


async def test_maintenance_database_is_closed(
    server_url: str, other: asyncpg.Connection, connect_to: Callable[..., Any]
) -> None:
    """Where `postgres` refuses connections, the database of the URL is used."""
    name = f"{PREFIX} door"
    await create_database(name, server_url=server_url)
    url = make_url(server_url).set(database=name)
    await other.execute("ALTER DATABASE postgres WITH ALLOW_CONNECTIONS false")
    try:
        await create_database(f"{PREFIX} house", server_url=url)
        assert await exists(other, f"{PREFIX} house")
        await create_database(
            f"{PREFIX} other", server_url=url.set(database="postgres")
        )  # through template1
        assert await exists(other, f"{PREFIX} other")
    finally:
        await other.execute("ALTER DATABASE postgres WITH ALLOW_CONNECTIONS true")


async def test_no_server() -> None:
    """A server that cannot be reached is the driver's own error, at once."""
    with pytest.raises(OSError):
        await create_database("fine", server_url="postgresql+asyncpg://nobody@127.0.0.1:1/x")


# There already, not there


async def test_exists_already(server_url: str, connect_to: Callable[..., Any]) -> None:
    """A database that exists is an error, or with exist_ok accepted and left as it is."""
    name = f"{PREFIX} twice"
    await create_database(name, server_url=server_url)
    connection = await connect_to(name)
    await connection.execute("CREATE TABLE kept ()")
    with pytest.raises(DatabaseExistsError, match=name):
        await create_database(name, server_url=server_url)
    await create_database(name, server_url=server_url, exist_ok=True)
    assert await connection.fetchval("SELECT to_regclass('kept')") == "kept"
    await connection.close()


async def test_not_there(server_url: str) -> None:
    """A missing database cannot be dropped, sealed or copied; missing_ok accepts it."""
    name = f"{PREFIX} missing"
    with pytest.raises(DatabaseNotFoundError, match=name):
        await drop_database(name, server_url=server_url)
    await drop_database(name, server_url=server_url, missing_ok=True)
    with pytest.raises(DatabaseNotFoundError, match=name):
        await seal_database(name, server_url=server_url)
    with pytest.raises(DatabaseNotFoundError, match=name):
        await create_database(f"{PREFIX} copy", server_url=server_url, template=name)


async def test_created_by_many_at_once(server_url: str, other: asyncpg.Connection) -> None:
    """Of many calls at a time one creates the database, and the others learn that it exists."""
    for number in range(3):
        name = f"{PREFIX} race {number}"
        await asyncio.gather(
            *(create_database(name, server_url=server_url, exist_ok=True) for _ in range(6))
        )
        assert await exists(other, name)
        name = f"{PREFIX} strict race {number}"
        results = await asyncio.gather(
            *(create_database(name, server_url=server_url) for _ in range(6)),
            return_exceptions=True,
        )
        assert results.count(None) == 1
        assert all(result is None or isinstance(result, DatabaseExistsError) for result in results)


# Templates


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


# Dropping what is in use


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


# Cancellation


async def backends(other: asyncpg.Connection) -> int:
    query = """SELECT count(*) FROM pg_stat_activity
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"""
    return int(await other.fetchval(query))


async def test_create_is_cancelled_everywhere(server_url: str, other: asyncpg.Connection) -> None:
    """Cancelled at any suspension, a call has created nothing, and no connection stays behind."""
    before = await backends(other)
    for n in range(1, 100):
        name = f"{PREFIX} cancelled {n}"
        interrupted = Interrupted(create_database(name, server_url=server_url), n)

        async def run(interrupted: Interrupted = interrupted) -> None:
            await interrupted

        task = asyncio.create_task(run())
        await asyncio.wait([task], timeout=20)
        assert task.done(), n
        assert await exists(other, name) == (not task.cancelled()), n
        if not interrupted.happened:
            break
    else:
        raise AssertionError("never finished")
    assert n > 3

    async def gone() -> bool:
        gc.collect()  # a cancelled task may be in a cycle, and a half-open connection with it
        return await backends(other) <= before

    await until(gone)


async def test_create_is_cancelled_while_it_waits(
    server_url: str, other: asyncpg.Connection, connect_to: Any
) -> None:
    """Cancelled while PostgreSQL waits for the template, a call has created nothing."""
    model, copy = f"{PREFIX} model", f"{PREFIX} copy"
    await create_database(model, server_url=server_url)
    connection = await connect_to(model)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await create_database(copy, server_url=server_url, template=model)
    await connection.close()
    assert not await exists(other, copy)


async def test_drop_is_cancelled_everywhere(
    server_url: str, other: asyncpg.Connection, connect_to: Any
) -> None:
    """Cancelled at any suspension, a drop has happened or not: what is left can be entered."""
    name = f"{PREFIX} cancelled"
    for n in range(1, 100):
        await create_database(name, server_url=server_url, exist_ok=True)
        interrupted = Interrupted(drop_database(name, server_url=server_url), n)

        async def run(interrupted: Interrupted = interrupted) -> None:
            await interrupted

        task = asyncio.create_task(run())
        await asyncio.wait([task], timeout=20)
        assert task.done(), n
        if await exists(other, name):
            await (await connect_to(name)).close()
        if not interrupted.happened:
            break
    else:
        raise AssertionError("never finished")


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
