"""Tokens of requests and responses of FastAPI."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware

from pgtoolset import (
    ReadReplicas,
    TransactionStateError,
    create_db_dependency,
    create_read_dependency,
    on_commit,
)
from pgtoolset.replicas import _responses
from pgtoolset.replicas._tokens import PRIMARY, parse_token
from pgtoolset.testing import create_test_client
from tests.nodes import execute
from tests.replicas.cluster import Cluster, counted, is_standby
from tests.replicas.test_reading import items
from tests.support import insert, interrupt_everywhere, swallow_error

HEADER = "X-Read-Token"


class Shop:
    """An application with endpoints of each kind."""

    def __init__(self, cluster: Cluster, *, installs: bool = True, **options: Any) -> None:
        self.maker = cluster.maker(cluster.nodes.primary)
        self.engine = cluster.engines[-1]
        self.replicas: ReadReplicas[AsyncSession] = ReadReplicas(
            self.maker,
            [cluster.maker(each) for each in cluster.standbys],
            **({"max_wait": 60} | options),
        )
        self.app = FastAPI()
        self.get_db = create_db_dependency(self.maker, replicas=self.replicas)
        self.get_reader = create_read_dependency(self.replicas)
        if installs:
            self.replicas.install(self.app)
        self._add_writers(self.app)
        self._add_readers(self.app)

    def client(self, **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(
            transport=transport, **({"base_url": "http://shop.test"} | options)
        )

    def _add_writers(self, app: FastAPI) -> None:
        Session = Annotated[AsyncSession, Depends(self.get_db)]

        @app.post("/plain/{id}")
        async def plain(id: int, session: Session) -> int:
            await insert(session, id)
            return id

        @app.post("/asynchronous/{id}")
        async def asynchronous(id: int, session: Session) -> int:
            await session.execute(text("SET LOCAL synchronous_commit = off"))
            await insert(session, id)
            return id

        @app.post("/response/{id}")
        async def response(id: int, session: Session) -> PlainTextResponse:
            await insert(session, id)
            return PlainTextResponse(str(id), headers={"x-read-token": "of the endpoint"})

        @app.post("/stream/{id}")
        async def stream(id: int, session: Session) -> StreamingResponse:
            await insert(session, id)

            async def parts() -> AsyncIterator[str]:
                yield "a"
                yield str(await session.scalar(text("SELECT 1")))

            return StreamingResponse(parts())

        @app.post("/explicit/{id}")
        async def explicit(id: int, session: Session) -> int:
            await insert(session, id)
            await session.commit()
            await session.execute(text("SELECT 1"))
            return id

        @app.post("/explicit-error/{id}")
        async def explicit_error(id: int, session: Session) -> int:
            await insert(session, id)
            await session.commit()
            raise HTTPException(409)

        @app.post("/pending/{id}")
        async def pending(id: int, session: Session) -> int:
            from tests.support import Item

            session.add(Item(id=id))
            return id

        @app.post("/background/{id}")
        async def background(id: int, session: Session, tasks: BackgroundTasks) -> int:
            await insert(session, id)
            on_commit(session, lambda: None)
            tasks.add_task(lambda: None)
            return id

        @app.post("/error/{id}")
        async def error(id: int, session: Session) -> int:
            await insert(session, id)
            raise HTTPException(418)

        @app.post("/crash/{id}")
        async def crash(id: int, session: Session) -> int:
            await insert(session, id)
            raise KeyError(id)

        @app.post("/swallowed/{id}")
        async def swallowed(id: int, session: Session) -> int:
            await insert(session, id)
            await swallow_error(session)
            return id

        @app.post("/reads/{id}")
        async def reads(id: int, session: Session) -> int:
            return int(await session.scalar(text("SELECT 1")))

        @app.post("/idle/{id}")
        async def idle(id: int, session: Session) -> int:
            return id

    def _add_readers(self, app: FastAPI) -> None:
        Reader = Annotated[AsyncSession, Depends(self.get_reader)]

        @app.get("/items")
        async def read(session: Reader) -> dict[str, Any]:
            return {"items": await items(session), "standby": await is_standby(session)}

        @app.get("/stream")
        async def stream(session: Reader) -> StreamingResponse:
            async def parts() -> AsyncIterator[str]:
                yield f"{await items(session)}"
                yield f"{await items(session)}"

            return StreamingResponse(parts())


WRITING = [
    *("plain", "asynchronous", "response", "stream", "explicit", "explicit-error", "pending"),
    "background",
]


@pytest.mark.parametrize("endpoint", WRITING)
@pytest.mark.parametrize("cookie", [None, "read_token"])
async def test_token(cluster: Cluster, endpoint: str, cookie: str | None) -> None:
    """The response of a unit that has written has a token, and a read with it is not stale."""
    shop = Shop(cluster, cookie=cookie)
    async with shop.client(base_url="https://shop.test") as client:
        for id_ in range(5):
            response = await client.post(f"/{endpoint}/{id_}")
            assert response.status_code in (200, 409)
            if cookie is None:
                tokens = response.headers.get_list(HEADER)
                assert len(tokens) == 1 and parse_token(tokens[0]) is not None
                headers = {HEADER: tokens[0]}
            else:
                set_cookie = response.headers["set-cookie"]
                assert parse_token(client.cookies[cookie]) is not None
                assert set_cookie.endswith("; Path=/; HttpOnly; SameSite=Lax; Secure")
                headers = {}
            found = (await client.get("/items", headers=headers)).json()
            assert id_ in found["items"] and found["standby"]
            assert str(id_) in (await client.get("/stream", headers=headers)).text


@pytest.mark.parametrize("endpoint", ["error", "crash", "swallowed", "reads", "idle"])
async def test_no_token(cluster: Cluster, endpoint: str) -> None:
    """A unit that has written nothing, or whose work is not stored, gives no token."""
    shop = Shop(cluster)
    async with shop.client() as client:
        response = await client.post(f"/{endpoint}/1")
        assert HEADER not in response.headers
        assert (await client.get("/items")).json()["items"] == []


async def test_statements(cluster: Cluster) -> None:
    """A unit that writes pays two statements for its token, one that reads pays one, and one
    without a statement none."""
    shop = Shop(cluster)
    async with shop.client() as client:
        await client.post("/plain/0")
        sent = counted(shop.engine)
        await client.post("/plain/1")
        assert len(sent) == 3
        await client.post("/reads/1")
        assert len(sent) == 5
        await client.post("/idle/1")
        assert len(sent) == 5


async def test_cookie_without_https(cluster: Cluster) -> None:
    """Over plain HTTP the cookie is not marked Secure, or the browser would not send it."""
    shop = Shop(cluster, cookie="read_token")
    async with shop.client() as client:
        response = await client.post("/plain/1")
        assert response.headers["set-cookie"].endswith("SameSite=Lax")
        assert (await client.get("/items")).json() == {"items": [1], "standby": True}


async def test_sent_twice(cluster: Cluster) -> None:
    """Of two headers none is believed: the primary serves."""
    shop = Shop(cluster)
    async with shop.client() as client:
        token = (await client.post("/plain/1")).headers[HEADER]
        headers = [(HEADER, token), (HEADER, token)]
        assert (await client.get("/items", headers=headers)).json() == {
            "items": [1],
            "standby": False,
        }


async def test_not_installed(cluster: Cluster) -> None:
    """Without the middleware the first request says what is missing, before any SQL."""
    shop = Shop(cluster, installs=False)
    sent = counted(shop.engine)
    async with create_test_client(shop.app) as client:
        with pytest.raises(TransactionStateError, match=r"replicas\.install\(app\)"):
            await client.post("/plain/1")
        assert (await client.get("/items")).status_code == 200
    assert not sent


async def test_installed_twice(cluster: Cluster) -> None:
    """Installed again, around another middleware and an application that is mounted, it sends one
    token."""
    shop = Shop(cluster)

    async def pass_on(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    shop.app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    shop.replicas.install(shop.app)
    outer = FastAPI()
    outer.mount("/inner", shop.app)
    shop.app = outer
    async with shop.client() as client:
        response = await client.post("/inner/plain/1")
        assert len(response.headers.get_list(HEADER)) == 1


@pytest.mark.parametrize("app", [5, None, FastAPI, object()])
async def test_install_bad_app(cluster: Cluster, app: Any) -> None:
    """What is no application is a TypeError."""
    with pytest.raises(TypeError, match="app must be"):
        cluster.replicas().install(app)


async def test_two_units(cluster: Cluster) -> None:
    """Of two units of a request the token covers both."""
    shop = Shop(cluster)
    other = create_db_dependency(shop.maker, replicas=shop.replicas)

    @shop.app.post("/both")
    async def both(
        first: Annotated[AsyncSession, Depends(shop.get_db)],
        second: Annotated[AsyncSession, Depends(other)],
    ) -> None:
        await insert(first, 1)
        await insert(second, 2)
        await asyncio.gather(first.commit(), second.commit())

    async with shop.client() as client:
        token = (await client.post("/both")).headers[HEADER]
        found = (await client.get("/items", headers={HEADER: token})).json()
        assert found == {"items": [1, 2], "standby": True}


async def test_position_fails(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position that cannot be asked for is no error of a commit that is stored: its token means
    the primary, and its connection is not used again."""

    def fail(connection: object) -> None:
        raise OSError("the network is away")

    monkeypatch.setattr(_responses, "flushed_position", fail)
    shop = Shop(cluster)
    async with shop.client() as client:
        response = await client.post("/plain/1")
        assert response.status_code == 200
        assert response.headers[HEADER] == PRIMARY
        found = (await client.get("/items", headers={HEADER: PRIMARY})).json()
        assert found == {"items": [1], "standby": False}


async def test_cancelled(cluster: Cluster) -> None:
    """Cancelled anywhere, a request either has stored its work or not, and leaves no connection."""
    shop = Shop(cluster)
    async with shop.client() as client:

        async def work(number: int) -> None:
            await client.post(f"/plain/{number}")

        async def check(number: int) -> None:
            assert shop.engine.pool.checkedout() == 0  # type: ignore[attr-defined]

        await work(1000)
        await interrupt_everywhere(work, check)


async def test_without_fastapi(cluster: Cluster) -> None:
    """Outside of a request the dependencies are plain generators, without tokens."""
    shop = Shop(cluster, installs=False)
    async for session in shop.get_db():
        await insert(session, 1)
    await cluster.caught_up()
    async for session in shop.get_reader():
        assert await items(session) == [1]
    async with asynccontextmanager(shop.get_reader)() as session:
        assert await is_standby(session)


async def test_moved_primary(cluster: Cluster) -> None:
    """After a switchover the tokens of the new primary are used at once."""
    shop = Shop(cluster)
    async with shop.client() as client:
        await client.post("/plain/1")
    await cluster.nodes.switch_over()
    await execute(cluster.nodes.primary, "SELECT 1")
    shop = Shop(cluster)
    async with shop.client() as client:
        token = (await client.post("/plain/2")).headers[HEADER]
        found = (await client.get("/items", headers={HEADER: token})).json()
        assert found["items"] == [1, 2]
