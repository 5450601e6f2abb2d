"""A database for the run, tables for each test, and the promise that no test leaves a connection behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import fastapi  # noqa: F401 - imported here, and not by a test while blocking calls are forbidden
import pytest
from blockbuster import blockbuster_ctx
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from pgtoolset.testing import EmbeddedServer

from .support import Base, plain_url, sqlalchemy_url, wait_until_idle

collect_ignore = ["user_project"]


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The URL of a server: DATABASE_URL where it is set, the embedded one of POSTGRES_VERSION (18) otherwise."""
    url = os.environ.get("DATABASE_URL")
    if url:
        yield sqlalchemy_url(url)
    else:
        version: Any = int(os.environ.get("POSTGRES_VERSION", "18"))
        with EmbeddedServer(version=version) as server:
            yield server.url()


@pytest.fixture(scope="session")
def database_url(server_url: str) -> Iterator[str]:
    """The URL of a database that this run makes and drops."""
    name = f"pgtoolset_tests_{os.getpid()}"

    async def run(*statements: str) -> None:
        connection = await asyncpg.connect(plain_url(server_url))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    async def create_tables(url: str) -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()

    asyncio.run(run(f"CREATE DATABASE {name}"))
    base, _, query = server_url.partition("?")
    url = f"{base.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
    try:
        asyncio.run(create_tables(url))
        yield url
    finally:
        asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with a pool of 5 and not one more; afterwards the pool must be whole and the tables are emptied."""
    engine = create_async_engine(
        database_url,
        pool_size=5,
        max_overflow=0,
        pool_timeout=5,
        connect_args={"server_settings": {"application_name": "tests"}},
    )
    try:
        yield engine
        assert engine.pool.checkedout() == 0, "the test left a connection checked out"  # type: ignore[attr-defined]
        async with engine.begin() as connection:
            await wait_until_idle(connection)
            for table in reversed(Base.metadata.sorted_tables):
                await connection.execute(table.delete())
    finally:
        await engine.dispose()


@pytest.fixture
def session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that has nothing to do with the engine: what it sees is stored."""
    connection = await asyncpg.connect(plain_url(database_url))
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A call in pgtoolset that blocks the event loop fails the test."""
    with blockbuster_ctx("pgtoolset") as blockbuster:
        for function in blockbuster.functions.values():
            function.can_block_in("asyncpg/connect_utils.py", "_connect")  # looks for ~/.pgpass
            function.can_block_in("linecache.py", "updatecache")  # a traceback that is logged reads the source
        yield
