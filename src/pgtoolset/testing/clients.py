"""An HTTP client on an ASGI application, with its lifespan and without a server."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from pgtoolset._arguments import check_flag, check_function, shown
from pgtoolset._cancellation import uninterrupted
from pgtoolset.errors import LifespanError

if TYPE_CHECKING:
    import httpx

__all__ = ["create_test_client"]

logger: logging.Logger = logging.getLogger("pgtoolset")

#: An ASGI application: a function of the scope, `receive` and `send`.
AsgiApplication: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


@asynccontextmanager
async def create_test_client(
    app: AsgiApplication,
    *,
    dependency_overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    base_url: str = "http://test",
    lifespan: bool = True,
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the lifespan of an application and yield a client, whose requests the loop itself serves.

    The application runs in the event loop of the caller, so it can use the connections of a test.
    The lifespan runs in a task of its own. The end of the block always shuts the application down,
    after an error or a cancellation too. A request raises the exception that the application does
    not handle, as `httpx.ASGITransport` does by default. See https://www.python-httpx.org/ and
    https://asgi.readthedocs.io/en/latest/specs/lifespan.html

    Args:
        app: any ASGI application.
        dependency_overrides: added to `app.dependency_overrides` of FastAPI for the block.
            Afterwards that attribute is what it was before, whatever the block has set.
        base_url: what relative URLs of requests are relative to.
        lifespan: run startup and shutdown. Requests see the state that the startup has set. An
            application that raises for the scope `lifespan` needs `False`; one that returns at once
            does not.

    Yields:
        The client.

    Raises:
        LifespanError: the application answers that its startup or shutdown has failed. An exception
            that leaves its lifespan is raised itself. Where the block has failed too, that error
            is raised, and the one of the shutdown is a note on it and a warning in the log.
        ImportError: httpx is not installed.
        ValueError, TypeError: an argument is wrong; before the application is called.

    Example:
        >>> get_db = create_db_dependency(session_maker=session_maker)
        >>> overrides = {get_db: lambda: session}
        >>> async with create_test_client(app, dependency_overrides=overrides) as client:
        ...     response = await client.get("/orders/1")
        >>> assert response.status_code == 404
    """
    check_function("app", "an ASGI application", app)
    check_flag("lifespan", lifespan)
    overrides = _check_overrides(app, dependency_overrides)
    httpx = await asyncio.to_thread(_import_httpx)
    url = _check_base_url(httpx, base_url)
    served = app
    running: _Lifespan | None = None
    with _overridden(app, overrides):
        if lifespan:
            running = _Lifespan(app)
            await running.start()
            served = running.serve
        try:
            transport = httpx.ASGITransport(served)
            async with httpx.AsyncClient(transport=transport, base_url=url) as client:
                yield client
        except BaseException as error:
            if running is not None:
                await uninterrupted(running.stop_after(error))
            raise
        else:
            if running is not None:
                await uninterrupted(running.stop())


def _check_overrides(app: object, overrides: object) -> Mapping[Any, Any]:
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise TypeError(
            "dependency_overrides must be a mapping of dependency to dependency or None, "
            f"not {shown(overrides)}"
        )
    for each in (*overrides.keys(), *overrides.values()):
        if not callable(each):
            raise TypeError(
                f"dependency_overrides must map functions to functions, not {shown(each)}"
            )
    if not isinstance(getattr(app, "dependency_overrides", None), dict):
        raise TypeError(
            f"app, {shown(app)}, has no dependency_overrides: give the FastAPI application itself. "
            "Where something wraps it, set dependency_overrides on it before"
        )
    return overrides


def _check_base_url(httpx: Any, base_url: object) -> Any:
    try:
        url = httpx.URL(base_url) if isinstance(base_url, str) else None
    except httpx.InvalidURL:
        url = None
    if url is None or url.scheme not in ("http", "https") or not url.host:
        error = ValueError if isinstance(base_url, str) else TypeError
        raise error(f'base_url must be a URL such as "http://test", not {shown(base_url)}')
    return url


def _import_httpx() -> Any:
    try:
        return importlib.import_module("httpx")
    except ModuleNotFoundError as error:
        raise ImportError(
            'create_test_client needs httpx, which is not installed: run pip install "httpx>=0.27" '
            'or "pgtoolset[testing]"'
        ) from error


@contextmanager
def _overridden(app: Any, overrides: Mapping[Any, Any]) -> Iterator[None]:
    """Add to the overrides of an application; afterwards they are what they were."""
    current = getattr(app, "dependency_overrides", None)
    if not isinstance(current, dict):
        yield
        return
    before = dict(current)
    current.update(overrides)
    try:
        yield
    finally:
        # The block may have set the attribute, or changed the mapping that others hold.
        app.dependency_overrides = current
        current.clear()
        current.update(before)


class _Lifespan:
    """The lifespan of an application: a task that lives from startup to shutdown, as in a server.

    One task, because what a startup enters (a task group, a timeout) the same task must leave.
    """

    def __init__(self, app: AsgiApplication) -> None:
        self._app = app
        self._state: dict[str, Any] = {}
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answered = asyncio.Event()
        self._answer: Mapping[str, Any] | None = None
        self._has_received = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run the startup. A cancellation meanwhile cancels it, and waits for its end."""
        self._task = asyncio.create_task(self._run(), name="pgtoolset-lifespan")
        self._task.add_done_callback(lambda _: self._answered.set())
        try:
            await self._ask("startup")
        except asyncio.CancelledError as cancelled:
            if self._has_succeeded("startup"):
                await uninterrupted(self.stop_after(cancelled))
            else:
                self._task.cancel()
                await uninterrupted(self._end())
            raise
        if not self._has_succeeded("startup"):
            await uninterrupted(self._end())
            self._raise_failure("startup")

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request to the application, with the state of the lifespan."""
        await self._app({**scope, "state": dict(self._state)}, receive, send)

    async def stop(self) -> None:
        """Run the shutdown and raise what the lifespan has raised."""
        assert self._task is not None
        if not self._task.done():
            await self._ask("shutdown")
        await self._end()
        if not self._has_succeeded("shutdown"):
            self._raise_failure("shutdown")
        self._raise_error()

    async def stop_after(self, error: BaseException) -> None:
        """Run the shutdown after an error of the block, which the caller raises."""
        try:
            await self.stop()
        except Exception as failure:
            error.add_note(f"the shutdown of the application failed, too: {shown(failure)}")
            logger.warning("the shutdown of an application under test failed", exc_info=True)

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self._state,
        }
        try:
            await self._app(scope, self._receive, self._send)
        except Exception as error:
            if not self._has_received:
                error.add_note(
                    "raised for the scope lifespan: call create_test_client with lifespan=False if "
                    "the application has no lifespan"
                )
            raise

    async def _receive(self) -> dict[str, Any]:
        self._has_received = True
        if self._answer is not None and self._answer["type"].endswith(".failed"):
            raise LifespanError(_message(self._answer))
        return await self._events.get()

    async def _send(self, message: Mapping[str, Any]) -> None:
        self._answer = message
        self._answered.set()

    async def _ask(self, phase: str) -> None:
        """Send an event, and wait until the application answers it or ends."""
        self._answered.clear()
        self._events.put_nowait({"type": f"lifespan.{phase}"})
        await self._answered.wait()

    async def _end(self) -> None:
        assert self._task is not None
        await asyncio.wait([self._task])

    def _has_succeeded(self, phase: str) -> bool:
        return self._answer is not None and self._answer["type"] == f"lifespan.{phase}.complete"

    def _raise_failure(self, phase: str) -> None:
        """Raise the error of the lifespan or its answer; an application without one has neither."""
        self._raise_error()
        if self._answer is not None and self._answer["type"] == f"lifespan.{phase}.failed":
            raise LifespanError(_message(self._answer))

    def _raise_error(self) -> None:
        assert self._task is not None
        if self._task.cancelled():
            raise LifespanError("the lifespan of the application was cancelled by the application")
        error = self._task.exception()
        if error is not None:
            raise error


def _message(answer: Mapping[str, Any]) -> str:
    phase = str(answer["type"]).split(".")[1]
    reason = str(answer.get("message", "")).strip() or "it gives no reason"
    return f"the application answered that its {phase} has failed: {reason}"
