"""The pytest plugin of pgtoolset.

pytest loads this module in every run of every project that has pgtoolset installed, so it imports
nothing but pytest. The rest of the package, and with it SQLAlchemy, is imported when a test asks
for a fixture. The plugin is not a part of `pgtoolset` because importing that imports SQLAlchemy.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

    from pytest_pgtoolset._binding import Bind
    from pytest_pgtoolset._broker import Broker
    from pytest_pgtoolset._clients import OpenClient
    from pytest_pgtoolset._joined import Connections, JoinedSessions
    from pytest_pgtoolset._provisioning import Provision

_BROKER: pytest.StashKey[Broker] = pytest.StashKey()
_PROVISION = pytest.StashKey["Provision"]()
_NO_SERVER = pytest.StashKey[bool]()
_PASSED = pytest.StashKey[bool]()

_MARKER = (
    "pg_commit: the sessions of this test have connections of their own and commit; "
    "the database is restored after the test"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pgtoolset", "PostgreSQL (pgtoolset)")
    group.addoption(
        "--pg-url",
        metavar="URL",
        help="a PostgreSQL server, on which the run makes databases of its own",
    )
    group.addoption(
        "--pg-version", choices=["18", "16"], help="the version of the embedded PostgreSQL"
    )
    group.addoption(
        "--pg-driver",
        choices=["asyncpg", "psycopg"],
        help="the driver of the URLs and of pg_engine",
    )
    group.addoption(
        "--pg-tcp",
        action="store_true",
        help="let the embedded PostgreSQL listen on 127.0.0.1 too, with a password",
    )
    parser.addini("pg_tcp", "like --pg-tcp", type="bool", default=False)
    parser.addini(
        "pg_url",
        "like --pg-url; without both, DATABASE_URL or an embedded server",
        default="",
    )
    parser.addini("pg_version", "like --pg-version", default="18")
    parser.addini(
        "pg_driver",
        "like --pg-driver; without both, the driver that the URL names, or else asyncpg",
        default="",
    )
    parser.addini(
        "pg_metadata",
        "module:name of the MetaData or declarative base whose tables are created",
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
            "the ini options pg_metadata and pg_migrate are both set; "
            "one of them makes the template database, so remove the other"
        )
    if _has_pytest_asyncio(config):
        config.pluginmanager.import_plugin("pytest_pgtoolset._asyncio")


def _has_pytest_asyncio(config: pytest.Config) -> bool:
    """Return whether pytest-asyncio runs, under whatever name it was loaded."""
    plugin = sys.modules.get("pytest_asyncio.plugin")
    return plugin is not None and config.pluginmanager.is_registered(plugin)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Drop a database that was made and that no fixture uses.

    The teardown of `pg_database_url` drops the one that tests have used. Both happen before a
    worker of pytest-xdist reports that it has finished: the controller kills workers 10 seconds
    after that, and the hooks of other plugins may take longer.
    """
    if _PROVISION in session.config.stash:
        session.config.stash[_PROVISION].drop_unused()
    if session.config.stash.get(_NO_SERVER, False):
        session.exitstatus = pytest.ExitCode.USAGE_ERROR  # as in a run without workers


def pytest_unconfigure(config: pytest.Config) -> None:
    with ExitStack() as stack:
        if _PROVISION in config.stash:
            stack.callback(config.stash[_PROVISION].close)
        if _BROKER in config.stash:
            stack.callback(config.stash[_BROKER].close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Send a worker of pytest-xdist the address of the embedded server's broker."""
    config: pytest.Config = node.config
    if _BROKER not in config.stash:
        from pytest_pgtoolset._broker import Broker

        config.stash[_BROKER] = Broker(lambda: _provision(config).server_url())
    node.workerinput["pgtoolset"] = config.stash[_BROKER].address()


def pytest_itemcollected(item: pytest.Item) -> None:
    # First, so it is torn down last, when the test's own fixtures have closed their connections.
    if isinstance(item, pytest.Function) and item.get_closest_marker("pg_commit") is not None:
        item.fixturenames.insert(0, "_pg_restored")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to make the server, the template and the database in the background."""
    if not session.config.option.collectonly and any(map(_needs_our_server, session.items)):
        _provision(session.config).start()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """End the run before its first test where the server that it is given cannot be reached."""
    if session.config.option.collectonly or not any(map(_needs_our_server, session.items)):
        return None
    try:
        _provision(session.config).check_given_server()
    except pytest.UsageError as error:
        output: Any = getattr(session.config, "workeroutput", None)
        if output is None:
            raise
        # A worker of pytest-xdist has no terminal: the controller prints this and stops the others.
        output["pgtoolset"] = "no server"
        session.shouldstop = str(error)
        return True
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if getattr(node, "workeroutput", {}).get("pgtoolset"):
        node.config.stash[_NO_SERVER] = True


def _needs_our_server(item: pytest.Item) -> bool:
    # Where a fixture of the project takes the place of pg_server_url, the closure lacks _pg_server.
    needed = {"pg_database_url", "_pg_server"}
    return isinstance(item, pytest.Function) and needed <= set(item.fixturenames)


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
def _pg_server(pytestconfig: pytest.Config) -> str:
    """The server of the plugin, as opposed to one of the project."""
    return _provision(pytestconfig).server_url()


@pytest.fixture(scope="session")
def pg_server_url(_pg_server: str) -> str:
    """The URL of a PostgreSQL server, which all workers of the run share.

    It is that of `--pg-url`, the ini option `pg_url` or DATABASE_URL, or of an embedded server. The
    plugin makes databases of its own there and does not write to the one in the URL.
    """
    return _pg_server


@pytest.fixture(scope="session")
def pg_database_url(pytestconfig: pytest.Config, pg_server_url: str) -> Iterator[str]:
    """The URL of this worker's own database, for SQLAlchemy: a copy of the template."""
    with _provision(pytestconfig).database(pg_server_url) as url:
        yield url


@pytest.fixture(scope="session")
def pg_engine(pg_database_url: str) -> AsyncEngine:
    """An engine on the worker's database that keeps no connection, for any event loop and thread.

    What a test writes through it stays, unless the test is marked with `pg_commit`.
    """
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    from pytest_pgtoolset._loops import refuse_other_loops

    engine = create_async_engine(pg_database_url, poolclass=NullPool)
    refuse_other_loops(engine)
    return engine


@pytest.fixture(scope="session")
def pg_session_options() -> dict[str, Any]:
    """The arguments of `pg_session_maker`. Override it for a session class of your own."""
    return {"expire_on_commit": False}


@pytest.fixture
def pg_session_maker(
    request: pytest.FixtureRequest, pg_engine: AsyncEngine
) -> async_sessionmaker[Any]:
    """A factory of sessions whose every change is gone after the test, even when they commit.

    All sessions are joined to one connection, so one statement runs at a time. In a test that is
    marked with `pg_commit` they have connections of their own, and commit.
    """
    if not _commits(request):
        joined: JoinedSessions = request.getfixturevalue(_for_the_loop(request, "joined"))
        return joined.session_maker
    from sqlalchemy.ext.asyncio import async_sessionmaker

    # The same keywords as a joined factory has, for code that copies them from one to another.
    keywords = {"join_transaction_mode": "conditional_savepoint", "info": {}}
    options = keywords | request.getfixturevalue("pg_session_options")
    return async_sessionmaker(pg_engine, **options)


@pytest.fixture
def pg_session(request: pytest.FixtureRequest, pg_session_maker: async_sessionmaker[Any]) -> Any:
    """A session of `pg_session_maker`."""
    if not _commits(request):
        joined: JoinedSessions = request.getfixturevalue(_for_the_loop(request, "joined"))
        return joined.session
    return request.getfixturevalue(_for_the_loop(request, "committing"))


@pytest.fixture
def pg_bind(pg_session_maker: async_sessionmaker[Any]) -> Iterator[Bind]:
    """A function that binds a factory of the application to the test until its end.

    The sessions that the factory opens afterwards are joined to the transaction of `pg_session`,
    for code that opens sessions itself. In a test that is marked with `pg_commit` they commit to
    the worker's database. What else the factory is configured with stays.
    """
    from pytest_pgtoolset._binding import bound_factories

    with bound_factories(pg_session_maker) as bind:
        yield bind


@pytest.fixture
def pg_client(request: pytest.FixtureRequest, pg_session_maker: Any) -> Iterator[OpenClient]:
    """A function that opens Starlette's `TestClient` on an application, for a sync test.

    The application runs in the event loop of `pg_session` and `pg_session_maker`, in a thread of
    the plugin, until the end of the test: `pg_client(app, dependency_overrides={...})`. Further
    keywords are those of `TestClient`. `client.portal.call(function)` runs an async function there.
    """
    if _asyncio_scope(request) is not None or "anyio_backend" in request.node.fixturenames:
        raise pytest.UsageError(
            f"pg_client is for sync tests, and {request.node.name} runs in an event loop: use "
            "pgtoolset.testing.create_test_client(app) there"
        )
    from pytest_pgtoolset._clients import clients_on

    with clients_on(request.getfixturevalue("_pg_portal")) as open_client:
        yield open_client


def _commits(request: pytest.FixtureRequest) -> bool:
    return request.node.get_closest_marker("pg_commit") is not None


def _for_the_loop(request: pytest.FixtureRequest, kind: str) -> str:
    """Return the name of the fixture that is set up and torn down in the event loop of the test."""
    scope = _asyncio_scope(request)
    if scope is not None:
        request.getfixturevalue(f"_pg_connection_{scope}")
        return f"_pg_{kind}_{scope}"
    if "anyio_backend" in request.node.fixturenames:
        backend = request.getfixturevalue("anyio_backend")
        if (backend if isinstance(backend, str) else backend[0]) != "asyncio":
            raise pytest.UsageError(
                f"{request.fixturename} works on asyncio only, as the drivers do; anyio_backend "
                f'is {backend!r}: define a fixture anyio_backend that returns "asyncio"'
            )
        return f"_pg_{kind}_anyio"
    if "pg_client" in request.node.fixturenames:
        return f"_pg_{kind}_portal"
    raise pytest.UsageError(
        f"{request.fixturename} is for async tests of pytest-asyncio or anyio, and "
        f"{request.node.name} is not one: see docs/testing.md of pgtoolset for the markers. A sync "
        "test can use pg_client, with it the sessions, and without it pg_engine, and "
        "pg_session_maker where it is marked with pg_commit"
    )


def _asyncio_scope(request: pytest.FixtureRequest) -> str | None:
    """Return the scope of the test's loop in pytest-asyncio, `None` for a test of another kind."""
    if not _has_pytest_asyncio(request.config):
        return None
    import pytest_asyncio

    if not pytest_asyncio.is_async_test(request.node):
        return None
    marker = request.node.get_closest_marker("asyncio")
    keywords = marker.kwargs if marker is not None else {}
    scope: str | None = keywords.get("loop_scope") or keywords.get("scope")
    return scope or request.config.getini("asyncio_default_test_loop_scope") or "function"


@pytest.fixture(scope="session")
def _pg_connections(pg_engine: AsyncEngine) -> Connections:
    from pytest_pgtoolset._joined import Connections

    return Connections(pg_engine)


def has_passed(request: pytest.FixtureRequest) -> bool:
    """Return whether the test has ended and passed."""
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
        options = pg_session_options
        async with _pg_connections.sessions(options, lambda: has_passed(request)) as joined:
            yield joined
    finally:
        await _pg_connections.close()


@pytest.fixture
async def _pg_committing_anyio(
    anyio_backend: Any, pg_session_maker: async_sessionmaker[Any]
) -> AsyncIterator[Any]:
    async with pg_session_maker() as session:
        yield session


@pytest.fixture(scope="session")
def _pg_portal(_pg_connections: Connections) -> Iterator[Any]:
    """An event loop in a thread, for the applications and the sessions of sync tests."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal:
        yield portal
        portal.call(_pg_connections.close)


@pytest.fixture
def _pg_joined_portal(
    request: pytest.FixtureRequest,
    _pg_portal: Any,
    _pg_connections: Connections,
    pg_session_options: dict[str, Any],
) -> Iterator[JoinedSessions]:
    block = _pg_connections.sessions(pg_session_options, lambda: has_passed(request))
    with _pg_portal.wrap_async_context_manager(block) as joined:
        yield joined


@pytest.fixture
def _pg_committing_portal(
    _pg_portal: Any, pg_session_maker: async_sessionmaker[Any]
) -> Iterator[Any]:
    with _pg_portal.wrap_async_context_manager(pg_session_maker()) as session:
        yield session


@pytest.fixture
def _pg_restored(pytestconfig: pytest.Config, pg_database_url: str) -> Iterator[None]:
    yield
    _provision(pytestconfig).restore()
