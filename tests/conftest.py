"""A database for the run, tables for each test, and the promise that no test leaves a connection
behind."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator

import asyncpg
import fastapi  # noqa: F401 - imported here, and not by a test while blocking calls are forbidden
import pytest
from blockbuster import blockbuster_ctx
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from tests.support import Base, plain_url, wait_until_idle


def pytest_configure(config: pytest.Config) -> None:
    """The version of the embedded PostgreSQL is that of the environment, where `make test-minimum`
    sets it."""
    config.option.pg_version = config.option.pg_version or os.environ.get("POSTGRES_VERSION")
    # A run that was started in the background ignores SIGINT, and so would the processes that tests
    # interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server_url(pg_server_url: str) -> str:
    """The URL of a server: DATABASE_URL where it is set, the embedded one of POSTGRES_VERSION (18)
    otherwise."""
    return pg_server_url


@pytest.fixture(scope="session")
def database_url(pg_database_url: str) -> str:
    """The URL of a database that this run has made and drops, with the tables of `support.Base`."""
    return pg_database_url


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with a pool of 5 and not one more; afterwards the pool must be whole and the tables
    are emptied."""
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
            function.can_block_in(
                "linecache.py", "updatecache"
            )  # a traceback that is logged reads the source
        yield
