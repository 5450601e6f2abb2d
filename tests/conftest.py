"""A server and a database for each worker, and the check that no test leaves a connection."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import asyncpg
import fastapi  # noqa: F401 - imported here, and not by a test while blocking calls are forbidden
import psycopg  # noqa: F401 - likewise
import pytest
import pytest_asyncio
from blockbuster import BlockBuster
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import holders
from pgtoolset.testing import EmbeddedServer, create_worker_database
from tests.nodes import node_pair, nodes  # noqa: F401 - fixtures
from tests.plugin.projects import Warm
from tests.support import (
    DRIVER,
    DRIVERNAME,
    Cleaner,
    Renewer,
    connect_args,
    plain_url,
    set_aside_what_lives,
)

MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    """Take the embedded PostgreSQL and the driver from the environment; `make` sets them there."""
    config.option.pg_version = config.option.pg_version or os.environ.get("POSTGRES_VERSION")
    config.option.pg_driver = DRIVER
    assert DRIVER in ("asyncpg", "psycopg"), DRIVER
    config.addinivalue_line(
        "markers",
        "asyncpg(reason): a test of what only asyncpg has, or only asyncpg needs; no other runs it",
    )
    # A run that was started in the background ignores SIGINT, and so would its child processes,
    # which some tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The tests start some hundred interpreters. Without files of bytecode each of them compiles
    # the package again, which takes twice as long as the rest of its start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if has_room_in_memory():
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave garbage alone while tests are collected: nearly all that is made then stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    set_aside_what_lives()


def pytest_itemcollected(item: pytest.Item) -> None:
    marker = item.get_closest_marker("asyncpg")
    if marker is not None and DRIVER != "asyncpg":
        item.add_marker(pytest.mark.skip(reason=f"for asyncpg only: {marker.kwargs['reason']}"))


def has_room_in_memory() -> bool:
    """Whether the data of servers, and other temporary files, can be in memory.

    A server starts from a copy of some 1000 files, which costs a file system on a disk three times
    as much, and the tests start some 40 servers.
    """
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return False
    state = os.statvfs(MEMORY)
    has_room = state.f_bavail * state.f_frsize >= 6 * 2**30
    return has_room and not state.f_flag & os.ST_NOEXEC


@pytest.fixture(scope="session")
def pg_server_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The server that is given, or an embedded one for each worker.

    Many tests look at everything that happens on a server: its databases, locks and sessions.
    """
    config = request.config
    if config.option.pg_url or os.environ.get("DATABASE_URL"):
        yield request.getfixturevalue("pg_server_url")
        return
    version: Literal[16, 18] = 16 if config.option.pg_version == "16" else 18
    settings = {"jit": "off", "max_wal_size": "256MB"}
    with EmbeddedServer(version=version, settings=settings) as server:
        yield server.url(driver=DRIVERNAME)


@pytest.fixture(scope="session")
def server_url(pg_server_url: str) -> str:
    """The URL of a server."""
    return pg_server_url


@pytest.fixture(scope="session")
def database_url(pg_database_url: str) -> str:
    """The URL of a database that this worker has made and drops, with the tables of `Base`."""
    return pg_database_url


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _second_database(server_url: str) -> AsyncIterator[str]:
    async with create_worker_database(server_url, "main", prefix="pgtoolset second") as url:
        yield url


@pytest.fixture(scope="session")
def renewer(server_url: str) -> Iterator[Renewer]:
    """Makes databases anew."""
    with closing(Renewer(server_url)) as renewer:
        yield renewer


@pytest.fixture
async def empty_database(_second_database: str, renewer: Renewer) -> AsyncIterator[str]:
    """The URL of a database that is made for the test: it has nothing of any other test.

    No session of the test may stay in a transaction.
    """
    renewer.make_anew(_second_database)
    yield _second_database
    await renewer.until_nothing_is_open(_second_database)


@pytest.fixture(scope="session")
def cleaner(database_url: str) -> Iterator[Cleaner]:
    """Empties the tables after each test."""
    with closing(Cleaner(database_url)) as cleaner:
        yield cleaner


@pytest.fixture
async def engine(database_url: str, cleaner: Cleaner) -> AsyncIterator[AsyncEngine]:
    """An engine with a pool of 5 connections. The test must return them; the tables are emptied."""
    engine = create_async_engine(
        database_url,
        pool_size=5,
        max_overflow=0,
        pool_timeout=5,
        connect_args=connect_args(application_name="tests"),
    )
    try:
        yield engine
        assert engine.pool.checkedout() == 0, "the test left a connection checked out"  # type: ignore[attr-defined]
        assert holders(engine) == []
        await cleaner.empty()
    finally:
        await engine.dispose()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all examples of a property."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared_engine(runner: asyncio.Runner, database_url: str) -> Iterator[AsyncEngine]:
    """One engine on one event loop for all examples."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    yield engine
    runner.run(engine.dispose())


@pytest.fixture
def session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection beside the engine: what it sees is stored."""
    connection = await asyncpg.connect(plain_url(database_url))
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process that runs the tests of a project without the start of an interpreter."""
    with Warm.started() as warm:
        yield warm


@pytest.fixture(scope="session")
def blockbuster() -> Iterator[BlockBuster]:
    """What fails a call in pgtoolset that blocks the event loop.

    To make it, and to put it in place, costs more than many a test, so it stays in place.
    """
    blockbuster = BlockBuster("pgtoolset")
    for function in blockbuster.functions.values():
        # asyncpg looks for ~/.pgpass, and a traceback that is logged reads the source.
        function.can_block_in("asyncpg/connect_utils.py", "_connect")
        function.can_block_in("linecache.py", "updatecache")
    yield blockbuster
    blockbuster.deactivate()


@pytest.fixture(autouse=True)
def no_blocking_calls(blockbuster: BlockBuster) -> None:
    """A call in pgtoolset that blocks the event loop fails the test."""
    blockbuster.activate()
