"""Section 1 of the contract, "before the response": `Depends(get_db)` under FastAPI, over real
sockets on uvicorn."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import asyncpg
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    TransactionAbortedError,
    UnsupportedVersionError,
    _compatibility,
    create_db_dependency,
    get_transaction,
    on_commit,
)
from tests.support import Part, insert, interrupt_everywhere, serving, stored, swallow_error, until

Maker = async_sessionmaker[AsyncSession]

#: Seconds that the COMMIT takes on a table with the slow trigger.
SLOW = 0.4


class Shop:
    """An application with one endpoint for each behaviour, and what happened in it."""

    def __init__(self, maker: Maker) -> None:
        self.app = FastAPI()
        self.log: list[str] = []
        get_db = create_db_dependency(session_maker=maker)
        Db = Annotated[AsyncSession, Depends(get_db)]
        app, log = self.app, self.log

        @app.post("/items/{id_}", status_code=201)
        async def create(id_: int, session: Db) -> dict[str, int]:
            await insert(session, id_)
            on_commit(session, lambda: log.append("on_commit"))
            return {"id": id_}

        @app.post("/bad-reference", status_code=201)
        async def bad_reference(session: Db) -> None:
            session.add(Part(id=1, item_id=99))

        @app.post("/swallowed", status_code=200)
        async def swallowed(session: Db) -> str:
            await insert(session, 1)
            await swallow_error(session)
            return "fine"

        @app.post("/raises")
        async def raises(session: Db) -> None:
            await insert(session, 1)
            raise KeyError("endpoint")

        @app.post("/teapot")
        async def teapot(session: Db) -> None:
            await insert(session, 1)
            raise HTTPException(418)

        @app.get("/nothing")
        async def nothing(session: Db) -> str:
            return "no SQL"

        @app.post("/stream/{fail}")
        async def stream(session: Db, fail: bool) -> StreamingResponse:
            await insert(session, 1)

            async def body() -> AsyncIterator[str]:
                yield "start\n"
                await insert(session, 2)
                async with get_transaction(session):
                    await insert(session, 3)
                yield "end\n"
                if fail:
                    raise KeyError("stream")

            return StreamingResponse(body())

        @app.post("/endless/{id_}")
        async def endless(id_: int, session: Db) -> StreamingResponse:
            async def body() -> AsyncIterator[str]:
                await insert(session, id_)
                while True:
                    yield "more\n"
                    await session.execute(text("SELECT pg_sleep(2)"))

            return StreamingResponse(body())

        @app.post("/background")
        async def background(session: Db, tasks: BackgroundTasks) -> None:
            await insert(session, 1)
            tasks.add_task(insert, session, 2)

        @app.post("/function-scope/{id_}")
        async def function_scope(
            id_: int, session: Annotated[AsyncSession, Depends(get_db, scope="function")]
        ) -> None:
            await insert(session, id_)

        async def audited(session: Db) -> AsyncIterator[AsyncSession]:
            await insert(session, 1)
            yield session
            await insert(session, 2)

        @app.post("/dependencies")
        async def dependencies(
            session: Db,
            same: Annotated[AsyncSession, Depends(audited)],
            fresh: Annotated[AsyncSession, Depends(get_db, use_cache=False)],
        ) -> list[bool]:
            await insert(session, 3)
            await insert(fresh, 4)
            return [session is same, session is fresh]

        @app.websocket("/ws")
        async def websocket(socket: WebSocket, session: Db) -> None:
            await socket.accept()
            await insert(session, int(await socket.receive_text()))
            await socket.close()

        @app.exception_handler(IntegrityError)
        async def conflict(request: Any, error: IntegrityError) -> JSONResponse:
            return JSONResponse({"detail": "conflict"}, status_code=409)

        @app.exception_handler(TransactionAbortedError)
        async def aborted(request: Any, error: TransactionAbortedError) -> JSONResponse:
            return JSONResponse({"sqlstate": error.sqlstate}, status_code=500)


@pytest.fixture
def shop(session_maker: Maker) -> Shop:
    return Shop(session_maker)


@pytest.fixture
async def client(shop: Shop) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(shop.app) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client


@pytest.fixture
async def slow_commit(other: asyncpg.Connection) -> AsyncIterator[None]:
    """A COMMIT after an insert takes SLOW seconds, by a deferred constraint trigger."""
    await other.execute(
        f"""
        CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep({SLOW}); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION slow();
        """
    )
    yield
    await other.execute("DROP TRIGGER slow ON item")


class RawResponse:
    """A response read from the socket byte by byte, so that one knows when it started."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.text = ""

    async def until(self, mark: str) -> None:
        while mark not in self.text:
            data = await asyncio.wait_for(self._reader.read(1), 20)
            assert data, f"the response ended without {mark!r}: {self.text!r}"
            self.text += data.decode()


async def post_raw(
    client: httpx.AsyncClient, path: str
) -> tuple[RawResponse, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Length: 0", "Connection: close", "", ""]
    writer.write("\r\n".join(lines).encode())
    await writer.drain()
    return RawResponse(reader), writer


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


async def test_streaming(
    client: httpx.AsyncClient, slow_commit: None, other: asyncpg.Connection
) -> None:
    """streaming: the endpoint commits before the first byte, the stream at its end."""
    start = time.monotonic()
    response, writer = await post_raw(client, "/stream/false")
    await response.until("start\n")
    elapsed = time.monotonic() - start
    assert await stored(other) == {1}
    assert elapsed >= SLOW
    await response.until("end\n")
    await until(lambda: _stored_is(other, {1, 2, 3}))
    writer.close()


async def _stored_is(other: asyncpg.Connection, ids: set[int]) -> bool:
    return await stored(other) == ids


async def test_streaming_that_fails(
    client: httpx.AsyncClient, other: asyncpg.Connection, engine: AsyncEngine
) -> None:
    """streaming: a stream that raises loses only what the stream wrote."""
    pool: Any = engine.pool
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/stream/true")
    await until(lambda: pool.checkedout() == 0)
    assert await stored(other) == {1}


async def test_client_disconnect(
    shop: Shop, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """released: after clients hung up in a stream, every connection is back in the pool."""
    pool: Any = engine.pool
    errors: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await shop.app(scope, receive, send)
        except Exception as error:
            errors.append(error)
            raise

    async with (
        serving(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for id_ in range(100, 110):
            response, writer = await post_raw(client, f"/endless/{id_}")
            await response.until("more\n")
            assert pool.checkedout() >= 1
            writer.close()
        await until(lambda: pool.checkedout() == 0)
        assert (await client.post("/items/1")).status_code == 201
    assert errors == []
    assert await stored(other) == {1}

    # The driver hangs up in the background; a loop that ended before would leave transactions open
    # on the server.
    async def gone() -> bool:
        return not await other.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
        )

    await until(gone)


async def test_background_task(client: httpx.AsyncClient, other: asyncpg.Connection) -> None:
    """A background task may still use the session; its work is committed when it has ended."""
    assert (await client.post("/background")).status_code == 200
    await until(lambda: _stored_is(other, {1, 2}))


async def test_dependencies(client: httpx.AsyncClient, other: asyncpg.Connection) -> None:
    """One session per request, unless use_cache=False; a dependency's exit code has it too."""
    response = await client.post("/dependencies")
    assert response.json() == [True, False]
    await until(lambda: _stored_is(other, {1, 2, 3, 4}))


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


async def test_websocket(shop: Shop, other: asyncpg.Connection) -> None:
    """A websocket's session is committed when its endpoint ends."""
    incoming = iter([{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "77"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(incoming)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/ws",
        "headers": [],
        "query_string": b"",
        "subprotocols": [],
    }
    await shop.app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"]
    assert await stored(other) == {77}


async def test_overridden_dependency(session_maker: Maker) -> None:
    """`dependency_overrides` finds it like any other dependency."""
    get_db = create_db_dependency(session_maker)
    app = FastAPI()

    @app.get("/")
    async def endpoint(session: Annotated[Any, Depends(get_db)]) -> str:
        return session

    app.dependency_overrides[get_db] = lambda: "override"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        assert (await client.get("/")).json() == "override"


async def test_connection_is_no_request_parameter(shop: Shop) -> None:
    """The dependency adds nothing to the application's OpenAPI schema."""
    assert "parameters" not in shop.app.openapi()["paths"]["/nothing"]["get"]


async def test_fastapi_without_the_stack(
    session_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a FastAPI that lacks the exit stacks a request fails, instead of committing too late."""
    get_db: Any = create_db_dependency(session_maker)

    class OldRequest:
        def __init__(self) -> None:
            self.scope = {"type": "http"}

    monkeypatch.setattr(_compatibility, "_installed_version", lambda package: "0.120.4")
    with pytest.raises(UnsupportedVersionError, match=r"fastapi 0\.120\.4.*FastAPI 0\.121"):
        await get_db(connection=OldRequest())


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

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "POST",
            "path": path.format(n),
            "headers": [],
            "query_string": b"",
        }
        await app(scope, receive, send)

    async def check(n: int) -> None:
        assert pool.checkedout() == 0, f"a connection is lost at suspension {n}"
        if n in statuses:
            assert (n in await stored(other)) == (statuses[n] == 201), f"at suspension {n}"

    assert await interrupt_everywhere(work, check) >= 5
    assert 201 in statuses.values()
