"""The library behind PgBouncer in transaction mode: each transaction may have another backend.

Locks are in `tests/locks/test_pgbouncer.py`, and waiting in `tests/watch/test_pgbouncer.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    M2MChange,
    TransactionAbortedError,
    cleanup_tables,
    create_database,
    create_db_context,
    create_db_dependency,
    drop_database,
    get_transaction,
    m2m_add,
    m2m_add_many,
    m2m_remove,
    m2m_set,
    on_commit,
    run_transaction,
)
from pgtoolset.errors import PoolerError
from tests.nodes import Nodes
from tests.pgbouncer import BACKENDS, pgbouncer
from tests.support import Account, Base, insert, stored
from tests.tagged import Post, Tagged

#: The drivers, each with what it needs behind a pooler.
WITHOUT_CACHES: dict[str, dict[str, Any]] = {
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
    },
    "psycopg": {"prepare_threshold": None},
}

#: More clients than there are backends.
CLIENTS = 3 * BACKENDS

Maker = async_sessionmaker[AsyncSession]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pooler(database_url: str) -> AsyncIterator[str]:
    """The URL of the worker's database through PgBouncer."""
    async with pgbouncer(database_url) as url:
        yield url


def through(pooler: str, driver: str, **options: Any) -> AsyncEngine:
    url = make_url(pooler).set(drivername=f"postgresql+{driver}")
    return create_async_engine(url, pool_size=CLIENTS, connect_args=options)


@pytest.fixture(params=["asyncpg", "psycopg"])
async def bouncing(
    engine: AsyncEngine, pooler: str, request: pytest.FixtureRequest
) -> AsyncIterator[AsyncEngine]:
    """An engine as it has to be made for a pooler. That of the test empties the tables."""
    bouncing = through(pooler, request.param, **WITHOUT_CACHES[request.param])
    try:
        yield bouncing
        assert bouncing.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        await bouncing.dispose()


@pytest.fixture
def maker(bouncing: AsyncEngine) -> Maker:
    return async_sessionmaker(bouncing, expire_on_commit=False)


async def test_sessions(maker: Maker, other: asyncpg.Connection) -> None:
    """Units of work of more clients than backends commit or roll back, each its own."""
    db_context, get_db = create_db_context(maker), create_db_dependency(maker)

    async def unit(number: int) -> None:
        if number % 3 == 0:
            async for session in get_db():
                await insert(session, number)
        else:
            async with db_context() as session:
                await insert(session, number)
                if number % 3 == 1:
                    raise LookupError

    results = await asyncio.gather(
        *(unit(number) for number in range(10 * CLIENTS)), return_exceptions=True
    )
    assert await stored(other) == {number for number in range(10 * CLIENTS) if number % 3 != 1}
    for number, result in enumerate(results):
        assert isinstance(result, LookupError) if number % 3 == 1 else result is None


async def test_honest(maker: Maker, other: asyncpg.Connection) -> None:
    """Units that swallow an error and units beside them on the same backends tell the truth."""
    db_context = create_db_context(maker)

    async def unit(number: int) -> None:
        async with db_context() as session:
            await insert(session, number)
            if number % 2:
                try:
                    await session.execute(text("SELECT 1 / 0"))
                except DBAPIError:
                    pass

    results = await asyncio.gather(
        *(unit(number) for number in range(4 * CLIENTS)), return_exceptions=True
    )
    for number, result in enumerate(results):
        assert isinstance(result, TransactionAbortedError) if number % 2 else result is None
    assert await stored(other) == set(range(0, 4 * CLIENTS, 2))


async def test_transactions(maker: Maker, other: asyncpg.Connection) -> None:
    """Options hold for one transaction, and the next one on any backend has none; savepoints nest,
    and callbacks run after the commit of their own transaction."""
    modes = text(
        "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
        " current_setting('transaction_deferrable')"
    )
    options: dict[str, Any] = {
        "isolation_level": "SERIALIZABLE",
        "read_only": True,
        "deferrable": True,
    }
    log: list[int] = []

    async def run(number: int) -> None:
        async with maker() as session:
            async with get_transaction(session, **(options if number % 2 else {})):
                found = tuple((await session.execute(modes)).one())
                plain = ("read committed", "off", "off")
                assert found == (("serializable", "on", "on") if number % 2 else plain)
                if number % 2 == 0:
                    await insert(session, number)
                    on_commit(session, lambda: log.append(number))
                    with pytest.raises(LookupError):
                        async with get_transaction(session):
                            on_commit(session, lambda: log.append(-1))
                            await insert(session, number + 1)
                            raise LookupError

    await asyncio.gather(*(run(number) for number in range(6 * CLIENTS)))
    assert await stored(other) == set(log) == set(range(0, 6 * CLIENTS, 2))


async def test_run_transaction(maker: Maker, other: asyncpg.Connection) -> None:
    """Under SERIALIZABLE no update is lost."""
    async with maker.begin() as session:
        session.add(Account(id=1, balance=100))

    async def withdraw(session: AsyncSession) -> None:
        (await session.get_one(Account, 1)).balance -= 1

    await asyncio.gather(
        *(
            run_transaction(maker, withdraw, isolation_level="SERIALIZABLE", attempts=100)
            for _ in range(10)
        )
    )
    assert await other.fetchval("SELECT balance FROM account") == 90


async def test_many_to_many(maker: Maker, bouncing: AsyncEngine, other: asyncpg.Connection) -> None:
    """Associations are written by many clients at once, also after DDL on another backend."""
    async with bouncing.begin() as connection:
        await connection.run_sync(Tagged.metadata.create_all)
    try:
        await other.execute("INSERT INTO tagged_post SELECT generate_series(1, 20)")
        await other.execute("INSERT INTO tagged_tag SELECT generate_series(1, 20)")

        async def write(number: int) -> None:
            async with maker() as session, get_transaction(session):
                post = await session.get_one(Post, number)
                assert await m2m_add(session, post, Post.tags, pks=[1, 2, 3]) == 3
                change = await m2m_set(session, post, Post.tags, pks=[3, 4])
                assert change == M2MChange(added=1, removed=2)
                assert await m2m_remove(session, post, Post.tags, pks=[4]) == 1
                links = [(number, 5), (number, 6)]
                assert await m2m_add_many(session, Post.tags, links) == 2

        await asyncio.gather(*(write(number) for number in range(1, 11)))
        await other.execute("ALTER TABLE tagged_post_tag ADD COLUMN note text")
        await asyncio.gather(*(write(number) for number in range(11, 21)))
        rows = await other.fetch("SELECT post_id, tag_id FROM tagged_post_tag")
        expected = {(post, tag) for post in range(1, 21) for tag in (3, 5, 6)}
        assert {tuple(row)[:2] for row in rows} == expected
    finally:
        await other.execute("DROP TABLE tagged_post_tag, tagged_post, tagged_tag")


async def test_cleanup(maker: Maker, other: asyncpg.Connection) -> None:
    """The tables are empty and their sequences at the start."""
    async with maker.begin() as session:
        await insert(session, 1, 2)
        session.add(Account(balance=1))
    async with maker() as session:
        await cleanup_tables(session, Base)
    assert await stored(other) == set()
    async with maker.begin() as session:
        session.add(Account(balance=1))
    async with maker() as session:
        assert (await session.scalars(select(Account.id))).all() == [1]


async def test_databases(pooler: str) -> None:
    """Databases are created and dropped through the pooler as well."""
    name = f"pooled {uuid4()}"
    await create_database(name, server_url=pooler)
    await drop_database(name, server_url=pooler)
    await drop_database(name, server_url=pooler, missing_ok=True)


@pytest.mark.parametrize(
    ("driver", "option"),
    [("asyncpg", "statement_cache_size"), ("psycopg", "prepare_threshold")],
)
async def test_with_caches(engine: AsyncEngine, pooler: str, driver: str, option: str) -> None:
    """With the drivers' defaults the error names their options, and is still SQLAlchemy's."""
    bouncing = through(pooler, driver)
    db_context = create_db_context(async_sessionmaker(bouncing))

    async def unit() -> None:
        async with db_context() as session:
            await session.execute(text("SELECT pg_sleep(0.002)"))

    failures: list[BaseException] = []
    for _ in range(50):
        results = await asyncio.gather(*(unit() for _ in range(CLIENTS)), return_exceptions=True)
        failures += [result for result in results if result is not None]
        if failures:
            break
    assert failures
    for failure in failures:
        assert isinstance(failure, PoolerError) and isinstance(failure, DBAPIError)
        assert option in str(failure) and "max_prepared_statements" in str(failure)
        assert "\n" not in str(failure)
        assert failure.orig is not None and failure.statement == "SELECT pg_sleep(0.002)"
    await bouncing.dispose()


@pytest.mark.parametrize(
    ("driver", "options", "name"),
    [
        ("asyncpg", {"server_settings": {"search_path": "public"}}, "search_path"),
        ("psycopg", {"options": "-c search_path=public"}, "options"),
    ],
)
async def test_startup_parameters(
    pooler: str, driver: str, options: dict[str, Any], name: str
) -> None:
    """A parameter that the pooler refuses at the start is named, from the first connection on."""
    bouncing = through(pooler, driver, **WITHOUT_CACHES[driver], **options)
    # SQLAlchemy before 2.1 passes asyncpg's errors at the connection through; they name it as well.
    with pytest.raises((PoolerError, asyncpg.ProtocolViolationError), match=name) as caught:
        async with create_db_context(async_sessionmaker(bouncing))() as session:
            await session.execute(text("SELECT 1"))
    if isinstance(caught.value, PoolerError):
        assert "ignore_startup_parameters" in str(caught.value)
    await bouncing.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_moved_primary(nodes: Nodes, driver: str) -> None:
    """Behind a pooler the server is asked whether it is a standby: what a connection was told as it
    began is about another one. Nothing is replaced where a block is READ ONLY."""
    nodes.move(nodes.standby)
    async with pgbouncer(nodes.address()) as url:
        bouncing = through(url, driver, **WITHOUT_CACHES[driver])
        maker = async_sessionmaker(bouncing)

        async def write(**options: Any) -> None:
            with pytest.raises(DBAPIError, match="read-only"):
                async with maker() as session, get_transaction(session, **options):
                    await insert(session, 1)

        opened = set(await connections(bouncing))
        await write(read_only=True)
        assert set(await connections(bouncing)) == opened
        async with maker() as reader, get_transaction(reader):
            before = await reader.scalar(text("SELECT pg_backend_pid()"))
            await write()
            assert await reader.scalar(text("SELECT pg_backend_pid()")) == before
        assert not set(await connections(bouncing)) & opened
        calls = 0

        async def work(session: AsyncSession) -> None:
            nonlocal calls
            calls += 1
            await insert(session, 1)

        with pytest.raises(DBAPIError, match="read-only"):
            await run_transaction(maker, work, attempts=3)
        assert calls == 3
        await bouncing.dispose()


async def connections(engine: AsyncEngine) -> list[Any]:
    """Return the driver's connections that the pool gives out."""
    checked_out = [await engine.connect() for _ in range(CLIENTS)]
    drivers = [(await each.get_raw_connection()).driver_connection for each in checked_out]
    for each in checked_out:
        await each.close()
    return drivers
