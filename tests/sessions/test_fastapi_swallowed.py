"""Section 1 of the contract, "one unit": an exception that has left the endpoint rolls back, also
where another dependency swallows it on its way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Annotated, Any, Literal

import anyio
import asyncpg
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import TransactionAbortedError, create_db_dependency, on_commit
from tests.sessions.shop import client_of, http_scope, talk_to_websocket
from tests.support import Part, insert, stored

Maker = async_sessionmaker[AsyncSession]
Scope = Literal["function", "request"]


class DomainError(Exception):
    """An error that the application turns into a response."""


async def swallow_exception() -> AsyncIterator[None]:
    with suppress(Exception):
        yield


async def swallow_everything() -> AsyncIterator[None]:
    with suppress(BaseException):
        yield


def swallow_in_thread() -> Iterator[None]:
    with suppress(Exception):
        yield


async def swallow_and_fail() -> AsyncIterator[None]:
    try:
        yield
    except Exception:
        raise HTTPException(409) from None


SWALLOWERS: list[Callable[..., Any]] = [
    swallow_exception,
    swallow_everything,
    swallow_in_thread,
    swallow_and_fail,
]
SCOPES: list[Scope] = ["function", "request"]
PLACES = ["before", "after", "nested", "of_user", "app", "router", "around_itself"]
FAILURES = ["error", "http", "handled", "group", "cancelled", "dependency", "invalid"]


def scoped(dependency: Callable[..., Any], scope: Scope) -> Any:
    """`Depends(dependency, scope=scope)`, for a list of dependencies too, where FastAPI 0.121.0
    forgets the scope.
    """

    async def depends_on(
        it: Annotated[Any, Depends(dependency, scope=scope, use_cache=False)],
    ) -> Any:
        return it

    return Depends(depends_on)


class Failing:
    """An application whose endpoints insert a row, register a callback and fail."""

    def __init__(
        self, maker: Maker, failure: str, place: str, swallower: Callable[..., Any], scope: Scope
    ) -> None:
        self.log: list[str] = []
        self.is_cancelled = failure == "cancelled"
        self.reached = asyncio.Event()
        get_db = create_db_dependency(maker)
        swallow = scoped(swallower, scope)
        around = [swallow] if place in ("app", "router") else []
        self.app = FastAPI(dependencies=around if place == "app" else None)
        router = APIRouter(dependencies=around if place == "router" else None)
        Db = Annotated[AsyncSession, Depends(get_db)]
        log, reached = self.log, self.reached

        async def work(id_: int, session: Db) -> AsyncSession:
            await insert(session, id_)
            on_commit(session, lambda: log.append("committed"))
            return session

        async def nest(outer: Annotated[None, swallow]) -> None: ...

        async def of_user(
            session: Annotated[AsyncSession, Depends(work)],
        ) -> AsyncIterator[AsyncSession]:
            with suppress(Exception):
                yield session

        async def fail(session: Annotated[AsyncSession, Depends(work)]) -> None:
            raise DomainError

        worked = Depends(work)
        dependencies = {
            "before": [swallow, worked],
            "after": [worked, swallow],
            "nested": [worked, Depends(nest)],
            "of_user": [scoped(of_user, scope), worked],
            "app": [worked],
            "router": [worked],
            # One dependency that swallows on either side of get_db.
            "around_itself": [swallow, worked, scoped(swallower, scope)],
        }[place]

        async def error(id_: int) -> None:
            raise KeyError(id_)

        async def http(id_: int) -> None:
            raise HTTPException(418)

        async def handled(id_: int) -> None:
            raise DomainError

        async def group(id_: int) -> None:
            raise ExceptionGroup("endpoint", [KeyError(id_)])

        async def cancelled(id_: int) -> None:
            reached.set()
            await asyncio.Event().wait()

        async def dependency(id_: int, failed: Annotated[None, Depends(fail)]) -> None:
            raise AssertionError("a dependency has failed")

        async def invalid(id_: int, missing: int) -> None:
            raise AssertionError("the request is not valid")

        async def works(id_: int) -> None: ...

        failing = {
            each.__name__: each
            for each in (error, http, handled, group, cancelled, dependency, invalid)
        }[failure]
        router.post("/fails/{id_}", dependencies=dependencies)(failing)
        router.post("/works/{id_}", dependencies=dependencies, status_code=201)(works)
        self.app.include_router(router)

        @self.app.exception_handler(DomainError)
        async def handle(request: Any, error: DomainError) -> JSONResponse:
            return JSONResponse({}, status_code=402)

    async def status(self, path: str) -> int | None:
        """Return the status of the response that has started, if any; cancel what waits."""
        statuses: list[int] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        task = asyncio.create_task(self.app(http_scope(path), receive, send))
        if self.is_cancelled and path.startswith("/fails"):
            await self.reached.wait()
            self.reached.clear()
            task.cancel()
        with suppress(BaseException):
            await task
        return statuses[0] if statuses else None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("failure", FAILURES)
async def test_swallowed_on_its_way(
    session_maker: Maker,
    engine: AsyncEngine,
    other: asyncpg.Connection,
    failure: str,
    place: str,
) -> None:
    """one unit: what left the endpoint rolls back, whoever swallows it, and where."""
    pool: Any = engine.pool
    ids = count(1)
    for swallower in SWALLOWERS:
        for scope in SCOPES:
            case = f"{swallower.__name__}, scope={scope!r}"
            application = Failing(session_maker, failure, place, swallower, scope)
            id_ = next(ids)
            status = await application.status(f"/fails/{id_}")
            assert status is None or status >= 400, case
            assert await stored(other) == set(), case
            assert application.log == [], case
            assert pool.checkedout() == 0, case
            # The same dependencies, without a failure.
            assert await application.status(f"/works/{id_}") == 201, case
            assert await stored(other) == {id_}, case
            assert application.log == ["committed"], case
            await other.execute("DELETE FROM item")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("is_first", [True, False])
async def test_swallowed_in_a_websocket(
    session_maker: Maker, other: asyncpg.Connection, scope: Scope, is_first: bool
) -> None:
    """one unit: the endpoint of a websocket is rolled back as well."""
    app = FastAPI()
    dependencies = [
        scoped(swallow_exception, scope),
        Depends(create_db_dependency(session_maker)),
    ]
    get_db = dependencies[1].dependency

    @app.websocket("/ws", dependencies=dependencies if is_first else dependencies[::-1])
    async def endpoint(
        socket: WebSocket, session: Annotated[AsyncSession, Depends(get_db)]
    ) -> None:
        await socket.accept()
        await insert(session, 1)
        raise KeyError("endpoint")

    assert await talk_to_websocket(app, "/ws") == ["websocket.accept"]
    assert await stored(other) == set()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("swallower", SWALLOWERS)
async def test_swallowed_in_a_stream(
    session_maker: Maker,
    other: asyncpg.Connection,
    swallower: Callable[..., Any],
    scope: Scope,
    is_first: bool,
) -> None:
    """one unit: a stream that fails loses what it wrote, and keeps what the endpoint committed."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)
    dependencies = [scoped(swallower, scope), Depends(get_db)]

    @app.post("/", dependencies=dependencies if is_first else dependencies[::-1])
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> StreamingResponse:
        await insert(session, 1)

        async def body() -> AsyncIterator[str]:
            yield "start"
            await insert(session, 2)
            raise KeyError("stream")

        return StreamingResponse(body())

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await stored(other) == {1}


async def test_server_sent_events_that_fail(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """one unit: an endpoint that yields events loses its work when it fails, swallowed or not."""
    sse = pytest.importorskip("fastapi.sse", reason="this FastAPI has no EventSourceResponse")
    app = FastAPI()
    get_db = create_db_dependency(session_maker)

    @app.get(
        "/",
        dependencies=[Depends(get_db), Depends(swallow_exception)],
        response_class=sse.EventSourceResponse,
    )
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> AsyncIterator[str]:
        await insert(session, 1)
        yield "event"
        raise KeyError("stream")

    async with client_of(app) as client:
        for _ in range(10):  # whether the response or the error ends first is a race
            assert (await client.get("/")).status_code == 200
            assert await stored(other) == set()


async def test_exception_that_the_endpoint_catches(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """An exception that the endpoint catches has not left it."""
    app = FastAPI()

    @app.post("/")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(create_db_dependency(session_maker))],
    ) -> None:
        await insert(session, 1)
        with suppress(KeyError):
            raise KeyError("endpoint")

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await stored(other) == {1}


@pytest.mark.parametrize("scope", SCOPES)
async def test_error_of_another_exit_that_is_handled(
    session_maker: Maker, other: asyncpg.Connection, scope: Scope
) -> None:
    """An error in the exit code of a dependency, handled by another one, undoes no endpoint: its
    2xx goes out."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)

    async def fail_at_exit() -> AsyncIterator[None]:
        yield
        raise KeyError("exit")

    dependencies = [get_db, swallow_exception, fail_at_exit]

    @app.post("/", dependencies=[Depends(get_db), *(scoped(d, scope) for d in dependencies[1:])])
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        await insert(session, 1)

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await stored(other) == {1}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("swallower", [swallow_exception, swallow_everything, swallow_in_thread])
async def test_failed_commit_is_swallowed(
    session_maker: Maker, other: asyncpg.Connection, swallower: Callable[..., Any], scope: Scope
) -> None:
    """before the response: a COMMIT that fails is never a 2xx, also where a dependency swallows its
    error."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)

    @app.post("/", dependencies=[scoped(swallower, scope), Depends(get_db)])
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        session.add(Part(id=1, item_id=99))

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 500
    assert await other.fetch("SELECT * FROM part") == []


async def test_failed_commit_is_replaced(session_maker: Maker) -> None:
    """An error that a dependency raises in place of a failed COMMIT is the one that is answered."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)

    @app.post("/", dependencies=[scoped(swallow_and_fail, "function"), Depends(get_db)])
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        session.add(Part(id=1, item_id=99))

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 409


@pytest.mark.parametrize("during", ["the commit", "an exit"])
async def test_commit_is_cancelled_by_a_dependency(
    session_maker: Maker, other: asyncpg.Connection, during: str
) -> None:
    """before the response: a dependency whose timeout ends the commit gives no 2xx either."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)
    scopes: list[anyio.CancelScope] = []

    async def limit() -> AsyncIterator[None]:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            yield

    async def expire() -> AsyncIterator[None]:
        yield
        if during == "an exit":
            scopes[0].cancel()
            await asyncio.Event().wait()

    @app.post(
        "/",
        dependencies=[
            scoped(limit, "function"),
            Depends(get_db),
            scoped(expire, "function"),
        ],
    )
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        await insert(session, 1)
        session.add(Part(id=1, item_id=1))
        if during == "the commit":
            # The flush of the commit is cancelled while it waits for PostgreSQL.
            event.listen(session.sync_session, "before_flush", lambda *_: scopes[0].cancel())

    async with client_of(app, raises=True) as client:
        with pytest.raises(TransactionAbortedError, match="cancelled before its commit"):
            await client.post("/")
    assert await stored(other) == set()
    assert await other.fetch("SELECT * FROM part") == []


async def test_error_of_an_exit_is_swallowed_around_the_commit(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """before the response: an error in exit code that reaches the commit is never a 2xx, also where
    a dependency around swallows it."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)

    async def fail_at_exit() -> AsyncIterator[None]:
        yield
        raise DomainError

    @app.post(
        "/",
        dependencies=[
            scoped(swallow_exception, "function"),
            Depends(get_db),
            scoped(fail_at_exit, "function"),
        ],
    )
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        await insert(session, 1)

    async with client_of(app, raises=True) as client:
        with pytest.raises(DomainError):
            await client.post("/")
    assert await stored(other) == set()
