"""install_error_handlers beside other handlers, in groups, streams, websockets and mounts."""

import traceback
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from pgtoolset import LockTimeoutError, RowNotFoundError, WaitTimeoutError
from pgtoolset.fastapi import install_error_handlers
from pgtoolset.testing import create_test_client
from tests.fastapi.api import check_problem
from tests.sessions.shop import client_of, talk_to_websocket


class Refusal(Exception):
    """PostgreSQL's answer, as the drivers raise it."""

    def __init__(self, sqlstate: str, constraint: str | None = None) -> None:
        super().__init__("secret_message")
        self.sqlstate = sqlstate
        self.diag = self
        self.constraint_name = constraint


def refused(
    sqlstate: str, class_: type[DBAPIError] = DBAPIError, constraint: str | None = None
) -> DBAPIError:
    return class_("SELECT secret", {"secret": 1}, Refusal(sqlstate, constraint))


UNIQUE = partial(refused, "23505", IntegrityError)
UNMAPPED = partial(refused, "23000", IntegrityError)


class OwnError(Exception):
    """Of an application."""


class OwnGroup(ExceptionGroup[Exception]):
    """Of an application."""


def raised_from(cause: Exception, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


def endpoint_of(make: Callable[[], Exception]) -> Callable[[], Any]:
    async def endpoint() -> None:
        raise make()

    return endpoint


def app_of(make: Callable[[], Exception], **options: Any) -> FastAPI:
    app = FastAPI()
    app.get("/")(endpoint_of(make))
    install_error_handlers(app, **options)
    return app


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (lambda: ExceptionGroup("tasks", [UNIQUE()]), 409),
        (lambda: ExceptionGroup("tasks", [UNIQUE(), UNIQUE()]), 409),
        (lambda: ExceptionGroup("outer", [ExceptionGroup("inner", [UNIQUE()]), UNIQUE()]), 409),
        (lambda: ExceptionGroup("tasks", [RowNotFoundError("secret")]), 404),
        (lambda: ExceptionGroup("tasks", [UNIQUE(), RowNotFoundError("secret")]), 500),
        (lambda: ExceptionGroup("tasks", [UNIQUE(), KeyError("secret")]), 500),
        (lambda: ExceptionGroup("tasks", [KeyError("secret"), UNIQUE()]), 500),
        (lambda: ExceptionGroup("tasks", [UNIQUE(), refused("23503")]), 500),
        (lambda: OwnGroup("tasks", [UNIQUE()]), 500),
        (lambda: raised_from(UNIQUE(), OwnError()), 500),
        (lambda: raised_from(UNIQUE(), refused("42P01")), 500),
        (lambda: raised_from(KeyError(), UNIQUE()), 409),
    ],
)
async def test_groups_and_causes(make: Callable[[], Exception], status: int) -> None:
    """A group is a problem where all members are the same one; another's cause is no problem."""
    app = app_of(make)
    async with create_test_client(app) as client:
        if status != 500:
            check_problem(await client.get("/"), status)
            return
        with pytest.raises(Exception) as caught:
            await client.get("/")
    assert type(caught.value) is type(make())


async def test_constraint_of_a_group() -> None:
    """A group whose members violate several constraints names no constraint."""
    texts = {"a": "It is a.", "b": "It is b."}
    for names, detail in (
        (["a"], "It is a."),
        (["b", "b"], "It is b."),
        (["a", "b"], "A resource with these values exists already."),
    ):
        members = [refused("23505", constraint=each) for each in names]
        app = app_of(lambda members=members: ExceptionGroup("tasks", members), constraints=texts)
        async with create_test_client(app) as client:
            assert (await client.get("/")).json()["detail"] == detail


async def teapot(request: Request, error: Exception) -> PlainTextResponse:
    return PlainTextResponse(type(error).__name__, 418)


def plain_teapot(request: Request, error: Exception) -> PlainTextResponse:
    return PlainTextResponse(type(error).__name__, 418)


class Teapot:
    async def __call__(self, request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(type(error).__name__, 418)


HANDLERS: list[Any] = [teapot, plain_teapot, Teapot(), partial(teapot), partial(plain_teapot)]


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("class_", [IntegrityError, DBAPIError, SQLAlchemyError])
@pytest.mark.parametrize("order", ["before", "after"])
async def test_handler_for_the_rest(class_: Any, handler: Any, order: str) -> None:
    """An error that is no problem goes to the handler that it had without this one."""
    app = FastAPI()
    app.get("/")(endpoint_of(UNMAPPED))
    if order == "before":
        app.add_exception_handler(class_, handler)
    install_error_handlers(app)
    install_error_handlers(app)
    if order == "after":
        app.add_exception_handler(class_, handler)
    async with create_test_client(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (418, "IntegrityError")


@pytest.mark.parametrize(
    ("class_", "order", "status"),
    [
        (IntegrityError, "before", 409),
        (IntegrityError, "after", 418),
        (DBAPIError, "before", 409),
        (SQLAlchemyError, "before", 409),
        (SQLAlchemyError, "after", 409),
        (Exception, "before", 409),
        (Exception, "after", 409),
    ],
)
async def test_handler_for_the_same(class_: Any, order: str, status: int) -> None:
    """Of handlers for the same class the later one counts; one for a base does not stand before."""
    app = FastAPI()
    app.get("/")(endpoint_of(UNIQUE))
    if order == "before":
        app.add_exception_handler(class_, teapot)
    install_error_handlers(app)
    if order == "after":
        app.add_exception_handler(class_, teapot)
    async with create_test_client(app) as client:
        assert (await client.get("/")).status_code == status


async def test_handler_of_a_subclass() -> None:
    """The handler of an application for a subclass of its own stands before this one."""

    class OrderNotFoundError(RowNotFoundError):
        pass

    app = app_of(lambda: OrderNotFoundError("secret"))
    app.add_exception_handler(OrderNotFoundError, teapot)
    async with create_test_client(app) as client:
        assert (await client.get("/")).status_code == 418


async def test_second_call_replaces_the_first() -> None:
    """The options of the last call count."""
    app = app_of(lambda: refused("23505", constraint="a"), constraints={"a": "First."})
    install_error_handlers(app, constraints={"a": "Second."})
    async with create_test_client(app) as client:
        assert (await client.get("/")).json()["detail"] == "Second."


@pytest.mark.parametrize("make", [UNMAPPED, partial(refused, "42P01"), partial(KeyError, "x")])
async def test_the_rest_reaches_the_server(make: Callable[[], Exception]) -> None:
    """What is no problem leaves the application as it was raised, with its traceback, after a
    500."""
    app = app_of(make)
    async with create_test_client(app) as client:
        with pytest.raises(type(make())) as caught:
            await client.get("/")
    functions = [each.name for each in traceback.extract_tb(caught.value.__traceback__)]
    assert functions[-1] == "endpoint"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    async with client_of(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")


async def test_handler_of_exception() -> None:
    """What is no problem reaches the application's handler for `Exception`."""
    app = app_of(UNMAPPED)
    app.add_exception_handler(Exception, teapot)
    async with client_of(app) as client:
        assert (await client.get("/")).status_code == 418


async def test_http_exception() -> None:
    """An `HTTPException`, whatever its cause, is answered as always."""
    app = app_of(lambda: raised_from(UNIQUE(), HTTPException(410, "gone")))
    async with create_test_client(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.json()) == (410, {"detail": "gone"})


async def test_after_the_response_started() -> None:
    """A stream and a background task that fail end as they do with any handler: with an error."""
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "a"
            raise UNIQUE()

        return StreamingResponse(parts())

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> None:
        async def fail() -> None:
            raise UNIQUE()

        tasks.add_task(fail)

    async with create_test_client(app) as client:
        for path in ("/stream", "/background"):
            with pytest.raises(RuntimeError, match="response already started") as caught:
                await client.get(path)
            assert isinstance(caught.value.__cause__, IntegrityError)
    async with client_of(app) as client:
        assert (await client.get("/background")).status_code == 200


async def test_websocket() -> None:
    """The error of a websocket propagates, for it has no response."""
    app = FastAPI()
    install_error_handlers(app)

    @app.websocket("/ws")
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        raise UNIQUE()

    with pytest.raises(IntegrityError):
        await talk_to_websocket(app, "/ws")


async def test_routers_and_mounts() -> None:
    """The routers of the application are covered; a mounted application needs a call of its own."""
    app, router, without, inner = FastAPI(), APIRouter(), FastAPI(), FastAPI()
    for each in (router, without, inner):
        each.get("/")(endpoint_of(UNIQUE))
    app.include_router(router, prefix="/router")
    app.mount("/without", without)
    app.mount("/inner", inner)
    install_error_handlers(app)
    install_error_handlers(inner)
    async with client_of(app) as client:
        check_problem(await client.get("/router/"), 409)
        check_problem(await client.get("/inner/"), 409)
        assert (await client.get("/without/")).status_code == 500


async def test_starlette() -> None:
    """An application of Starlette is answered likewise."""

    async def endpoint(request: Request) -> None:
        raise RowNotFoundError("secret")

    app = Starlette(routes=[Route("/", endpoint)])
    install_error_handlers(app)
    async with create_test_client(app) as client:
        check_problem(await client.get("/"), 404)


async def test_middleware() -> None:
    """A middleware sees the answer as any other response: a browser gets the CORS headers."""
    app = app_of(lambda: WaitTimeoutError("secret"))
    app.add_middleware(CORSMiddleware, allow_origins=["http://shop"])
    async with create_test_client(app) as client:
        response = await client.get("/", headers={"Origin": "http://shop"})
    check_problem(response, 504)
    assert response.headers["access-control-allow-origin"] == "http://shop"


async def test_head() -> None:
    """A HEAD request has the headers of the answer."""
    app = FastAPI()
    install_error_handlers(app)
    error = LockTimeoutError("secret", tables=["secret"], mode="SHARE", timeout=1)
    app.head("/")(endpoint_of(lambda: error))
    async with create_test_client(app) as client:
        response: httpx.Response = await client.head("/")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
