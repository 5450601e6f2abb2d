"""Section 1 of the contract, "before the response": `Depends(get_db)` under FastAPI, over real
sockets on uvicorn."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import asyncpg
import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import create_db_dependency
from tests.sessions.shop import SLOW, Shop, http_scope, post_raw
from tests.support import Part, insert, interrupt_everywhere, serving, stored

Maker = async_sessionmaker[AsyncSession]


@pytest.mark.parametrize("path", ["/items/1", "/function-scope/1"])
async def test_commit_before_the_response(
    client: httpx.AsyncClient, slow_commit: None, other: asyncpg.Connection, path: str
) -> None:
    """before the response: its first byte follows the end of a slow COMMIT."""
    start = time.monotonic()
    response, writer = await post_raw(client, path)
    await response.until("H")
    elapsed = time.monotonic() - start
    seen = await stored(other)
    await response.until("\r\n\r\n")
    writer.close()
    assert response.text.startswith("HTTP/1.1 20")
    assert seen == {1}
    assert elapsed >= SLOW


async def test_callbacks_before_the_response(client: httpx.AsyncClient, shop: Shop) -> None:
    """before the response: on_commit callbacks have run when the client gets its answer."""
    assert (await client.post("/items/1")).status_code == 201
    assert shop.log == ["on_commit"]


async def test_commit_that_fails(client: httpx.AsyncClient, other: asyncpg.Connection) -> None:
    """before the response: a COMMIT that fails reaches the exception handlers, never a 2xx."""
    response = await client.post("/bad-reference")
    assert (response.status_code, response.json()) == (409, {"detail": "conflict"})
    assert await other.fetch("SELECT * FROM part") == []


async def test_commit_that_fails_without_a_handler(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """before the response: without a handler it is a plain 500."""
    app = FastAPI()
    Db = Annotated[AsyncSession, Depends(create_db_dependency(session_maker))]

    @app.post("/bad-reference", status_code=201)
    async def bad_reference(session: Db) -> None:
        session.add(Part(id=1, item_id=99))

    async with serving(app) as port, httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{port}/bad-reference")
    assert response.status_code == 500
    assert await other.fetch("SELECT * FROM part") == []


async def test_swallowed_error(client: httpx.AsyncClient, other: asyncpg.Connection) -> None:
    """honest: an endpoint that swallowed a database error does not answer 200 and store nothing."""
    response = await client.post("/swallowed")
    assert (response.status_code, response.json()) == (500, {"sqlstate": "22012"})
    assert await stored(other) == set()


@pytest.mark.parametrize(("path", "status"), [("/raises", 500), ("/teapot", 418)])
async def test_exception_in_the_endpoint(
    client: httpx.AsyncClient, other: asyncpg.Connection, path: str, status: int
) -> None:
    """one unit: an exception in the endpoint rolls back, and its response is unchanged."""
    assert (await client.post(path)).status_code == status
    assert await stored(other) == set()


async def test_no_sql_no_connection(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    """lazy: a request that runs no SQL costs no connection."""
    checkouts: list[object] = []
    event.listen(engine.pool, "checkout", lambda *arguments: checkouts.append(arguments))
    for _ in range(5):
        assert (await client.get("/nothing")).status_code == 200
    assert checkouts == []


async def test_many_concurrent_requests(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """200 concurrent requests on a pool of 5 are all served, and all stored."""
    # However slow the machine, none gives up: neither in the pool nor at the client.
    patient = create_async_engine(engine.url, pool_size=5, max_overflow=0, pool_timeout=None)
    limits = httpx.Limits(max_connections=50)
    async with (
        serving(Shop(async_sessionmaker(patient)).app) as port,
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=None
        ) as client,
    ):
        responses = await asyncio.gather(*(client.post(f"/items/{n}") for n in range(200)))
    await patient.dispose()
    assert {response.status_code for response in responses} == {201}
    assert await stored(other) == set(range(200))


@pytest.mark.parametrize("path", ["/items/{}", "/stream/{}"])
async def test_cancelled_everywhere(
    session_maker: Maker, engine: AsyncEngine, other: asyncpg.Connection, path: str
) -> None:
    """Cancelled at any suspension: a 2xx that started is stored, a 5xx is not, nothing leaks."""
    pool: Any = engine.pool
    # SQLAlchemy 2.0.40 leaves a connection open when an engine's very first one is cancelled while
    # it is set up.
    async with engine.connect():
        pass
    app = FastAPI()
    Db = Annotated[AsyncSession, Depends(create_db_dependency(session_maker))]

    @app.post("/items/{id_}", status_code=201)
    async def create(id_: int, session: Db) -> None:
        await insert(session, id_)

    @app.post("/stream/{id_}", status_code=201)
    async def stream(id_: int, session: Db) -> StreamingResponse:
        await insert(session, id_)

        async def body() -> AsyncIterator[str]:
            await session.execute(text("SELECT 1"))
            yield "x"

        return StreamingResponse(body(), status_code=201)

    statuses: dict[int, int] = {}

    async def work(n: int) -> None:
        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses[n] = message["status"]
            await asyncio.sleep(0)

        await app(http_scope(path.format(n)), receive, send)

    async def check(n: int) -> None:
        assert pool.checkedout() == 0, f"a connection is lost at suspension {n}"
        if n in statuses:
            assert (n in await stored(other)) == (statuses[n] == 201), f"at suspension {n}"

    assert await interrupt_everywhere(work, check) >= 5
    assert 201 in statuses.values()


async def test_connection_is_no_request_parameter(shop: Shop) -> None:
    """The dependency adds nothing to the application's OpenAPI schema."""
    assert "parameters" not in shop.app.openapi()["paths"]["/nothing"]["get"]
