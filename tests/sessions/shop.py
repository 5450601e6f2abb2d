"""An application with one endpoint for each behaviour, and clients that see when a response
starts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import asyncpg
import httpx
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import (
    TransactionAbortedError,
    create_db_dependency,
    get_transaction,
    on_commit,
)
from tests.support import Part, insert, stored, swallow_error

Maker = async_sessionmaker[AsyncSession]

#: Seconds that the COMMIT takes on a table with the slow trigger.
SLOW = 0.4


class Shop:
    """An application with one endpoint for each behaviour, and what happened in it."""

    def __init__(self, maker: Maker) -> None:
        self.app = FastAPI()
        self.log: list[str] = []
        self.get_db = get_db = create_db_dependency(session_maker=maker)
        self.Db: Any = Annotated[AsyncSession, Depends(get_db)]
        self._add_endpoints()
        self._add_streams()
        self._add_handlers()

    def _add_endpoints(self) -> None:
        app, log, get_db = self.app, self.log, self.get_db
        Db = Annotated[AsyncSession, Depends(get_db)]

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

        @app.post("/function-scope/{id_}")
        async def function_scope(
            id_: int, session: Annotated[AsyncSession, Depends(get_db, scope="function")]
        ) -> None:
            await insert(session, id_)

        @app.websocket("/ws")
        async def websocket(socket: WebSocket, session: Db) -> None:
            await socket.accept()
            await insert(session, int(await socket.receive_text()))
            await socket.close()

    def _add_streams(self) -> None:
        app = self.app
        Db = Annotated[AsyncSession, Depends(self.get_db)]

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

    def _add_handlers(self) -> None:
        @self.app.exception_handler(IntegrityError)
        async def conflict(request: Any, error: IntegrityError) -> JSONResponse:
            return JSONResponse({"detail": "conflict"}, status_code=409)

        @self.app.exception_handler(TransactionAbortedError)
        async def aborted(request: Any, error: TransactionAbortedError) -> JSONResponse:
            return JSONResponse({"sqlstate": error.sqlstate}, status_code=500)


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


@asynccontextmanager
async def client_of(app: Any, *, raises: bool = False) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a socket. A request returns when the application has ended it."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield client


def http_scope(path: str, method: str = "POST") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": method,
        "path": path,
        "headers": [],
        "query_string": b"",
    }


async def talk_to_websocket(
    app: Callable[..., Any], path: str, *texts: str, **scope: Any
) -> list[str]:
    """Connect to a websocket, send texts, and return the types of the messages that came back."""
    connect: dict[str, str] = {"type": "websocket.connect"}
    incoming = iter([connect, *({"type": "websocket.receive", "text": each} for each in texts)])
    sent: list[str] = []

    async def receive() -> Any:
        return next(incoming)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    websocket = {
        "type": "websocket",
        "path": path,
        "headers": [],
        "query_string": b"",
        "subprotocols": [],
    }
    await app(websocket | scope, receive, send)
    return sent


async def stored_is(other: asyncpg.Connection, ids: set[int]) -> bool:
    return await stored(other) == ids
