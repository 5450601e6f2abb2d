"""The lifespan and the dependency overrides of an ASGI application under test.

https://asgi.readthedocs.io/en/latest/specs/lifespan.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

from pgtoolset._arguments import shown
from pgtoolset._cancellation import uninterrupted
from pgtoolset.errors import LifespanError

__all__ = ["AsgiApplication", "lifespan_of", "overridden"]

logger: logging.Logger = logging.getLogger("pgtoolset")

#: An ASGI application: a function of the scope, `receive` and `send`.
AsgiApplication: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


@contextmanager
def overridden(app: Any, overrides: Mapping[Any, Any]) -> Iterator[None]:
    """Add to the overrides of an application, and restore them at the end of the block.

    Raises:
        TypeError: `overrides` does not map functions to functions, or the application has none.
    """
    _check(app, overrides)
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


def _check(app: object, overrides: object) -> None:
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
    if overrides and not isinstance(getattr(app, "dependency_overrides", None), dict):
        raise TypeError(
            f"app, {shown(app)}, has no dependency_overrides: give the FastAPI application itself. "
            "Where something wraps it, set dependency_overrides on it before"
        )


@asynccontextmanager
async def lifespan_of(app: AsgiApplication, *, run: bool = True) -> AsyncIterator[AsgiApplication]:
    """Run the startup of an application, yield what serves its requests, and shut it down.

    Args:
        app: the application.
        run: `False` yields the application and runs nothing.
    """
    if not run:
        yield app
        return
    lifespan = _Lifespan(app)
    await lifespan.start()
    try:
        yield lifespan.serve
    except BaseException as error:
        await uninterrupted(lifespan.stop_after(error))
        raise
    else:
        await uninterrupted(lifespan.stop())


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
