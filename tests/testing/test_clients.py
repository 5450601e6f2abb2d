"""`create_test_client`: a client on an application, its lifespan run, its overrides put back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request

from pgtoolset.errors import LifespanError
from pgtoolset.testing import create_test_client


class Refused(Exception):
    pass


def number() -> int:
    return 1


def application(**options: Any) -> FastAPI:
    """An API with a dependency, and one with an error of its own."""
    app = FastAPI(**options)

    @app.get("/number")
    async def get_number(found: Annotated[int, Depends(number)]) -> int:
        return found

    @app.get("/refused")
    async def refuse() -> None:
        raise Refused

    return app


class Recorded:
    """A lifespan that records what happens to it."""

    def __init__(self, *, startup: Any = None, shutdown: Any = None) -> None:
        self.seen: list[str] = []
        self.begun = asyncio.Event()
        self._startup = startup
        self._shutdown = shutdown

    @asynccontextmanager
    async def __call__(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        self.seen.append("startup")
        self.begun.set()
        entered = asyncio.current_task()
        try:
            # A timeout must be left by the task that has entered it.
            async with asyncio.timeout(600):
                if self._startup is not None:
                    await self._startup()
                self.seen.append("started")
                yield {"pool": "of the startup"}
                if self._shutdown is not None:
                    await self._shutdown()
                self.seen.append("shutdown")
        finally:
            assert asyncio.current_task() is entered
            self.seen.append("left")


WHOLE = ["startup", "started", "shutdown", "left"]


async def refused() -> None:
    raise Refused


async def test_requests() -> None:
    """The client sends requests to the application, relative to the base URL."""
    async with create_test_client(application(), base_url="http://shop.example/v1") as client:
        assert isinstance(client, httpx.AsyncClient)
        response = await client.get("http://shop.example/number")
        assert response.json() == 1
        assert (await client.get("/number")).status_code == 404
        with pytest.raises(Refused):
            await client.get("http://shop.example/refused")
    assert client.is_closed


async def test_lifespan() -> None:
    """The lifespan starts before the block and is shut down after it, in one task; requests see the
    state that it has yielded, each a copy of its own."""
    recorded = Recorded()
    app = application(lifespan=recorded)

    @app.get("/pool")
    async def get_pool(request: Request) -> str:
        pool: str = request.state.pool
        request.state.pool = "of the request"
        return pool

    async with create_test_client(app) as client:
        assert recorded.seen == ["startup", "started"]
        for _ in range(2):
            assert (await client.get("/pool")).json() == "of the startup"
    assert recorded.seen == WHOLE


async def test_without_lifespan() -> None:
    """With lifespan=False neither startup nor shutdown runs."""
    recorded = Recorded()
    async with create_test_client(application(lifespan=recorded), lifespan=False) as client:
        assert (await client.get("/number")).status_code == 200
    assert recorded.seen == []


async def test_startup_that_raises() -> None:
    """The exception of a startup is raised itself, and the block does not run."""
    recorded = Recorded(startup=refused)
    with pytest.raises(Refused):
        async with create_test_client(application(lifespan=recorded)):
            pytest.fail("the block runs")
    assert recorded.seen == ["startup", "left"]


async def test_shutdown_that_raises() -> None:
    """The exception of a shutdown is raised at the end of the block."""
    recorded = Recorded(shutdown=refused)
    with pytest.raises(Refused):
        async with create_test_client(application(lifespan=recorded)):
            pass
    assert recorded.seen == ["startup", "started", "left"]


async def test_block_that_raises() -> None:
    """After an error of the block the shutdown runs, and the error is raised."""
    recorded = Recorded()
    with pytest.raises(ZeroDivisionError):
        async with create_test_client(application(lifespan=recorded)):
            raise ZeroDivisionError
    assert recorded.seen == WHOLE


async def test_block_and_shutdown_that_raise(caplog: pytest.LogCaptureFixture) -> None:
    """Where both fail the error of the block is raised, and the other one is noted and logged."""
    recorded = Recorded(shutdown=refused)
    with pytest.raises(ZeroDivisionError) as caught:
        async with create_test_client(application(lifespan=recorded)):
            raise ZeroDivisionError
    assert ["Refused" in note for note in caught.value.__notes__] == [True]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Refused" in caplog.text


async def test_cancelled_block() -> None:
    """A cancelled block shuts the application down, and a second cancellation meanwhile waits for
    the shutdown."""
    entered, stopping, go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def shutdown() -> None:
        stopping.set()
        await go.wait()

    recorded = Recorded(shutdown=shutdown)
    app = application(lifespan=recorded)
    app.dependency_overrides = before = {number: number}

    async def use() -> None:
        async with create_test_client(app, dependency_overrides={number: lambda: 2}):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await entered.wait()
    task.cancel()
    await stopping.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert recorded.seen == ["startup", "started"]
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorded.seen == WHOLE
    assert app.dependency_overrides is before
    assert before == {number: number}


async def test_cancelled_startup() -> None:
    """A cancellation during the startup cancels the startup, and waits until it has cleaned up."""
    starting = asyncio.Event()

    async def startup() -> None:
        starting.set()
        await asyncio.Event().wait()

    recorded = Recorded(startup=startup)

    async def use() -> None:
        async with create_test_client(application(lifespan=recorded)):
            pytest.fail("the block runs")

    task = asyncio.create_task(use())
    await starting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorded.seen == ["startup", "left"]


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_at_any_time(turns: int) -> None:
    """At whatever turn of the loop a cancellation arrives, what was started is shut down, and the
    overrides are put back."""
    recorded = Recorded()
    app = application(lifespan=recorded)

    async def use() -> None:
        async with create_test_client(app, dependency_overrides={number: lambda: 2}):
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await recorded.begun.wait()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorded.seen[-1] == "left"
    assert ("started" in recorded.seen) == ("shutdown" in recorded.seen)
    assert app.dependency_overrides == {}


async def test_overrides() -> None:
    """Overrides are added to those of the application for the block."""
    app = application()
    app.dependency_overrides[refused] = before = object
    async with create_test_client(app, dependency_overrides={number: lambda: 2}) as client:
        assert app.dependency_overrides[refused] is before
        assert (await client.get("/number")).json() == 2
        async with create_test_client(app, dependency_overrides={number: lambda: 3}) as inner:
            assert (await inner.get("/number")).json() == 3
        assert (await client.get("/number")).json() == 2
    assert app.dependency_overrides == {refused: before}


@pytest.mark.parametrize("fails", [False, True])
async def test_overrides_that_the_block_changes(fails: bool) -> None:
    """Afterwards the overrides are the same mapping with what it had, whatever the block has set,
    and after an error of the block or the startup too."""
    app = application(lifespan=Recorded(startup=refused) if fails else None)
    before = app.dependency_overrides
    before[number] = refused
    try:
        async with create_test_client(app, dependency_overrides={number: lambda: 2}):
            app.dependency_overrides.clear()
            app.dependency_overrides = {refused: number}
            raise Refused
    except Refused:
        pass
    assert app.dependency_overrides is before
    assert before == {number: refused}


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """An application of no framework that returns at once for the scope lifespan."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def test_application_without_a_lifespan() -> None:
    """An application that returns at once for the lifespan has none, which is no error."""
    async with create_test_client(plain) as client:
        assert (await client.get("/")).status_code == 204


async def test_application_that_knows_no_lifespan() -> None:
    """An exception for the scope itself is raised, with a note that names lifespan=False."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise Refused
        await plain(scope, receive, send)

    with pytest.raises(Refused) as caught:
        async with create_test_client(app):
            pytest.fail("the block runs")
    assert ["lifespan=False" in note for note in caught.value.__notes__] == [True]
    async with create_test_client(app, lifespan=False) as client:
        assert (await client.get("/")).status_code == 204


@pytest.mark.parametrize("phase", ["startup", "shutdown"])
@pytest.mark.parametrize("returns", [True, False])
async def test_application_that_answers_failed(phase: str, returns: bool) -> None:
    """The answer that a phase has failed is an error with the reason, whether the application then
    ends or waits for more."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            event = (await receive())["type"]
            if event == f"lifespan.{phase}":
                await send({"type": f"{event}.failed", "message": "no disk"})
                if returns:
                    return
            else:
                await send({"type": f"{event}.complete"})

    with pytest.raises(LifespanError, match=f"its {phase} has failed: no disk"):
        async with create_test_client(app):
            assert phase == "shutdown"


async def test_lifespan_that_ends_early() -> None:
    """What a lifespan raises during the block is raised at its end."""
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await go.wait()
        raise Refused

    with pytest.raises(Refused):
        async with create_test_client(app):
            go.set()


async def test_overrides_of_another_application() -> None:
    """Overrides for an application that has no such attribute are a TypeError that says so."""
    with pytest.raises(TypeError, match="has no dependency_overrides"):
        async with create_test_client(plain, dependency_overrides={number: number}):
            pytest.fail("the block runs")


async def test_without_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without httpx the error says what to install, and the application is not called."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    recorded = Recorded()
    with pytest.raises(ImportError, match='pip install "httpx'):
        async with create_test_client(application(lifespan=recorded)):
            pytest.fail("the block runs")
    assert recorded.seen == []
