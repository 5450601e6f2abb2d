"""The pytest plugin of pgtoolset: what pytest loads in every run, so it imports nothing but pytest.

All that has to do with PostgreSQL is in `pgtoolset.testing` and is imported when a test asks for a
fixture: a run that asks for none does not pay for SQLAlchemy. That is why this is a package beside
`pgtoolset`, whose import would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from pytest_pgtoolset._broker import Broker

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

    from pytest_pgtoolset._joined import Connections, JoinedSessions
    from pytest_pgtoolset._provisioning import Provision

_BROKER = pytest.StashKey[Broker]()
_PROVISION = pytest.StashKey["Provision"]()
_PASSED = pytest.StashKey[bool]()

_MARKER = (
    "pg_commit: sessions of this test commit for real, to several connections if it likes; "
    "afterwards the database is made as it was"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pgtoolset", "PostgreSQL (pgtoolset)")
    group.addoption(
        "--pg-url",
        metavar="URL",
        help="a PostgreSQL server, on which the tests make their own databases",
    )
    group.addoption(
        "--pg-version", choices=["18", "16"], help="the version of the embedded PostgreSQL"
    )
    parser.addini(
        "pg_url",
        "like --pg-url; without both DATABASE_URL, and without that an embedded one",
        default="",
    )
    parser.addini("pg_version", "like --pg-version", default="18")
    parser.addini(
        "pg_metadata",
        "module:name of the MetaData or declarative base whose tables are made",
        default="",
    )
    parser.addini(
        "pg_migrate",
        "module:name of a function, sync or async, that is called with the URL",
        default="",
    )
    parser.addini(
        "pg_migrate_files", "files and folders that pg_migrate depends on", type="paths", default=[]
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    if config.getini("pg_metadata") and config.getini("pg_migrate"):
        raise pytest.UsageError(
            "the ini options pg_metadata and pg_migrate are both set; the template database is made by one of them"
        )
    if config.pluginmanager.has_plugin("asyncio"):
        config.pluginmanager.import_plugin("pytest_pgtoolset._asyncio")


def pytest_unconfigure(config: pytest.Config) -> None:
    with ExitStack() as stack:
        if _PROVISION in config.stash:
            stack.callback(config.stash[_PROVISION].close)
        if _BROKER in config.stash:
            stack.callback(config.stash[_BROKER].close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where to ask for the embedded server of the run."""
    config: pytest.Config = node.config
    if _BROKER not in config.stash:
        config.stash[_BROKER] = Broker(lambda: _provision(config).server_url())
    node.workerinput["pgtoolset"] = config.stash[_BROKER].address()


def pytest_itemcollected(item: pytest.Item) -> None:
    # First, so that it is torn down last: what the test leaves is cleaned when nobody is in it any
    # more.
    if isinstance(item, pytest.Function) and item.get_closest_marker("pg_commit") is not None:
        item.fixturenames.insert(0, "_pg_restored")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the server, the template and the database while pytest is busy with other things."""
    if not session.config.option.collectonly and any(map(_needs_our_server, session.items)):
        _provision(session.config).start()


def _needs_our_server(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or "pg_database_url" not in item.fixturenames:
        return False
    # A project that has a fixture pg_server_url of its own says where the server is when that is
    # set up.
    return len(item._fixtureinfo.name2fixturedefs.get("pg_server_url", ())) <= 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


def _provision(config: pytest.Config) -> Provision:
    provision = config.stash.get(_PROVISION, None)
    if provision is None:
        from pytest_pgtoolset._provisioning import Provision

        provision = config.stash[_PROVISION] = Provision(config)
    return provision


@pytest.fixture(scope="session")
def pg_server_url(pytestconfig: pytest.Config) -> str:
    """The URL of a PostgreSQL server: `--pg-url`, the ini option `pg_url`, DATABASE_URL, or an
    embedded server.

    All the workers of a run share it, and tests never write to the database in it.
    """
    return _provision(pytestconfig).server_url()


@pytest.fixture(scope="session")
def pg_database_url(pytestconfig: pytest.Config, pg_server_url: str) -> str:
    """The URL of this worker's own database, for SQLAlchemy: a copy of the template."""
    return _provision(pytestconfig).database_url(pg_server_url)


@pytest.fixture(scope="session")
def pg_engine(pg_database_url: str) -> AsyncEngine:
    """An engine on the worker's database, for any event loop and any thread: it keeps no
    connection.

    What a test writes through it stays, unless the test is marked with `pg_commit`.
    """
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    return create_async_engine(pg_database_url, poolclass=NullPool)


@pytest.fixture(scope="session")
def pg_session_options() -> dict[str, Any]:
    """What `pg_session_maker` is made with: override it to have a session class of your own."""
    return {"expire_on_commit": False}


@pytest.fixture
def pg_session_maker(request: pytest.FixtureRequest) -> async_sessionmaker[Any]:
    """A factory of sessions whose every change is gone after the test, even when they commit.

    All of them are joined to one connection, so one at a time is at work. In a test that is marked
    with `pg_commit` they have connections of their own, and commit.
    """
    if not _commits(request):
        joined: JoinedSessions = request.getfixturevalue(_for_the_loop(request, "joined"))
        return joined.session_maker
    from sqlalchemy.ext.asyncio import async_sessionmaker

    # With the same keywords as a joined one, for those who configure a factory of theirs with them.
    keywords = {"join_transaction_mode": "conditional_savepoint", "info": {}}
    options = keywords | request.getfixturevalue("pg_session_options")
    return async_sessionmaker(request.getfixturevalue("pg_engine"), **options)


@pytest.fixture
def pg_session(request: pytest.FixtureRequest, pg_session_maker: async_sessionmaker[Any]) -> Any:
    """A session of `pg_session_maker`: an `AsyncSession`, or what `pg_session_options` says."""
    if not _commits(request):
        joined: JoinedSessions = request.getfixturevalue(_for_the_loop(request, "joined"))
        return joined.session
    return request.getfixturevalue(_for_the_loop(request, "committing"))


def _commits(request: pytest.FixtureRequest) -> bool:
    return request.node.get_closest_marker("pg_commit") is not None


def _for_the_loop(request: pytest.FixtureRequest, what: str) -> str:
    """The name of the fixture that is set up and torn down in the event loop of the test."""
    config, item = request.config, request.node
    if config.pluginmanager.has_plugin("asyncio"):
        import pytest_asyncio

        if pytest_asyncio.is_async_test(item):
            marker = item.get_closest_marker("asyncio")
            keywords = marker.kwargs if marker is not None else {}
            scope = keywords.get("loop_scope") or keywords.get("scope")
            scope = scope or config.getini("asyncio_default_test_loop_scope") or "function"
            request.getfixturevalue(f"_pg_connection_{scope}")
            return f"_pg_{what}_{scope}"
    if "anyio_backend" in item.fixturenames:
        backend = request.getfixturevalue("anyio_backend")
        if (backend if isinstance(backend, str) else backend[0]) != "asyncio":
            raise pytest.UsageError(
                f"{request.fixturename} runs on asyncio alone, as asyncpg does, and anyio_backend is {backend!r}; "
                'define a fixture anyio_backend that returns "asyncio"'
            )
        return f"_pg_{what}_anyio"
    raise pytest.UsageError(
        f"{request.fixturename} is for async tests that pytest-asyncio or anyio runs, and {item.name} is not one: "
        "see docs/testing.md of pgtoolset for the markers. A sync test can have pg_session_maker where it is marked "
        "with pg_commit, and pg_engine"
    )


@pytest.fixture(scope="session")
def _pg_connections(pg_engine: AsyncEngine) -> Connections:
    from pytest_pgtoolset._joined import Connections

    return Connections(pg_engine)


def passed(request: pytest.FixtureRequest) -> bool:
    """Whether the test is over and has passed."""
    item: pytest.Item = request.node
    return item.stash.get(_PASSED, False)


@pytest.fixture
async def _pg_joined_anyio(
    request: pytest.FixtureRequest,
    anyio_backend: Any,
    _pg_connections: Connections,
    pg_session_options: dict[str, Any],
) -> AsyncIterator[JoinedSessions]:
    try:
        async with _pg_connections.sessions(pg_session_options, lambda: passed(request)) as joined:
            yield joined
    finally:
        await _pg_connections.close()


@pytest.fixture
async def _pg_committing_anyio(
    anyio_backend: Any, pg_session_maker: async_sessionmaker[Any]
) -> AsyncIterator[Any]:
    async with pg_session_maker() as session:
        yield session


@pytest.fixture
def _pg_restored(pytestconfig: pytest.Config, pg_database_url: str) -> Iterator[None]:
    yield
    _provision(pytestconfig).restore()
