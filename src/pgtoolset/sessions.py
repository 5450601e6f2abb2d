"""Sessions for a FastAPI request and for everywhere else: one unit of work each, committed honestly
or not at all."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, Generic, TypeVar

from pgtoolset._arguments import check_session_maker, new_session, sync_session_of
from pgtoolset._lifecycle import close
from pgtoolset._record import hold, record_of, release
from pgtoolset.errors import UnsupportedVersionError
from pgtoolset.protocols import DatabaseContext, DatabaseDependency, ManagedSession, SessionFactory

__all__ = ["create_db_context", "create_db_dependency"]

S = TypeVar("S", bound=ManagedSession)

#: Where FastAPI, from 0.121 on, keeps the exit stacks that it unwinds between the endpoint and the
#: response, and after the response. It is not documented; a test looks for both in every supported
#: version.
_FUNCTION_STACK = "fastapi_function_astack"
_REQUEST_STACK = "fastapi_inner_astack"


def create_db_dependency(session_maker: SessionFactory[S]) -> DatabaseDependency[S]:
    """Make a FastAPI dependency whose sessions are committed before the response starts.

    Use it as a plain `Depends(get_db)`. The session is already in a transaction when the endpoint
    gets it, and no connection is checked out before the first statement. When the endpoint has
    returned, the transaction is committed and only then the response starts, so a commit that fails
    gives the client an error; an exception in the endpoint rolls back. What a streaming response
    writes with the session is committed at the end of the stream.

    Without FastAPI, `async for session in get_db(): ...` and `asynccontextmanager(get_db)` give the
    same unit of work. Leaving the `async for` early (`break`, `return`) rolls back.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions. The dependency is typed
            with its session.

    Returns:
        A function that returns an async generator of one session. FastAPI, which calls it with the
        request, sees a coroutine function that returns the session.

    Raises:
        TypeError: `session_maker` is not a factory of sessions.

    The dependency raises `TransactionAbortedError` where the endpoint swallowed a database error
    that aborted the transaction, and `UnsupportedVersionError` with FastAPI older than 0.121.

    Example:
        >>> engine = create_async_engine(url)
        >>> get_db = create_db_dependency(session_maker=async_sessionmaker(engine))
        >>> @app.post("/orders", status_code=201)
        ... async def place_order(
        ...     order: OrderIn, session: Annotated[AsyncSession, Depends(get_db)]
        ... ) -> OrderOut: ...

    See https://fastapi.tiangolo.com/tutorial/dependencies/dependencies-with-yield/
    """
    check_session_maker(session_maker)

    async def by_hand() -> AsyncGenerator[S, None]:
        unit = UnitOfWork(session_maker)
        try:
            await unit.begin()
            yield unit.session
            await unit.commit()
        finally:
            await unit.close()

    connection_type = _http_connection_type()
    if connection_type is None:
        return by_hand

    async def in_request(connection: Any) -> S:
        before_response, after_response = _exit_stacks(connection)
        unit = UnitOfWork(session_maker)
        after_response.push_async_exit(unit.finish)
        await unit.begin()
        before_response.push_async_exit(unit.commit_unless_failed)
        return unit.session

    def get_db(connection: Any = None) -> Any:
        return by_hand() if connection is None else in_request(connection)

    # FastAPI awaits what it calls a coroutine function. For an async generator function it would
    # make a context manager, a cancel scope and two more coroutines per request: 50 us, more than
    # all the rest of ours.
    _mark_coroutine_function(get_db)
    # FastAPI injects the request, or the websocket, for a parameter of this type. It has a default,
    # and is not part of the declared type, so that `get_db()` can be called by hand.
    parameter = inspect.Parameter(
        "connection", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=connection_type
    )
    vars(get_db)["__signature__"] = inspect.Signature([parameter])
    return get_db


def create_db_context(session_maker: SessionFactory[S]) -> DatabaseContext[S]:
    """Make a context manager for sessions outside of a request: jobs, scripts, consumers, tests.

    Each `async with db_context() as session` is one unit of work. The session is already in a
    transaction, and no connection is checked out before the first statement. The end of the block
    commits; an exception, cancellation included, rolls everything back and propagates unchanged.
    The block may `commit()` or `rollback()` by itself and go on; what is open at its end is
    committed. Afterwards the session is closed, whatever happened.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions.

    Returns:
        A function without parameters that returns an async context manager, which yields one
        session.

    Raises:
        TypeError: `session_maker` is not a factory of sessions.

    The block raises `TransactionAbortedError` where it swallowed a database error that aborted the
    transaction. A cancellation that arrives during the COMMIT itself is delivered after it: the
    caller is never told that work was rolled back which PostgreSQL has stored.

    Example:
        >>> db_context = create_db_context(session_maker=async_sessionmaker(engine))
        >>> async with db_context() as session:
        ...     session.add(Order(customer="Ada"))
    """
    check_session_maker(session_maker)

    @asynccontextmanager
    async def db_context() -> AsyncIterator[S]:
        unit = UnitOfWork(session_maker)
        try:
            await unit.begin()
            yield unit.session
            await unit.commit()
        finally:
            await unit.close()

    return db_context


class UnitOfWork(Generic[S]):
    """One session from its factory to its closing."""

    __slots__ = ("_sync", "session")

    def __init__(self, session_maker: SessionFactory[S]) -> None:
        self.session: S = new_session(session_maker)
        self._sync = sync_session_of(self.session)

    async def begin(self) -> None:
        if self._sync is None:
            await self.session.begin()
        else:
            hold(self._sync)
            # The lazy half of `AsyncSession.begin()`: it does no I/O, so it needs no greenlet.
            if not self._sync.in_transaction():
                self._sync.begin()

    async def commit(self) -> None:
        """Commit what is open; the session stays usable."""
        if self.session.in_transaction():
            await self.session.commit()

    async def commit_unless_failed(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """For an exit stack. An exception is on its way to whoever holds the unit, who closes
        it."""
        if exc_type is None and self.session.in_transaction():
            await self.commit()
            if self._sync is not None and not self._sync.autobegin:
                self._sync.begin()

    async def finish(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """For an exit stack: commit what a streaming response wrote, unless it failed or was cut,
        and close."""
        try:
            if exc_type is None and not self._was_cancelled():
                await self.commit()
        finally:
            await self.close()

    def _was_cancelled(self) -> bool:
        # A client that hangs up cancels the stream and nobody hears of it: Starlette keeps the
        # cancellation to itself.
        return self._sync is not None and isinstance(
            record_of(self._sync).error, asyncio.CancelledError
        )

    async def close(self) -> None:
        """Roll back what is still open and give everything back."""
        if self._sync is not None:
            release(self._sync)
        await close(self.session)


def _http_connection_type() -> type | None:
    """What a request and a websocket have in common, in FastAPI's eyes; `None` where FastAPI is not
    installed."""
    try:
        from starlette.requests import HTTPConnection  # FastAPI's own, and a fraction of its import
    except ModuleNotFoundError:
        return None
    return HTTPConnection


def _mark_coroutine_function(function: Any) -> None:
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(function)
    else:
        function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]


def _exit_stacks(connection: Any) -> tuple[AsyncExitStack, AsyncExitStack]:
    before_response = connection.scope.get(_FUNCTION_STACK)
    after_response = connection.scope.get(_REQUEST_STACK)
    if isinstance(before_response, AsyncExitStack) and isinstance(after_response, AsyncExitStack):
        return before_response, after_response
    try:
        installed = version("fastapi")
    except PackageNotFoundError:  # pragma: no cover - FastAPI called us, so something provides it
        installed = "of unknown version"
    raise UnsupportedVersionError(
        f"Depends(get_db) cannot commit before the response: FastAPI {installed} does not keep the exit stacks "
        f"{_FUNCTION_STACK!r} and {_REQUEST_STACK!r} in the request's scope. Use FastAPI 0.121 or newer."
    )
