"""Places where `Depends(get_db)` cannot commit before the response: a clear error, or the lines
that the documentation gives for them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import asyncpg
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    TransactionStateError,
    UnsupportedVersionError,
    _compatibility,
    create_db_dependency,
    on_commit,
)
from tests.sessions.shop import client_of
from tests.support import insert, stored

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture
def get_db(session_maker: Maker) -> Any:
    return create_db_dependency(session_maker)


async def test_fastapi_without_the_stack(get_db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a FastAPI that lacks the exit stacks a request fails, instead of committing too late."""
    app = FastAPI()

    async def too_old(request: Request) -> Any:
        request.scope.pop("fastapi_function_astack")
        return await get_db(connection=request)

    @app.get("/")
    async def endpoint(session: Annotated[Any, Depends(too_old)]) -> None: ...

    monkeypatch.setattr(_compatibility, "_installed_version", lambda package: "0.120.4")
    async with client_of(app, raises=True) as client:
        with pytest.raises(UnsupportedVersionError, match=r"fastapi 0\.120\.4.*FastAPI 0\.121"):
            await client.get("/")


async def test_called_by_hand(get_db: Any, engine: AsyncEngine) -> None:
    """`get_db(request)` in a Starlette route, a middleware or an exception handler is an error that
    names what to use, and opens no session."""
    app = FastAPI()
    errors: list[str] = []

    async def call(request: Request) -> Response:
        with pytest.raises(TypeError, match=r"get_db\(\) takes no arguments.*db_context\(\)") as e:
            await get_db(request)
        errors.append(str(e.value))
        return PlainTextResponse("")

    async def raises() -> None:
        raise KeyError

    app.add_route("/starlette", call)
    app.add_api_route("/raises", raises)

    @app.exception_handler(KeyError)
    async def handle(request: Request, error: KeyError) -> Response:
        return await call(request)

    @app.middleware("http")
    async def middleware(request: Request, call_next: Any) -> Response:
        await call(request)
        response: Response = await call_next(request)
        await call(request)
        return response

    async with client_of(app, raises=True) as client:
        await client.get("/starlette")
        await client.get("/raises")
    assert len(errors) == 6


async def test_outside_of_an_endpoint(get_db: Any) -> None:
    """A request that no endpoint of FastAPI serves is refused before a session is made."""
    app = FastAPI()

    async def call(request: Request) -> Response:
        with pytest.raises(TransactionStateError, match=r"'/starlette'.*db_context\(\)"):
            await get_db(connection=request)
        return PlainTextResponse("refused")

    app.add_route("/starlette", call)
    async with client_of(app, raises=True) as client:
        assert (await client.get("/starlette")).text == "refused"


@pytest.mark.parametrize("wrap", ["router", "app", "mounted"])
async def test_frontend(get_db: Any, tmp_path: Path, wrap: str) -> None:
    """FastAPI ends the dependencies of `app.frontend()` after the response, so it is refused."""
    if not hasattr(FastAPI, "frontend"):
        pytest.skip("this FastAPI has no app.frontend()")
    (tmp_path / "index.html").write_text("<p>")

    async def user(session: Annotated[AsyncSession, Depends(get_db)]) -> AsyncSession:
        return session

    app: Any = FastAPI(dependencies=[Depends(user)] if wrap != "router" else [])
    if wrap == "router":
        router: Any = APIRouter(dependencies=[Depends(user)])
        router.frontend("/", directory=tmp_path)
        app.include_router(router)
    else:
        app.frontend("/", directory=tmp_path)
    if wrap == "mounted":
        outer = FastAPI()
        outer.mount("/sub", app)
        app = outer
    path = "/sub/" if wrap == "mounted" else "/"
    async with client_of(app, raises=True) as client:
        with pytest.raises(TransactionStateError, match=r"app\.frontend\(\).*db_context\(\)"):
            await client.get(path)


async def test_route_class_that_answers_exceptions(get_db: Any, other: asyncpg.Connection) -> None:
    """The line of the documentation rolls back where a route turns an exception into a response."""
    Db = Annotated[AsyncSession, Depends(get_db)]
    log: list[str] = []

    class DomainError(Exception):
        pass

    async def keep(request: Request, session: Db) -> None:
        request.state.session = session

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def handle_domain_errors(request: Request) -> Response:
                try:
                    return await handle(request)
                except DomainError:
                    await request.state.session.rollback()
                    return JSONResponse({}, status_code=409)

            return handle_domain_errors

    app = FastAPI()
    router = APIRouter(route_class=Route, dependencies=[Depends(keep)])

    @router.post("/{id_}")
    async def endpoint(id_: int, session: Db, fail: bool = False) -> None:
        await insert(session, id_)
        on_commit(session, lambda: log.append("committed"))
        if fail:
            raise DomainError

    app.include_router(router)
    async with client_of(app, raises=True) as client:
        assert (await client.post("/1?fail=1")).status_code == 409
        assert (await stored(other), log) == (set(), [])
        assert (await client.post("/2")).status_code == 200
    assert (await stored(other), log) == ({2}, ["committed"])


async def test_route_class_that_tries_again(get_db: Any, other: asyncpg.Connection) -> None:
    """A route that runs its endpoint again, after a rollback, stores the last run only."""
    Db = Annotated[AsyncSession, Depends(get_db)]
    seen: list[AsyncSession] = []

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def twice(request: Request) -> Response:
                try:
                    return await handle(request)
                except KeyError:
                    await seen[0].rollback()
                    response: Response = await handle(request)
                    return response

            return twice

    app = FastAPI()
    router = APIRouter(route_class=Route)

    @router.post("/")
    async def endpoint(session: Db) -> None:
        seen.append(session)
        await insert(session, len(seen))
        if len(seen) == 1:
            raise KeyError

    app.include_router(router)
    async with client_of(app, raises=True) as client:
        assert (await client.post("/")).status_code == 200
    assert seen[0] is seen[1]
    assert await stored(other) == {2}


@pytest.mark.parametrize("fail", [False, True])
async def test_generator_endpoint(get_db: Any, other: asyncpg.Connection, fail: bool) -> None:
    """An endpoint that yields runs after the start of its response: stored at its end as a whole,
    or not at all."""
    pytest.importorskip("fastapi.sse", reason="this FastAPI has no endpoints that yield")
    app = FastAPI()
    Db = Annotated[AsyncSession, Depends(get_db)]

    @app.get("/")
    async def endpoint(session: Db, fail: bool) -> AsyncIterator[int]:
        await insert(session, 1)
        yield 1
        await insert(session, 2)
        if fail:
            raise KeyError
        yield 2

    @app.get("/early")
    async def early(session: Db, fail: bool) -> AsyncIterator[int]:
        await insert(session, 3)
        await session.commit()
        yield 3
        await insert(session, 4)
        if fail:
            raise KeyError

    async with client_of(app) as client:
        assert (await client.get("/", params={"fail": fail})).status_code == 200
        assert await stored(other) == (set() if fail else {1, 2})
        assert (await client.get("/early", params={"fail": fail})).status_code == 200
        assert await stored(other) == ({3} if fail else {1, 2, 3, 4})


async def test_background_task_that_fails(get_db: Any, other: asyncpg.Connection) -> None:
    """A background task that fails loses what it wrote, and keeps what the endpoint committed."""
    app = FastAPI()

    @app.post("/")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(get_db)], tasks: BackgroundTasks
    ) -> None:
        await insert(session, 1)

        async def work() -> None:
            await insert(session, 2)
            await asyncio.sleep(0)
            raise KeyError("task")

        tasks.add_task(work)

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await stored(other) == {1}
