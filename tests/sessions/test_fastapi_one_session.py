"""Section 1 of the contract, "one unit": one request has one session of one `get_db`, however it
is requested."""

import gc
import weakref
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any

import asyncpg
import pytest
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    HTTPException,
    Request,
    Response,
    Security,
    WebSocket,
)
from fastapi.security import SecurityScopes
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import create_db_dependency
from tests.sessions.shop import Shop, client_of, http_scope, stored_is, talk_to_websocket
from tests.support import insert, stored, until

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture
def get_db(session_maker: Maker) -> Any:
    return create_db_dependency(session_maker)


def ways(get_db: Any) -> dict[str, Any]:
    """Each way to request the session of `get_db`."""

    async def user(session: Annotated[AsyncSession, Depends(get_db)]) -> AsyncSession:
        return session

    async def scoped_user(
        scopes: SecurityScopes, session: Annotated[AsyncSession, Depends(get_db)]
    ) -> AsyncSession:
        return session

    async def yielding_user(
        session: Annotated[AsyncSession, Depends(get_db)],
    ) -> AsyncIterator[AsyncSession]:
        yield session

    return {
        "plain": Depends(get_db),
        "uncached": Depends(get_db, use_cache=False),
        "function": Depends(get_db, scope="function"),
        "request": Depends(get_db, scope="request"),
        "security": Security(get_db, scopes=["a"]),
        "partial": Depends(partial(get_db)),
        "user": Depends(user),
        "security_user": Security(user, scopes=["a", "b"]),
        "scoped_user": Security(scoped_user, scopes=["b"]),
        "yielding_user": Depends(yielding_user),
        "function_user": Depends(yielding_user, scope="function"),
    }


WAYS = list(ways(lambda: None))


@pytest.mark.parametrize("first", WAYS)
async def test_two_ways(get_db: Any, other: asyncpg.Connection, first: str) -> None:
    """one unit: two ways to request the session give the same one, and what both write is stored
    together, before the response."""
    app = FastAPI()

    def add(id_: int, second: str) -> None:
        @app.post(f"/{second}")
        async def endpoint(
            one: Annotated[AsyncSession, ways(get_db)[first]],
            two: Annotated[AsyncSession, ways(get_db)[second]],
        ) -> bool:
            await insert(one, id_)
            await insert(two, -id_)
            return one is two

        @app.post(f"/{second}/fail")
        async def failing(
            one: Annotated[AsyncSession, ways(get_db)[first]],
            two: Annotated[AsyncSession, ways(get_db)[second]],
        ) -> None:
            await insert(one, 100)
            await insert(two, 101)
            raise HTTPException(418)

    for id_, second in enumerate(WAYS, start=1):
        add(id_, second)
    async with client_of(app, raises=True) as client:
        for id_, second in enumerate(WAYS, start=1):
            assert (await client.post(f"/{second}")).json() is True, second
            assert {id_, -id_} <= await stored(other), second
            assert (await client.post(f"/{second}/fail")).status_code == 418
            assert not {100, 101} & await stored(other), second


async def test_two_dependencies_have_two_sessions(session_maker: Maker) -> None:
    """Each function of `create_db_dependency` has a session of its own."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(
        one: Annotated[AsyncSession, Depends(create_db_dependency(session_maker))],
        two: Annotated[AsyncSession, Depends(create_db_dependency(session_maker))],
    ) -> bool:
        return one is two

    async with client_of(app, raises=True) as client:
        assert (await client.get("/")).json() is False


async def test_exit_code_of_a_dependency(get_db: Any, other: asyncpg.Connection) -> None:
    """A dependency's exit code has the session too; its work is committed after the response, or
    before it with scope="function"."""
    app = FastAPI()
    Db = Annotated[AsyncSession, Depends(get_db)]

    async def audited(session: Db) -> AsyncIterator[AsyncSession]:
        await insert(session, 1)
        yield session
        await insert(session, 2)

    async def audited_early(session: Db) -> AsyncIterator[AsyncSession]:
        yield session
        await insert(session, 3)

    @app.post("/")
    async def endpoint(
        session: Db,
        same: Annotated[AsyncSession, Depends(audited)],
        early: Annotated[AsyncSession, Depends(audited_early, scope="function")],
    ) -> bool:
        await insert(session, 4)
        return session is same is early

    seen: list[set[int]] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def look(message: Any) -> None:
            seen.append(await stored(other))
            await send(message)

        await app(scope, receive, look)

    async with client_of(watched, raises=True) as client:
        assert (await client.post("/")).json() is True
    assert seen[0] == {1, 3, 4}
    assert await stored(other) == {1, 2, 3, 4}


async def test_requests_share_nothing(get_db: Any) -> None:
    """Each request has another session, also with a scope that is a copy of an earlier one."""
    app = FastAPI()
    seen: list[AsyncSession] = []

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        seen.append(session)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None: ...

    scope = http_scope("/")
    await app(scope, receive, send)
    assert "fastapi_inner_astack" in scope  # what the request has left behind
    await app(dict(scope), receive, send)
    await app(scope, receive, send)
    assert len({id(session) for session in seen}) == 3


async def test_ended_request_keeps_no_session(get_db: Any) -> None:
    """released: a request that has ended keeps neither its session nor itself alive."""
    app = FastAPI()
    gone: list[weakref.ref[Any]] = []

    @app.get("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        gone.append(weakref.ref(session))

    async with client_of(app, raises=True) as client:
        for _ in range(3):
            await client.get("/")
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def mounted(app: FastAPI) -> FastAPI:
    outer = FastAPI()
    outer.mount("/sub", app)
    return outer


def included_twice_over(app: FastAPI) -> FastAPI:
    outer, middle = FastAPI(), APIRouter()
    middle.include_router(app.router)
    outer.include_router(middle, prefix="/sub")
    return outer


def copied(app: FastAPI) -> Any:
    """An application behind a middleware that hands on a copy of the scope."""
    outer = mounted(app)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await outer(dict(scope), receive, send)

    return middleware


@pytest.mark.parametrize("wrap", [mounted, included_twice_over, copied])
async def test_applications_inside_others(
    get_db: Any, other: asyncpg.Connection, wrap: Callable[[FastAPI], Any]
) -> None:
    """one unit: mounted applications, nested routers and copied scopes change nothing."""
    app = FastAPI()

    async def user(session: Annotated[AsyncSession, Depends(get_db)]) -> AsyncSession:
        return session

    @app.post("/")
    async def endpoint(
        one: Annotated[AsyncSession, Depends(get_db)],
        two: Annotated[AsyncSession, Security(user, scopes=["a"])],
        fail: bool = False,
    ) -> bool:
        await insert(one, 2 if fail else 1)
        if fail:
            raise HTTPException(418)
        return one is two

    @app.websocket("/ws")
    async def websocket(
        socket: WebSocket,
        one: Annotated[AsyncSession, Depends(get_db)],
        two: Annotated[AsyncSession, Security(user, scopes=["a"])],
    ) -> None:
        await socket.accept()
        await insert(one, 3 if one is two else 4)
        await socket.close()

    outer = wrap(app)
    async with client_of(outer, raises=True) as client:
        assert (await client.post("/sub/")).json() is True
        assert (await client.post("/sub/?fail=1")).status_code == 418
    await talk_to_websocket(outer, "/sub/ws", root_path="")
    assert await stored(other) == {1, 3}


async def test_application_called_inside_an_endpoint(
    get_db: Any, other: asyncpg.Connection
) -> None:
    """An endpoint that hands its request to another application has a session, and that one has a
    session of its own."""
    inner, outer = FastAPI(), FastAPI()
    seen: list[AsyncSession] = []

    @inner.post("/")
    async def within(session: Annotated[AsyncSession, Depends(get_db)]) -> None:
        seen.append(session)
        await insert(session, 1)

    class Handing(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await inner(dict(scope), receive, send)

    @outer.post("/")
    async def around(
        request: Request, session: Annotated[AsyncSession, Depends(get_db)]
    ) -> Response:
        seen.append(session)
        await insert(session, 2)
        return Handing()

    async with client_of(outer, raises=True) as client:
        assert (await client.post("/")).status_code == 200
    assert seen[0] is not seen[1]
    assert await stored(other) == {1, 2}


async def test_partial(get_db: Any, other: asyncpg.Connection) -> None:
    """`Depends(partial(get_db))` is the same dependency, which commits before the response."""
    app = FastAPI()

    @app.post("/{id_}")
    async def endpoint(
        id_: int, session: Annotated[AsyncSession, Depends(partial(get_db))], fail: bool = False
    ) -> None:
        await insert(session, id_)
        if fail:
            raise KeyError(id_)

    async with client_of(app) as client:
        assert (await client.post("/1")).status_code == 200
        assert (await client.post("/2?fail=1")).status_code == 500
    assert await stored(other) == {1}


async def test_websocket(shop: Shop, other: asyncpg.Connection) -> None:
    """A websocket's session is committed when its endpoint ends."""
    sent = await talk_to_websocket(shop.app, "/ws", "77")
    assert sent == ["websocket.accept", "websocket.close"]
    assert await stored(other) == {77}


async def test_overridden_dependency(get_db: Any) -> None:
    """`dependency_overrides` finds it like any other dependency."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(session: Annotated[Any, Depends(get_db)]) -> str:
        return session

    app.dependency_overrides[get_db] = lambda: "override"
    async with client_of(app, raises=True) as client:
        assert (await client.get("/")).json() == "override"


async def test_overriding_dependency(
    get_db: Any, session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A function of `create_db_dependency` can override another one."""
    app = FastAPI()

    async def forbidden() -> None:
        raise AssertionError("this dependency is overridden")

    @app.post("/")
    async def endpoint(
        one: Annotated[AsyncSession, Depends(forbidden)],
        two: Annotated[AsyncSession, Depends(get_db)],
    ) -> bool:
        await insert(one, 1)
        return one is two

    app.dependency_overrides[forbidden] = get_db
    async with client_of(app, raises=True) as client:
        assert (await client.post("/")).json() is True
    await until(lambda: stored_is(other, {1}))
