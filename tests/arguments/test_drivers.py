"""Each public function refuses another driver, another database and another server, before SQL."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

import pgtoolset
from pgtoolset import (
    ReadReplicas,
    RowWatcher,
    create_db_context,
    create_db_dependency,
    create_read_dependency,
    get_transaction,
    on_commit,
    run_transaction,
    testing,
)
from pgtoolset.errors import UnsupportedDriverError
from tests.arguments.test_bad_input import CALLS, Call, carried_out
from tests.support import connect_args, insert, until


class Cockroach(PGDialect_asyncpg):
    """A dialect of another database over a driver that is supported."""

    name = "cockroachdb"
    supports_statement_cache = True


registry.impls["cockroachdb.asyncpg"] = lambda: Cockroach

#: Async engines of other databases. No server answers at an address.
OTHERS = ["sqlite+aiosqlite://", "cockroachdb+asyncpg://u:secret@127.0.0.1:9/d"]

#: The functions that use a session, its factory or an engine.
USERS = [
    call
    for call in CALLS
    if {"session", "session_maker", "engine", "connection_or_session"} & set(call.arguments)
]


@pytest.mark.parametrize("url", OTHERS)
@pytest.mark.parametrize("call", USERS, ids=lambda call: call.name)
async def test_another_engine(call: Call, url: str) -> None:
    """The error names what the engine uses and what to use, and nothing has connected."""
    engine = create_async_engine(url)
    connected: list[object] = []
    event.listen(engine.sync_engine, "do_connect", lambda *_: connected.append(1))
    maker = async_sessionmaker(engine)
    async with maker() as session:
        given = {"session": session, "session_maker": maker, "engine": engine}
        given["connection_or_session"] = session
        arguments = {
            name: given.get(name, value() if callable(value) and name in MADE else value)
            for name, value in call.arguments.items()
        }
        name = url.partition(":")[0]
        with pytest.raises(UnsupportedDriverError) as caught:
            if call.function in (create_db_context, create_db_dependency):
                await opened(call.function(**arguments))
            else:
                await carried_out(call.function, arguments)
        assert f"uses {name}," in str(caught.value)
        assert "postgresql+psycopg" in str(caught.value)
        assert "secret" not in str(caught.value)
    assert connected == []
    await engine.dispose()


MADE = ("instance", "related")


async def opened(made: Any) -> None:
    """Use what `create_db_context` or `create_db_dependency` has made."""
    result = made()
    if hasattr(result, "__aenter__"):
        async with result:
            raise AssertionError("the block has begun")
    async for _ in result:
        raise AssertionError("the block has begun")


URL_USERS = [call for call in CALLS if {"server_url", "database_url"} & set(call.arguments)]


@pytest.mark.parametrize("driver", ["psycopg2", "pg8000", "aiopg"])
@pytest.mark.parametrize("call", URL_USERS, ids=lambda call: call.name)
async def test_another_driver_in_a_url(call: Call, driver: str) -> None:
    """A URL that names a driver which is not used is refused by the name of the argument."""
    arguments = dict(call.arguments)
    (name,) = {"server_url", "database_url"} & set(arguments)
    arguments[name] = f"postgresql+{driver}://u:secret@127.0.0.1:9/d"
    with pytest.raises(UnsupportedDriverError, match=f"^{name} names the driver {driver}"):
        await carried_out(call.function, arguments)


async def _read(replicas: ReadReplicas) -> None:
    async with replicas.read():
        raise AssertionError("the block has begun")


async def _run(replicas: ReadReplicas) -> None:
    async def work(session: AsyncSession) -> None:
        raise AssertionError("the work has begun")

    await replicas.run(work)


async def _depend(replicas: ReadReplicas) -> None:
    await opened(create_read_dependency(replicas))


@pytest.mark.parametrize("url", OTHERS)
@pytest.mark.parametrize("use", [_read, _run, _depend])
@pytest.mark.parametrize("others", ["primary and standby", "standby"])
async def test_another_node(
    use: Callable[[ReadReplicas], Any], url: str, others: str, database_url: str
) -> None:
    """A read block refuses a node of another engine, and does not leave it out as one that is
    away."""
    engine = create_async_engine(url)
    primary = create_async_engine(database_url) if others == "standby" else engine
    replicas = ReadReplicas(async_sessionmaker(primary), [async_sessionmaker(engine)])
    for _ in range(2):
        with pytest.raises(
            UnsupportedDriverError, match=re.escape(f"uses {url.partition(':')[0]},")
        ):
            await use(replicas)
    await engine.dispose()
    await primary.dispose()


#: A `ReadReplicas` has factories of sessions, and its methods no argument of that kind.
OF_REPLICAS = {
    "ReadReplicas",
    "ReadReplicas.install",
    "ReadReplicas.read",
    "ReadReplicas.run",
    "create_read_dependency",
}


WITHOUT_DATABASE = {
    "create_test_client",
    "deadline",
    "install_error_handlers",
    "problem_responses",
    "row_change_trigger",
}


def test_every_function_is_tried() -> None:
    """What is in neither list takes no session, no engine and no URL."""
    others = {call.name for call in CALLS} - {call.name for call in USERS + URL_USERS}
    assert others == WITHOUT_DATABASE | OF_REPLICAS
    assert pgtoolset.__all__ and testing.__all__


async def test_watcher_on_psycopg(database_url: str) -> None:
    """A RowWatcher says that it needs asyncpg."""
    engine = create_async_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    with pytest.raises(UnsupportedDriverError, match="must use asyncpg"):
        RowWatcher(engine)


# A session that learns its engine with the first statement


@pytest.fixture
async def blocking(database_url: str) -> AsyncIterator[Engine]:
    """An engine of psycopg without async, which an own `get_bind` may give by mistake."""
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, poolclass=NullPool)
    yield engine
    engine.dispose()


async def by_context(maker: Any) -> None:
    async with create_db_context(maker)() as session:
        await insert(session, 1)


async def by_transaction(maker: Any) -> None:
    async with maker() as session, get_transaction(session):
        await insert(session, 1)


async def by_options(maker: Any) -> None:
    async with maker() as session, get_transaction(session, read_only=True):
        await insert(session, 1)


async def by_run_transaction(maker: Any) -> None:
    await run_transaction(maker, lambda session: insert(session, 1))


async def by_on_commit(maker: Any) -> None:
    async with maker() as session, session.begin():
        on_commit(session, print)
        await insert(session, 1)


async def by_lock(maker: Any) -> None:
    async with maker() as session, pgtoolset.advisory_lock(session, 1):
        raise AssertionError("the block has begun")


@pytest.mark.parametrize(
    "use",
    [by_context, by_transaction, by_options, by_run_transaction, by_on_commit, by_lock],
)
async def test_found_out_with_the_connection(blocking: Engine, use: Callable[..., Any]) -> None:
    """Where only a statement tells the engine, it is refused before that is sent."""

    class Routing(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return blocking

    sent: list[str] = []
    event.listen(blocking, "before_cursor_execute", lambda *arguments: sent.append(arguments[2]))
    with pytest.raises(UnsupportedDriverError, match=r"the synchronous postgresql\+psycopg"):
        await use(async_sessionmaker(class_=AsyncSession, sync_session_class=Routing))
    assert sent == []


@pytest.mark.parametrize("error", [AssertionError, OSError, asyncio.CancelledError])
async def test_first_connection_that_fails(
    database_url: str, other: asyncpg.Connection, error: type[BaseException]
) -> None:
    """A first connection is closed where the server's version cannot be read, and the next one
    serves."""

    def fail(*_: Any) -> None:
        raise error

    async def is_closed() -> bool:
        named = "SELECT FROM pg_stat_activity WHERE application_name = 'first connection'"
        return not await other.fetch(named)

    engine = create_async_engine(
        database_url, connect_args=connect_args(application_name="first connection")
    )
    db_context = create_db_context(async_sessionmaker(engine))
    methods: dict[str, Any] = vars(engine.dialect)
    methods["_get_server_version_info"] = fail
    with pytest.raises(UnsupportedDriverError if error is AssertionError else error):
        async with db_context() as session:
            await insert(session, 1)
    await until(is_closed)
    del methods["_get_server_version_info"]
    async with db_context() as session:
        assert await session.scalar(text("SELECT 1")) == 1
    await engine.dispose()


# A server that speaks PostgreSQL's protocol


COCKROACH = "CockroachDB CCL v24.3.1 (x86_64-pc-linux-gnu, built 2024/12/13, go1.22.8)"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_another_server(empty_database: str, driver: str) -> None:
    """A server whose version is not PostgreSQL's is refused at the first connection, and again."""
    url = make_url(empty_database)
    admin = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.execute(text("SET allow_system_table_mods = on"))
        await connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION pg_catalog.version() RETURNS text LANGUAGE sql"
            f" AS $$ SELECT '{COCKROACH}'::text $$"
        )
    try:
        engine = create_async_engine(url.set(drivername=f"postgresql+{driver}"))
        for _ in range(2):
            with pytest.raises(UnsupportedDriverError, match="CockroachDB"):
                async with create_db_context(async_sessionmaker(engine))() as session:
                    await insert(session, 1)
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await engine.dispose()
    finally:
        async with admin.connect() as connection:
            await connection.execute(text("SET allow_system_table_mods = on"))
            await connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION pg_catalog.version() RETURNS text LANGUAGE internal"
                " STABLE STRICT PARALLEL SAFE AS 'pgsql_version'"
            )
        await admin.dispose()
