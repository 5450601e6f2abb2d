"""Settings that a dependency of FastAPI gives: a tenant out of the request."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Header, Request, Security, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import SettingMissingError, create_db_dependency
from tests.sessions.shop import talk_to_websocket
from tests.settings import NOTHING, Maker, left_behind, narrow, setting
from tests.support import insert


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    async with narrow(database_url) as engine:
        yield engine
        assert await left_behind(engine) == NOTHING


@pytest.fixture
def maker(engine: AsyncEngine) -> Maker:
    return async_sessionmaker(engine)


# Each form of a dependency


def by_header(x_tenant: Annotated[str, Header()] = "") -> dict[str, Any]:
    return {"app.tenant": x_tenant}


async def by_async_header(x_tenant: Annotated[str, Header()] = "") -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"app.tenant": x_tenant}


def by_request(request: Request) -> dict[str, Any]:
    return {"app.tenant": request.headers.get("x-tenant", "")}


def by_generator(x_tenant: Annotated[str, Header()] = "") -> Iterator[dict[str, Any]]:
    yield {"app.tenant": x_tenant}


async def by_async_generator(
    x_tenant: Annotated[str, Header()] = "",
) -> AsyncIterator[dict[str, Any]]:
    yield {"app.tenant": x_tenant}


def by_dependency(found: Annotated[dict[str, Any], Depends(by_async_header)]) -> dict[str, Any]:
    return {**found, "lock_timeout": "5s"}


class ByObject:
    """An object that is called."""

    async def __call__(self, request: Request) -> dict[str, Any]:
        return by_request(request)


class WithoutParameters:
    """An object whose call is async and takes nothing."""

    async def __call__(self) -> dict[str, Any]:
        return {"app.tenant": "a"}


async def always_a() -> dict[str, Any]:
    return {"app.tenant": "a"}


def plain_a() -> dict[str, Any]:
    return {"app.tenant": "a"}


def prefixed(prefix: str, request: Request) -> dict[str, Any]:
    return {"app.tenant": prefix + request.headers.get("x-tenant", "")}


def plain_prefixed(prefix: str) -> dict[str, Any]:
    return {"app.tenant": prefix}


FORMS: dict[str, Any] = {
    "function": by_header,
    "async function": by_async_header,
    "request": by_request,
    "generator": by_generator,
    "async generator": by_async_generator,
    "dependency of a dependency": by_dependency,
    "object": ByObject(),
    "object without parameters": WithoutParameters(),
    "async without parameters": always_a,
    "plain without parameters": plain_a,
    "Depends": Depends(by_header),
    "Depends without cache": Depends(by_header, use_cache=False),
    "Security": Security(by_header),
    "Annotated": Annotated[dict[str, Any], Depends(by_header)],
    "Depends without parameters": Depends(plain_a),
    "partial": partial(prefixed, ""),
    "partial without parameters": partial(plain_prefixed, "a"),
    "mapping": {"app.tenant": "a"},
    "lambda": lambda: {"app.tenant": "a"},
}


def app_of(get_db: Any) -> FastAPI:
    app = FastAPI()
    Db = Annotated[AsyncSession, Depends(get_db)]
    Again = Annotated[AsyncSession, Depends(get_db, use_cache=False)]

    @app.get("/")
    async def tenant(session: Db) -> list[str]:
        seen = [await setting(session)]
        await session.commit()
        return [*seen, await setting(session)]

    @app.get("/sync")
    def sync(session: Db) -> None:
        """An endpoint in a thread."""

    @app.get("/twice")
    async def twice(session: Db, again: Again) -> list[str]:
        assert session is again
        return [await setting(session), await setting(again)]

    @app.get("/stream")
    async def stream(session: Db) -> StreamingResponse:
        before = await setting(session)

        async def body() -> AsyncIterator[str]:
            yield before
            yield await setting(session)

        return StreamingResponse(body())

    @app.get("/nothing")
    async def nothing(session: Db) -> None:
        """No statement."""

    @app.post("/write")
    async def write(session: Db) -> None:
        await insert(session, 1)

    @app.exception_handler(SettingMissingError)
    async def missing(request: Request, error: SettingMissingError) -> JSONResponse:
        return JSONResponse({"missing": list(error.names)}, status_code=403)

    return app


def client_of(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@pytest.mark.parametrize("form", FORMS)
async def test_each_form(maker: Maker, engine: AsyncEngine, form: str) -> None:
    """Each form of a dependency gives the settings of its own request."""
    app = app_of(create_db_dependency(maker, settings=FORMS[form], require=["app.tenant"]))
    has_request = not form.endswith("without parameters") and form not in ("mapping", "lambda")
    async with client_of(app) as client:
        for tenant in ("a", "b", "a"):
            expected = tenant if has_request else "a"
            headers = {"x-tenant": tenant}
            for path in ("/", "/twice"):
                response = await client.get(path, headers=headers)
                assert response.json() == [expected] * 2, path
            response = await client.get("/stream", headers=headers)
            assert response.text == expected * 2
            assert (await client.get("/sync", headers=headers)).status_code == 200
        if has_request:
            for path in ("/", "/nothing", "/sync", "/stream"):
                response = await client.get(path)
                assert (response.status_code, response.json()) == (
                    403,
                    {"missing": ["app.tenant"]},
                )
            assert (await client.post("/write")).status_code == 403
    assert await left_behind(engine) == NOTHING


async def test_override(maker: Maker) -> None:
    """`app.dependency_overrides` replaces the dependency that gives the settings."""
    app = app_of(create_db_dependency(maker, settings=by_header, require=["app.tenant"]))
    app.dependency_overrides[by_header] = lambda: {"app.tenant": "of the test"}
    async with client_of(app, **{"x-tenant": "b"}) as client:
        assert (await client.get("/")).json() == ["of the test"] * 2


async def test_concurrent_requests(maker: Maker) -> None:
    """Concurrent requests of two tenants over one connection never see each other's."""
    app = app_of(create_db_dependency(maker, settings=by_async_header))

    async def ask(client: httpx.AsyncClient, tenant: str) -> None:
        response = await client.get("/", headers={"x-tenant": tenant})
        assert response.json() == [tenant] * 2

    async with client_of(app) as client:
        await asyncio.gather(*(ask(client, "ab"[number % 2]) for number in range(20)))


@pytest.mark.parametrize("wrong", [None, "app.tenant=a", {"no such": 1}, {"app.tenant": None}, 7])
async def test_wrong_settings_of_a_dependency(maker: Maker, wrong: Any) -> None:
    """A dependency that gives something else fails its request before any SQL."""

    def settings(request: Request) -> Any:
        return wrong

    app = app_of(create_db_dependency(maker, settings=settings))
    async with client_of(app) as client:
        assert (await client.post("/write")).status_code == 500


async def test_no_connection_without_a_statement(maker: Maker, engine: AsyncEngine) -> None:
    """A request without a statement takes no connection."""
    await engine.dispose()
    app = app_of(create_db_dependency(maker, settings=by_header))
    async with client_of(app) as client:
        assert (await client.get("/nothing")).status_code == 200
    assert engine.pool.checkedin() == 0  # type: ignore[attr-defined]


async def test_openapi(maker: Maker) -> None:
    """The parameters of the dependency are those of the endpoint; the library adds none."""
    app = app_of(create_db_dependency(maker, settings=by_header))
    parameters = app.openapi()["paths"]["/"]["get"]["parameters"]
    assert [each["name"] for each in parameters] == ["x-tenant"]


@pytest.mark.parametrize("name", ["a", "b"])
async def test_websocket(maker: Maker, name: str) -> None:
    """A websocket has the settings of its own connection too."""
    app = app_of(create_db_dependency(maker, settings=by_header))
    seen: list[str] = []

    @app.websocket("/seen")
    async def socket(
        websocket: WebSocket,
        session: Annotated[AsyncSession, Depends(create_db_dependency(maker, settings=by_header))],
    ) -> None:
        await websocket.accept()
        seen.append(await setting(session))
        await websocket.close()

    await talk_to_websocket(app, path="/seen", headers=[(b"x-tenant", name.encode())])
    assert seen == [name]


async def test_without_fastapi(maker: Maker) -> None:
    """`get_db()` by hand says that only FastAPI can resolve its settings; a mapping and a plain
    function need none."""
    for form in (by_header, Depends(by_header), always_a):
        get_db = create_db_dependency(maker, settings=form)
        with pytest.raises(TypeError, match="dependency of FastAPI"):
            async for _ in get_db():
                raise AssertionError("the unit has begun")
    for form in ({"app.tenant": "a"}, plain_a):
        async for session in create_db_dependency(maker, settings=form)():
            assert await setting(session) == "a"
